"""Parity of the baselines with Stable-Baselines3 at equal hyperparameters: the runs behind docs/parity.md.

    pip install stable-baselines3==2.9.2 sb3-contrib==2.9.2 scipy==1.17.1
    python studies/parity.py                 # all comparisons
    python studies/parity.py --algos trpo    # those of TRPO, with sb3-contrib's

Runs land in runs/parity/ and are kept: a run finished by the same script is not repeated. What they say goes to
results/parity/runs.csv, a row a run, and parity.csv, of which studies/tables.py makes a table. docs/parity.md has the
mapping of the hyperparameters and the margins, which were fixed before the runs.
"""

import csv
import hashlib
import importlib
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluate import check_numbers  # noqa: E402

RUNS = ROOT / "runs" / "parity"
RESULTS = ROOT / "results" / "parity"
MARGINS = {"CartPole-v1": {"auc": 25, "final": 25}, "LunarLander-v3": {"auc": 40, "final": 60}}


@dataclass
class Comparison:
    name: str
    """of the table's row and the runs' folders"""
    algorithm: str
    env_id: str
    rollouts: int
    num_envs: int
    num_steps: int
    learning_rate: float
    flags: str
    """further flags of our script"""
    sb3: dict
    """what they correspond to in Stable-Baselines3"""
    seeds: int = 20
    """how many"""
    anneal: bool = True
    first: int = 201
    """the first of the seeds: none below had a part in choosing anything"""

    @property
    def steps(self):
        return self.rollouts * self.num_envs * self.num_steps

    @property
    def log_interval(self):
        """Rollouts per window of the learning curve, of which there are at most 200."""
        return math.ceil(self.rollouts / 200)

    def window_ends(self):
        """The last step of each window; the last window may be a shorter one."""
        ends = np.append(np.arange(self.log_interval, self.rollouts, self.log_interval), self.rollouts)
        return ends * self.num_envs * self.num_steps


PPO = {"n_epochs": 4, "vf_coef": 0.25}
ZOO = "--no-clip-vloss --head-gain 0.01"  # gain: theirs
ZOO_CARTPOLE = f"{ZOO} --num-minibatches 1 --update-epochs 20 --gamma 0.98 --gae-lambda 0.8 --ent-coef 0"
ZOO_LUNAR = f"{ZOO} --num-minibatches 32 --gamma 0.999 --gae-lambda 0.98"
# the critic's rate is constant; our gradients are not clipped, as theirs are not
TRPO = {"batch_size": 128, "cg_max_steps": 10}
COMPARISONS = [
    Comparison(
        *("PPO", "ppo", "CartPole-v1", 390, 8, 32, 1e-3, ZOO_CARTPOLE),
        PPO | {"n_epochs": 20, "batch_size": 256, "gamma": 0.98, "gae_lambda": 0.8, "ent_coef": 0.0},
        seeds=40,
    ),
    Comparison(
        *("PPO", "ppo", "LunarLander-v3", 146, 16, 128, 3e-4, ZOO_LUNAR),
        PPO | {"batch_size": 64, "gamma": 0.999, "gae_lambda": 0.98, "ent_coef": 0.01},
    ),
    Comparison(
        *("A2C", "a2c", "CartPole-v1", 5000, 8, 5, 7e-4, ""),
        {"vf_coef": 0.5, "ent_coef": 0.01},
        seeds=30,
        anneal=False,
    ),
    Comparison(
        *("A2C", "a2c", "LunarLander-v3", 5000, 8, 5, 8.3e-4, "--gamma 0.995 --ent-coef 1e-5"),
        {"vf_coef": 0.5, "ent_coef": 1e-5, "gamma": 0.995},
    ),
    Comparison(
        *("TRPO", "trpo", "CartPole-v1", 98, 4, 512, 1e-3, "--max-grad-norm 1e9", TRPO),
        seeds=10,
        anneal=False,
    ),
    Comparison(
        *("TRPO", "trpo", "LunarLander-v3", 98, 4, 512, 1e-3, "--max-grad-norm 1e9", TRPO),
        anneal=False,
    ),
]


@dataclass
class Args:
    num_seeds: int | None = None
    """so many seeds in every comparison; default: the protocol's"""
    algos: list[Literal["ppo", "a2c", "trpo"]] = field(default_factory=lambda: ["ppo", "a2c", "trpo"])
    """algorithms, whose comparisons are made"""
    jobs: int = 2
    """runs at a time"""
    sb3: str = ""
    """(internal) run Stable-Baselines3 once: COMPARISON:SEED:FILE"""


def run_sb3(comparison, seed, path):
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Episodes(BaseCallback):
        episodes = []

        def _on_step(self):
            self.episodes += [
                (self.num_timesteps, info["episode"]["r"]) for info in self.locals["infos"] if "episode" in info
            ]
            return True

    rate = comparison.learning_rate
    torch.set_num_threads(1)
    library = importlib.import_module("sb3_contrib" if comparison.algorithm == "trpo" else "stable_baselines3")
    model = getattr(library, comparison.algorithm.upper())(
        "MlpPolicy",
        make_vec_env(comparison.env_id, n_envs=comparison.num_envs, seed=seed, env_kwargs={"render_mode": None}),
        learning_rate=(lambda remaining: rate * (remaining + 1 / comparison.rollouts)) if comparison.anneal else rate,
        n_steps=comparison.num_steps,
        seed=seed,
        device="cpu",
        **comparison.sb3,
    )
    callback = Episodes()
    model.learn(comparison.steps, callback=callback)
    Path(path).write_text(json.dumps([(int(step), float(value)) for step, value in callback.episodes]))


