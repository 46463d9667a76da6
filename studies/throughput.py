"""Training throughput against Stable-Baselines3, in alternation on one thread.

    pip install stable-baselines3==2.9.2
    python studies/throughput.py
    python studies/throughput.py --algorithm a2c
    python studies/throughput.py --extra=--compile --warmup 102400
    python studies/throughput.py --diagnostics     # what the collapse metrics cost

Each round starts the two scripts and Stable-Baselines3 at the same hyperparameters (the scripts' defaults, see
docs/parity.md for the mapping), with our diagnostics and logging on and Stable-Baselines3's logging off. From the end
of the warm-up on they take turns of .2 s, the others being stopped (SIGSTOP), until the first has finished; steps per
second are of CPU time. A machine whose speed drifts within seconds so drifts for all of them: where runs one after
the other gave ratios from 1.6 to 3.2 within one hour, these agree within a few per cent.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    algorithm: Literal["ppo", "a2c", "reinforce"] = "ppo"
    """which pair of scripts; for reinforce, which Stable-Baselines3 lacks, their speed alone"""
    pairs: int = 5
    """rounds"""
    total_timesteps: int = 204800
    """steps of each run, warm-up included"""
    warmup: int = 10240
    """steps not counted"""
    env_id: str = "CartPole-v1"
    """the environment"""
    extra: str = ""
    """further flags for the scripts, such as --extra=--compile"""
    diagnostics: bool = False
    """measure the cost of the collapse metrics instead: at every log entry against never, scaled to the default
    interval"""
    sb3: str = ""
    """(internal) run Stable-Baselines3 once and note its steps in this file"""


def measure_sb3(args):
    import torch
    from stable_baselines3 import A2C, PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Progress(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_start(self):
            temporary = Path(args.sb3 + ".tmp")  # for this process may be stopped at any moment
            temporary.write_text(str(self.num_timesteps))
            temporary.replace(args.sb3)

    torch.set_num_threads(1)
    env_kwargs = {"render_mode": None}
    if args.algorithm == "a2c":
        envs = make_vec_env(args.env_id, n_envs=8, seed=1, env_kwargs=env_kwargs)
        model = A2C("MlpPolicy", envs, n_steps=5, ent_coef=0.01, vf_coef=0.5, seed=1, device="cpu")
    else:
        model = PPO(
            "MlpPolicy",
            make_vec_env(args.env_id, n_envs=4, seed=1, env_kwargs=env_kwargs),
            learning_rate=lambda remaining: 2.5e-4 * remaining,
            n_steps=128,
            batch_size=128,
            n_epochs=4,
            clip_range_vf=0.2,
            ent_coef=0.01,
            vf_coef=0.25,
            seed=1,
            device="cpu",
        )
    model.learn(args.total_timesteps, callback=Progress())


def script_command(script, args, folder, *extra):
    command = [sys.executable, str(ROOT / script), "--env-id", args.env_id, "--run-dir", str(folder)]
    return [*command, "--total-timesteps", str(args.total_timesteps), *args.extra.split(), *extra]


def sb3_command(args, file):
    command = [sys.executable, __file__, "--sb3", str(file), "--algorithm", args.algorithm, "--env-id", args.env_id]
    return [*command, "--total-timesteps", str(args.total_timesteps)]


def steps_so_far(path):
    """Global step of a run, from its folder, or of Stable-Baselines3, from its file."""
    try:
        if path.is_dir():
            *_, last, _ = (path / "progress.csv").read_text().split("\n")  # up to the last whole line
            return int(last.partition(",")[0])
        return int(path.read_text())
    except (OSError, ValueError):  # not there yet, or the header only
        return 0


def cpu_seconds(process):
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def race(programs, args):
    """Steps per CPU second of each of `programs`, {path: command}, while they take turns."""
    options = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    processes = []
    try:
        for command in programs.values():
            processes.append(subprocess.Popen(command, **options))
            processes[-1].send_signal(signal.SIGSTOP)
        first, last = {}, {}
        while True:
            late = [path for path in programs if path not in first]
            for path, process in zip(programs, processes, strict=True):
                if late and path not in late:
                    continue
                process.send_signal(signal.SIGCONT)
                time.sleep(0.2)
                if process.poll() is not None:
                    if process.returncode or late:
                        sys.exit(f"error: {programs[path]} ended with status {process.returncode} before its time")
                    return [(last[p][0] - first[p][0]) / (last[p][1] - first[p][1]) for p in programs]
                process.send_signal(signal.SIGSTOP)
                last[path] = (steps_so_far(path), cpu_seconds(process))
                if path in late and last[path][0] >= args.warmup:
                    first[path] = last[path]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure_diagnostics(script, args):
    """Seconds that the metrics take per second of training without them, at the default interval, in each round."""
    interval, shares = {"ppo": 20, "a2c": 250, "reinforce": 20}[args.algorithm], []
    often_enough = 25 if args.algorithm == "a2c" else 1
    for _ in range(args.pairs):
        with tempfile.TemporaryDirectory() as folder:
            paths = {i: Path(folder) / str(i) for i in (often_enough, 0)}
            often, never = race(
                {
                    path: script_command(script, args, path, "--diagnostics-interval", str(i))
                    for i, path in paths.items()
                },
                args,
            )
        shares.append((never / often - 1) * often_enough / interval)
    print(
        f"{script}: collapse metrics take {100 * statistics.median(shares):.2f} % of training time at the default interval ",
        end="",
    )
    print(f"(median of {len(shares)}, {100 * min(shares):.2f} to {100 * max(shares):.2f})", flush=True)


def main():
    args = tyro.cli(Args)
    if args.sb3:
        return measure_sb3(args)
    scripts = [f"{args.algorithm}_baseline.py", f"{args.algorithm}_acpg.py"]
    if args.diagnostics:
        return [measure_diagnostics(script, args) for script in scripts]
    programs = scripts if args.algorithm == "reinforce" else [*scripts, "SB3"]
    rounds = []
    print("round  " + "  ".join(f"{name:>16}" for name in programs), flush=True)
    for i in range(args.pairs):
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: Path(folder) / name for name in programs}
            commands = {paths[script]: script_command(script, args, paths[script]) for script in scripts}
            if "SB3" in paths:
                commands[paths["SB3"]] = sb3_command(args, paths["SB3"])
            speeds = race(commands, args)
        rounds.append(speeds)
        print(f"{i + 1:5d}  " + "  ".join(f"{speed:12,.0f} SPS" for speed in speeds), flush=True)
    for j, script in enumerate(scripts):
        ratios = [speeds[j] / speeds[-1] for speeds in rounds]
        spread = f"median of {len(ratios)}, {min(ratios):.2f} to {max(ratios):.2f}"
        if "SB3" in programs:
            print(f"{script}: {statistics.median(ratios):.2f} times SB3 ({spread})")
        else:
            print(f"{script}: {statistics.median(speeds[j] for speeds in rounds):,.0f} SPS (median of {len(rounds)})")


if __name__ == "__main__":
    main()
