"""Training throughput against Stable-Baselines3, in alternation on one thread.

    pip install stable-baselines3==2.9.2
    python tests/benchmark_throughput.py --pairs 5
    python tests/benchmark_throughput.py --algorithm a2c
    python tests/benchmark_throughput.py --pairs 5 --extra=--compile --total-timesteps 409600 --warmup 204800
    python tests/benchmark_throughput.py --pairs 5 --diagnostics     # what the collapse metrics cost

Each round runs the scripts and Stable-Baselines3 one after the other as processes of their own, at the same
hyperparameters (the scripts' defaults, see docs/parity.md for the mapping), with our diagnostics and logging on and
Stable-Baselines3's logging off. Steps per second count from the end of the warm-up to the end of training. Ratios are
taken within a round, since the speed of a machine drifts.
"""

import csv
import os
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
    total_timesteps: int = 102400
    """steps of each run, warm-up included"""
    warmup: int = 10240
    """steps not counted"""
    env_id: str = "CartPole-v1"
    """the environment"""
    extra: str = ""
    """further flags for the scripts, such as --extra=--compile"""
    diagnostics: bool = False
    """measure the cost of the collapse metrics instead: at every log entry against never, scaled to the default interval"""
    sb3: bool = False
    """(internal) run Stable-Baselines3 once and print its steps per second"""


def measure_sb3(args):
    import torch
    from stable_baselines3 import A2C, PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Clock(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_start(self):
            if self.num_timesteps >= args.warmup and not hasattr(self, "start"):
                self.start, self.start_step = time.perf_counter(), self.num_timesteps

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
    clock = Clock()
    model.learn(args.total_timesteps, callback=clock)
    print((model.num_timesteps - clock.start_step) / (time.perf_counter() - clock.start))


def measure_script(script, args, folder, *extra):
    command = [sys.executable, str(ROOT / script), "--env-id", args.env_id, "--run-dir", str(folder / script)]
    command += ["--total-timesteps", str(args.total_timesteps), *args.extra.split(), *extra]
    subprocess.run(command, check=True, capture_output=True, env=environment())
    with open(folder / script / "progress.csv") as file:
        rows = [(int(row["global_step"]), float(row["charts/SPS"])) for row in csv.DictReader(file) if row["charts/SPS"]]
    (first, first_sps), (last, last_sps) = next(row for row in rows if row[0] >= args.warmup), rows[-1]
    return (last - first) / (last / last_sps - first / first_sps)


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def measure_diagnostics(script, args):
    """Seconds that the metrics take per second of training without them, at the default interval, in each round."""
    interval, shares = {"ppo": 20, "a2c": 250, "reinforce": 20}[args.algorithm], []
    often_enough = 25 if args.algorithm == "a2c" else 1
    for _ in range(args.pairs):
        with tempfile.TemporaryDirectory() as folder:
            often, never = (
                measure_script(script, args, Path(folder), "--diagnostics-interval", str(i)) for i in (often_enough, 0)
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
            speeds = [measure_script(script, args, Path(folder)) for script in scripts]
        if "SB3" in programs:
            command = [sys.executable, __file__, "--sb3", "--total-timesteps", str(args.total_timesteps)]
            command += ["--warmup", str(args.warmup), "--env-id", args.env_id, "--algorithm", args.algorithm]
            speeds.append(float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment()).stdout))
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
