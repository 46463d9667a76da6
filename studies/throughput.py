"""Training throughput against Stable-Baselines3 (SB3), in alternation on one thread, and where the time goes.

    pip install stable-baselines3==2.9.2
    python studies/throughput.py                    # PPO: both scripts, eager and compiled, and SB3
    python studies/throughput.py --algorithm a2c
    python studies/throughput.py --parts            # microseconds per step by part, and what compilation takes
    python studies/throughput.py --diagnostics      # what the collapse metrics cost
    python studies/throughput.py --env-id environments.minatar:MinAtar-Breakout-v0 --extra="--num-envs 16"

studies/tables.py makes README's table of what these write:

    python studies/throughput.py --csv results/throughput/ppo.csv
    python studies/throughput.py --algorithm a2c --csv results/throughput/a2c.csv
    python studies/throughput.py --env-id environments.minatar:MinAtar-Breakout-v0 --extra="--num-envs 16" \
        --total-timesteps 102400 --csv results/throughput/minatar.csv

Each round starts all programs at the same hyperparameters (the scripts' defaults, see docs/parity.md for the mapping)
and with the same networks (for images the scripts' convolutions, in separate feature extractors), with our diagnostics
and logging on and SB3's logging off. From the end of the warm-up on, which compilation is part
of, they take turns of .2 s, the others being stopped (SIGSTOP), until the first has finished; steps per second are of
CPU time, between two entries of the run's log, whose appearance is noticed within milliseconds. A machine whose speed
drifts within seconds so drifts for all of them: where runs one after the other gave ratios from 1.6 to 3.2 within one
hour, these agree within a few per cent. Numbers are medians over the rounds, with the least and the largest.
"""

import contextlib
import csv
import importlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluate import check_numbers  # noqa: E402

TURN, POLL = 0.2, 0.004  # seconds that a program runs for, and after which its log is looked at again
# parts of a script's time: each begins at this comment in its loop; the environments' time is part of none
SECTIONS = {"Rollout": "acting", "Advantages": "values and GAE", "Update": "update", "Logs": "the rest"}
PARTS = ("acting", "environments", "values and GAE", "update", "the rest")