def run(command):
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr[-1000:]}")


def folder(program, comparison, seed):
    name = "".join(c if c.isalnum() else "_" for c in comparison.name)
    return RUNS / f"{program}__{name}__{comparison.env_id}__{comparison.steps}__{comparison.learning_rate}__{seed}"


def curve_sb3(comparison, seed):
    """Mean return of the episodes that ended in each window of training, in which one did; the windows are our rows."""
    path = folder("sb3", comparison, seed)
    if not path.exists():
        temporary = path.with_name(f"{path.name}.tmp")
        run([sys.executable, __file__, "--sb3", f"{COMPARISONS.index(comparison)}:{seed}:{temporary}"])
        temporary.replace(path)
    steps, values = np.array(json.loads(path.read_text())).T
    ends = comparison.window_ends()
    window = np.searchsorted(ends, steps)
    return np.array([values[window == i].mean() if (window == i).any() else np.nan for i in range(len(ends))])


def curve_ours(comparison, seed):
    path = folder(f"{comparison.algorithm}_baseline", comparison, seed)
    try:
        record = json.loads((path / "run.json").read_text())
        digest = hashlib.sha256((ROOT / f"{comparison.algorithm}_baseline.py").read_bytes()).hexdigest()
        finished = record["status"] == "finished" and record["script_sha256"] == digest
    except OSError:
        finished = False
    if not finished:
        command = [sys.executable, str(ROOT / f"{comparison.algorithm}_baseline.py"), "--env-id", comparison.env_id]
        command += ["--seed", str(seed), "--learning-rate", str(comparison.learning_rate), "--run-dir", str(path)]
        command += ["--total-timesteps", str(comparison.steps), "--num-envs", str(comparison.num_envs)]
        command += ["--log-interval", str(comparison.log_interval)]
        command += ["--num-steps", str(comparison.num_steps), "--anneal-lr" if comparison.anneal else "--no-anneal-lr"]
        run([*command, *comparison.flags.split()])
    with open(path / "progress.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["global_step"] != "0"]  # which is the untrained network's
    assert [int(row["global_step"]) for row in rows] == comparison.window_ends().tolist()
    values = [row["charts/episodic_return"] for row in rows]
    return np.array([float(value) if value else np.nan for value in values])


def main():
    args = tyro.cli(Args)
    check_numbers(args, num_seeds=(2, 10**4), jobs=(1, 10**4))
    if args.sb3:
        index, seed, path = args.sb3.split(":", 2)
        return run_sb3(COMPARISONS[int(index)], int(seed), path)
    from scipy import stats

    RUNS.mkdir(parents=True, exist_ok=True)
    chosen = [comparison for comparison in COMPARISONS if comparison.algorithm in args.algos]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [
            [
                [
                    pool.submit(curve, comparison, comparison.first + i)
                    for i in range(comparison.seeds if args.num_seeds is None else args.num_seeds)
                ]
                for curve in (curve_ours, curve_sb3)
            ]
            for comparison in chosen
        ]
    rows, table = [], []
    for comparison, curves in zip(chosen, futures, strict=True):
        curves = [[future.result() for future in row] for row in curves]
        assert {len(curve) for row in curves for curve in row} == {len(curves[0][0])}  # both in the same windows
        own = {"comparison": comparison.name, "env": comparison.env_id, "steps": comparison.steps}
        own |= {"learning_rate": comparison.learning_rate}
        scores = {}
        for program, row in zip(("ours", "SB3"), curves, strict=True):
            for i, curve in enumerate(row):
                final = curve[-round(len(curve) / 10) :]
                rows.append(own | {"program": program, "seed": comparison.first + i})
                rows[-1] |= {"auc": np.nanmean(curve), "final": np.nanmean(final)}
            scores[program] = rows[-len(row) :]
        for measure in ("auc", "final"):
            ours, theirs = (np.array([row[measure] for row in scores[program]]) for program in ("ours", "SB3"))
            interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
            margin = MARGINS[comparison.env_id][measure]
            inside = max(abs(interval.low), abs(interval.high)) < margin
            verdict = "equivalent" if inside else "not decided" if interval.low < 0 < interval.high else "different"
            values = {"seeds": len(ours), "measure": measure, "ours": ours.mean(), "ours_sd": ours.std(ddof=1)}
            values |= {"sb3": theirs.mean(), "sb3_sd": theirs.std(ddof=1), "difference": ours.mean() - theirs.mean()}
            table.append(own | values | {"low": interval.low, "high": interval.high, "margin": margin})
            table[-1] |= {"verdict": verdict}
            print(f"{comparison.name}, {comparison.env_id}, {measure}: {verdict}", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    save_rows(RESULTS / "runs.csv", rows)
    save_rows(RESULTS / "parity.csv", table)


def save_rows(path, rows):
    """A CSV of these rows, and of those there of other comparisons, in the protocol's order."""
    order = {(comparison.name, comparison.env_id): i for i, comparison in enumerate(COMPARISONS)}
    place = lambda row: order.get((row["comparison"], row["env"]), -1)  # noqa: E731
    if path.exists():
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if place(row) not in {-1, *map(place, rows)}] + rows
    rows = sorted(rows, key=place)
    text = lambda value: f"{value:.6g}" if isinstance(value, float) else value  # noqa: E731
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: text(value) for key, value in row.items()} for row in rows)


if __name__ == "__main__":
    main()