@dataclass
class Args:
    algorithm: Literal["ppo", "a2c", "reinforce"] = "ppo"
    """which pair of scripts; reinforce, which SB3 lacks and which has no --compile, alone"""
    rounds: int = 5
    """rounds"""
    total_timesteps: int = 204800
    """steps of each run, warm-up included"""
    warmup: int = 10240
    """steps not counted"""
    env_id: str = "CartPole-v1"
    """the environment"""
    extra: str = ""
    """further flags for the scripts, such as --extra="--num-envs 16" """
    parts: bool = False
    """measure instead where the time goes, and how long compilation takes"""
    diagnostics: bool = False
    """measure instead what the collapse metrics cost, from a measurement at every log entry against none"""
    csv: Path | None = None
    """of the comparison: a file for each round's steps per CPU second"""
    sb3: str = ""
    """(internal) run SB3 once and note its steps in this file"""


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
    script = importlib.import_module(f"{args.algorithm}_baseline")
    own = tyro.cli(script.Args, args=args.extra.split())
    envs = make_vec_env(args.env_id, n_envs=own.num_envs, seed=1, env_kwargs={"render_mode": None})
    kwargs = {"ent_coef": own.ent_coef, "n_steps": own.num_steps, "gamma": own.gamma, "seed": 1, "device": "cpu"}
    if len(envs.observation_space.shape) == 3:
        kwargs["policy_kwargs"] = image_policy(script)
    if args.algorithm == "a2c":  # SB3's value losses are not halved
        model = A2C("MlpPolicy", envs, learning_rate=own.learning_rate, vf_coef=own.vf_coef / 2, **kwargs)
    else:
        kwargs |= {"learning_rate": lambda remaining: own.learning_rate * remaining, "n_epochs": own.update_epochs}
        kwargs |= {"batch_size": own.num_envs * own.num_steps // own.num_minibatches}
        model = PPO("MlpPolicy", envs, clip_range_vf=own.clip_coef, vf_coef=own.vf_coef / 2, **kwargs)
    model.learn(args.total_timesteps, callback=Progress())


def image_policy(script):
    """policy_kwargs that give SB3 the script's layers: its trunk but for the last hidden layer, which is net_arch's."""
    import torch.nn as nn
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

    class Trunk(BaseFeaturesExtractor):
        def __init__(self, space):
            *layers, last = script.trunk(space, 64, activation=None)  # which only vectors have there
            super().__init__(space, last.in_features)
            self.layers = nn.Sequential(*layers)

        def forward(self, obs):
            return self.layers(obs.permute(0, 3, 1, 2))

    arch = {"pi": [64], "vf": [64]}
    return {"features_extractor_class": Trunk, "share_features_extractor": False, "net_arch": arch}


def script_command(script, args, folder, *extra):
    command = [sys.executable, str(ROOT / script), "--env-id", args.env_id, "--run-dir", str(folder), "--no-cuda"]
    return [*command, "--total-timesteps", str(args.total_timesteps), *args.extra.split(), *extra]


def sb3_command(args, file):
    command = [sys.executable, __file__, "--sb3", str(file), "--algorithm", args.algorithm, "--env-id", args.env_id]
    return [*command, "--total-timesteps", str(args.total_timesteps), f"--extra={args.extra}"]


def versions(args):
    """{name: (script, flags)} of what there is to measure: both scripts, eager and, if they can be, compiled."""
    ways = ((), ("--compile",)) if args.algorithm != "reinforce" else ((),)
    scripts = [f"{args.algorithm}_{arm}.py" for arm in ("baseline", "acpg")]
    return {" ".join([script, *flags]): (script, flags) for flags in ways for script in scripts}


# The race


def progress(path):
    """(when last written, global step) of a run, from its folder, or of SB3, from its file; zeros before the first."""
    file = path / "progress.csv" if path.is_dir() else path
    try:
        written, text = file.stat().st_mtime_ns, file.read_text()
        last = text.split("\n")[-2].partition(",")[0] if path.is_dir() else text  # up to the last whole line
        return written, int(last)
    except (OSError, ValueError, IndexError):  # not there yet, or the header only
        return 0, 0


def cpu_seconds(process):
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def send(process, number):
    """To the process and all that it has started, such as compilers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def deferred():
    """SIGINT and SIGTERM wait for the end of the block, so that none comes between a start and the note of it."""
    came = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def race(programs, args):
    """Steps per CPU second of each of `programs`, {path: command}, while they take turns."""
    options = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "start_new_session": True}
    processes = {}
    try:
        for path, command in programs.items():
            with deferred():
                processes[path] = subprocess.Popen(command, **options)
            send(processes[path], signal.SIGSTOP)
        first, last, seen = {}, {}, dict.fromkeys(programs, (0, 0))
        while True:
            late = [path for path in programs if path not in first]
            for path in late or programs:
                process, end = processes[path], time.monotonic() + TURN
                send(process, signal.SIGCONT)
                while time.monotonic() < end and process.poll() is None:
                    time.sleep(POLL)
                    if (now := progress(path)) != seen[path]:
                        seen[path] = now
                        if now[1] >= args.warmup:
                            last[path] = (now[1], cpu_seconds(process))
                            first.setdefault(path, last[path])
                if process.poll() is not None:
                    if process.returncode or any(first.get(p) == last.get(p) for p in programs):
                        sys.exit(f"error: {programs[path]} ended with status {process.returncode} before its time")
                    return [(last[p][0] - first[p][0]) / (last[p][1] - first[p][1]) for p in programs]
                send(process, signal.SIGSTOP)
    finally:
        for process in processes.values():
            send(process, signal.SIGKILL)
            process.wait()


def spread(values, form):
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def measure_throughput(args):
    scripts, rounds = versions(args), []
    names = [*scripts] if args.algorithm == "reinforce" else [*scripts, "SB3"]
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
    print("steps per CPU second: " + ", ".join(names), flush=True)
    for i in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / str(k) for k in range(len(names))]
            commands = {p: script_command(s, args, p, *f) for p, (s, f) in zip(paths, scripts.values(), strict=False)}
            if "SB3" in names:
                commands[paths[-1]] = sb3_command(args, paths[-1])
            rounds.append(race(commands, args))
        print(f"round {i + 1}: " + ", ".join(f"{speed:,.0f}" for speed in rounds[-1]), flush=True)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["round", *names])
            writer.writerows([i + 1, *(f"{speed:.1f}" for speed in rounds[i])] for i in range(args.rounds))
    against = " | times SB3" if "SB3" in names else ""
    print(f"\n| program | steps per CPU second{against} |\n|---|---|{'---|' if against else ''}")
    for k, name in enumerate(names):
        cells = [f"`{name}`" if name in scripts else name, spread([speeds[k] for speeds in rounds], ",.0f")]
        cells += [spread([speeds[k] / speeds[-1] for speeds in rounds], ".2f")] if against else []
        print(f"| {' | '.join(cells)} |")


def measure_diagnostics(script, args):
    """Print the seconds that the metrics take per second of training without them, at the default intervals."""
    defaults, shares = importlib.import_module(script.removesuffix(".py")).Args(), []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            paths = {Path(folder) / str(i): str(i) for i in (defaults.log_interval, 0)}
            often, never = race(
                {p: script_command(script, args, p, "--diagnostics-interval", i) for p, i in paths.items()}, args
            )
        shares.append(100 * (never / often - 1) * defaults.log_interval / defaults.diagnostics_interval)
    print(f"{script}: collapse metrics take {spread(shares, '.2f')} % of training time, at every", end=" ")
    print(f"{defaults.diagnostics_interval} updates", flush=True)


# The parts


class Clock:
    """CPU seconds by part. Calling it ends the part that was running and begins another."""

    def __init__(self):
        self.seconds, self.part, self.then = defaultdict(float), "the rest", time.process_time()
        self.update, self.first_update = 0.0, None  # wall-clock time, since compilers are other processes

    def __call__(self, part):
        now, before = time.process_time(), self.part
        self.seconds[before] += now - self.then
        if part == "update":
            self.update = time.monotonic()
        elif before == "update" and self.first_update is None:
            self.first_update = time.monotonic() - self.update
        self.part, self.then = part, now
        return before


def instrument(source):
    """(definitions, main block) of a script's source, with a call of `clock` in place of each section's comment."""
    for comment, part in SECTIONS.items():
        source, times = re.subn(rf"^( +)# {comment}\b.*$", rf'\1clock("{part}")', source, flags=re.MULTILINE)
        if times != 1 and not (comment == "Advantages" and times == 0):  # REINFORCE has none
            raise ValueError(f"the comment '# {comment}' occurs {times} times in the script's loop, not once")
    definitions, main, block = source.partition('\nif __name__ == "__main__":')
    return definitions, "\n" * definitions.count("\n") + main + block


def run_instrumented(warmup, script, *argv):
    """Run a script as `python script ...` would; parts.json in its folder has what each part took after the warm-up."""
    path, clock, base = ROOT / script, Clock(), None
    module = types.ModuleType("__main__")
    module.__file__, module.clock, sys.argv = str(path), clock, [str(path), *argv]
    sys.modules["__main__"] = module  # where tyro looks for the source
    definitions, main = instrument(path.read_text())
    exec(compile(definitions, str(path), "exec"), module.__dict__)
    step, log = module.Envs.step, module.Run.log

    def timed_step(envs, actions):
        before = clock("environments")
        result = step(envs, actions)
        clock(before)
        return result

    def log_and_write(run, tags, global_step):
        nonlocal base
        before = clock("the rest")
        log(run, tags, global_step)
        clock("measuring")
        record = {"first_update": clock.first_update}
        if base is not None:
            record |= {"steps": global_step - base, "seconds": clock.seconds}
        elif global_step >= int(warmup):
            base = global_step
            clock.seconds.clear()
        (run.path / "parts.json.tmp").write_text(json.dumps(record))
        (run.path / "parts.json.tmp").replace(run.path / "parts.json")
        clock(before)

    module.Envs.step, module.Run.log = timed_step, log_and_write
    exec(compile(main, str(path), "exec"), module.__dict__)


def instrumented_command(script, args, folder, warmup, *flags):
    interpreter, path, *rest = script_command(script, args, folder, *flags)
    return [interpreter, __file__, "--instrumented", str(warmup), Path(path).name, *rest]


def measure_parts(args):
    scripts, rounds = versions(args), []
    for i in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / str(k) for k in range(len(scripts))]
            race(
                {
                    p: instrumented_command(s, args, p, args.warmup, *f)
                    for p, (s, f) in zip(paths, scripts.values(), strict=True)
                },
                args,
            )
            records = [json.loads((path / "parts.json").read_text()) for path in paths]
        rounds.append([{p: 1e6 * r["seconds"].get(p, 0.0) / r["steps"] for p in PARTS} for r in records])
        print(f"round {i + 1}: " + ", ".join(f"{sum(own.values()):.1f}" for own in rounds[-1]), flush=True)
    names = " | ".join(f"`{name}`" for name in scripts)
    print(f"\n| microseconds per environment step | {names} |\n|---|{'---|' * len(scripts)}")
    for part in (*PARTS, "all"):
        values = [[sum(r[k].values()) if part == "all" else r[k][part] for r in rounds] for k in range(len(scripts))]
        print(f"| {part} | {' | '.join(spread(own, '.1f') for own in values)} |")
    print("\n| seconds of the first update | empty cache | warm cache |\n|---|---|---|")
    for name, (script, flags) in scripts.items():
        with tempfile.TemporaryDirectory() as folder:
            seconds = []
            for path in (Path(folder) / "first", Path(folder) / "second"):
                command = instrumented_command(script, args, path, 0, *flags)
                command[command.index("--total-timesteps") + 1] = "4096"
                env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
                seconds.append(json.loads((path / "parts.json").read_text())["first_update"])
        print(f"| `{name}` | {seconds[0]:.2f} | {seconds[1]:.2f} |", flush=True)


def main():
    if sys.argv[1:2] == ["--instrumented"]:  # WARMUP SCRIPT FLAGS...
        return run_instrumented(*sys.argv[2:])
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    check_numbers(args, rounds=(1, 10**4), total_timesteps=(1, 10**9), warmup=(1, 10**9))
    if args.warmup >= args.total_timesteps:
        sys.exit(f"error: --warmup {args.warmup} must be below --total-timesteps {args.total_timesteps}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `race` ends its programs, which may be stopped
    if args.sb3:
        return measure_sb3(args)
    if args.parts:
        return measure_parts(args)
    if args.diagnostics:
        return [measure_diagnostics(f"{args.algorithm}_{arm}.py", args) for arm in ("baseline", "acpg")]
    measure_throughput(args)


if __name__ == "__main__":
    main()
