"""The runs behind docs/learning.md: how the defaults were chosen, and what the scripts learn with them.

    python studies/learning.py tune-ppo          # seeds 101..105: defaults of ppo_acpg.py, rates on LunarLander-v3
    python studies/learning.py tune-a2c          # seeds 101..105: learning rates on LunarLander-v3
    python studies/learning.py tune-reinforce    # seeds 101..105: estimator and learning rates
    python studies/learning.py report-ppo        # seeds 1..10: CartPole-v1 and LunarLander-v3
    python studies/learning.py report-a2c
    python studies/learning.py report-reinforce
    python studies/learning.py report-trpo       # nothing of TRPO was tuned
    python studies/learning.py cartpole          # seeds 1..5: all six scripts on CartPole-v1
    python studies/learning.py tune-minatar      # seeds 101..102: learning rates on MinAtar's Breakout
    python studies/learning.py minatar           # seeds 1..2: PPO on three games of MinAtar
    python studies/learning.py large-actions     # seeds 1..3: PPO with 51 and 25 actions

Runs land in runs/learning/ and are kept: a run that finished with the same arguments and script is not repeated.
Prints markdown; --figure draws the curves.
"""

import csv
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from evaluate import check_numbers  # noqa: E402

RUNS = ROOT / "runs" / "learning"
RATES = ("2.5e-4", "8e-4", "2e-3")
TANH = "--feature-constraint tanh --etf-scale 1 --feature-gain 0.1"
BALL = "--feature-constraint ball --etf-scale 5 --feature-gain 0.01"
LUNAR = "--env-id LunarLander-v3 --total-timesteps 500000"
TUNED = [("baseline", "ppo_baseline", ""), ("ACPG tanh", "ppo_acpg", TANH), ("ACPG ball", "ppo_acpg", BALL)]
CARTPOLE = "--env-id CartPole-v1 --total-timesteps 500000"
ARMS = [("baseline", "baseline"), ("ACPG", "acpg")]
# the best of the tuning tables: for LunarLander-v3, by algorithm and arm
BEST = {"ppo_baseline": "2e-3", "ppo_acpg": "2e-3", "a2c_baseline": "7e-4", "a2c_acpg": "7e-4"}
BEST |= {"reinforce_baseline": "1e-2", "reinforce_acpg": "1e-2"}
A2C_RATES = ("3e-4", "7e-4", "2e-3")
REINFORCE_RATES = ("2e-3", "5e-3", "1e-2")
ESTIMATORS = [
    ("normalised returns", "--norm-returns --no-running-baseline"),
    ("running baseline", "--no-norm-returns --running-baseline"),
]
STUDIES = {
    "tune-ppo": [
        (f"LunarLander-v3, lr {lr}, {n}", s, f"{LUNAR} --learning-rate {lr} {f}") for lr in RATES for n, s, f in TUNED
    ]
    + [(f"CartPole-v1, {n}", s, f"{CARTPOLE} {f}") for n, s, f in TUNED]
    + [(f"Acrobot-v1, {n}", s, f"--env-id Acrobot-v1 --total-timesteps 300000 {f}") for n, s, f in TUNED],
    "tune-a2c": [
        (f"LunarLander-v3, lr {lr}, {n}", f"a2c_{s}", f"{LUNAR} --learning-rate {lr}")
        for lr in A2C_RATES
        for n, s in ARMS
    ],
    "tune-reinforce": [
        (f"{env_id}, {e}, lr {lr}, {n}", f"reinforce_{s}", f"{where} {f} --learning-rate {lr}")
        for env_id, where, estimators in (
            ("CartPole-v1", CARTPOLE, ESTIMATORS),
            ("LunarLander-v3", LUNAR, ESTIMATORS[1:]),
        )
        for e, f in estimators
        for lr in REINFORCE_RATES
        for n, s in ARMS
    ],
} | {
    f"report-{a}": [(f"CartPole-v1, {n}", f"{a}_{s}", "--env-id CartPole-v1") for n, s in ARMS]
    + [
        (f"LunarLander-v3, {n}", f"{a}_{s}", f"--env-id LunarLander-v3 --learning-rate {BEST.get(f'{a}_{s}')}")
        for n, s in ARMS
    ]
    for a in ("ppo", "a2c", "reinforce")
}
STUDIES["report-trpo"] = [
    (f"{env}, {n}", f"trpo_{s}", f"--env-id {env} --total-timesteps {steps}")
    for env, steps in (("CartPole-v1", 300_000), ("LunarLander-v3", 500_000))
    for n, s in ARMS
]
STUDIES["cartpole"] = [
    (name.replace("CartPole-v1", a.upper()), *run)
    for a in ("ppo", "a2c", "reinforce")
    for name, *run in STUDIES[f"report-{a}"][:2]
]
# the larger rate won in both arms: docs/learning.md
MINATAR = "--env-id environments.minatar:MinAtar-{}-v0 --num-envs 16 --total-timesteps 500000 --learning-rate {}"
STUDIES["tune-minatar"] = [
    (f"Breakout, lr {lr}, {n}", f"ppo_{s}", MINATAR.format("Breakout", lr))
    for lr in ("8e-4", "2.5e-3")
    for n, s in ARMS
]
STUDIES["minatar"] = [
    (f"{game}, {n}", f"ppo_{s}", MINATAR.format(game, "2.5e-3"))
    for game in ("Breakout", "Asterix", "SpaceInvaders")
    for n, s in ARMS
]
# rates were not tuned here: 2.5e-3 is near the best of LunarLander-v3's. Pendulum51 is hardly learned at the default
# gamma and value clipping; its flags were chosen on seed 101 of ACPG, none of the baseline.
STUDIES["large-actions"] = [
    (f"{env}, {n}", script, f"--env-id environments.discretized:{env}-v0 {flags} --learning-rate 2.5e-3 {own}".strip())
    for env, flags in (
        ("Pendulum51", "--total-timesteps 200000 --no-clip-vloss --gamma 0.9"),
        ("LunarLander25", "--total-timesteps 300000"),
    )
    for n, script, own in (
        ("baseline", "ppo_baseline", ""),
        ("ACPG", "ppo_acpg", ""),
        ("random rows", "ppo_acpg", "--action-layer random"),
    )
]
COLLAPSE = (
    "nc1",
    "variability_quotient",
    "cdnv",
    "alignment",
    "means_equinorm",
    "means_max_angle",
    "etf_error",
    "self_duality",
)
COLLAPSE += ("mean_weight_cosine", "classes_present", "policy_variance", "feature_norm")


@dataclass
class Args:
    study: Annotated[Literal[tuple(STUDIES)], tyro.conf.Positional]
    """which runs"""
    seeds: list[int] | None = None
    """their seeds; default: the study's own"""
    jobs: int = 2
    """runs at a time"""
    figure: Path | None = None
    """draw the learning curves to this file"""


def run_once(script, flags, seed):
    folder = RUNS / "__".join([script, flags.replace("--", "").replace(" ", "_"), str(seed)])
    try:
        record = json.loads((folder / "run.json").read_text())
    except OSError:
        record = {}
    digest = hashlib.sha256((ROOT / f"{script}.py").read_bytes()).hexdigest()
    if record.get("status") != "finished" or record["script_sha256"] != digest:
        command = [
            sys.executable,
            str(ROOT / f"{script}.py"),
            *flags.split(),
            "--seed",
            str(seed),
            "--run-dir",
            str(folder),
        ]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        record = json.loads((folder / "run.json").read_text())
    with open(folder / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    record["rows"] = rows
    record["auc"] = float(
        np.mean([float(row["charts/episodic_return"]) for row in rows if row["charts/episodic_return"]])
    )
    print(f"{script} {flags} seed {seed}: {record['final_return']:.1f}", file=sys.stderr, flush=True)
    return record


def mean_error(values):
    """Mean and standard error over seeds, of the finite values."""
    values = np.array(values, dtype=float)
    values = values[np.isfinite(values)]
    if not len(values):
        return "undefined"
    return (
        f"{values.mean():.3g} +- {values.std(ddof=1) / len(values) ** 0.5:.2g}"
        if len(values) > 1
        else f"{values[0]:.3g}"
    )


def collapse_tables(studies):
    """A table for each arm: untrained, trained, and the trained network's null."""
    for name, records in studies:
        print(f"\n{name}:\n\n| metric | untrained | trained | trained, labels permuted |\n|---|---|---|---|")
        for metric in COLLAPSE:
            columns = [
                collapse(records, *at, metric) for at in (("collapse", 0), ("collapse", -1), ("collapse_null", -1))
            ]
            print(f"| `{metric}` | {' | '.join(columns)} |")


def collapse(records, group, row, metric):
    """Mean and standard error of a metric at the first (0) or the last (-1) of each record's measurements."""
    values = [record["rows"][row].get(f"{group}/{metric}") for record in records]
    return "" if None in values else mean_error([value or "nan" for value in values])


def collapse_table(studies):
    """One table for all arms, of the trained networks with their nulls."""
    metrics = ("nc1", "variability_quotient", "alignment", "etf_error", "mean_weight_cosine")
    print("\n| arm | classes | " + " | ".join(f"`{m}` | null" for m in metrics) + " |")
    print("|---" * (2 + 2 * len(metrics)) + "|")
    for name, records in studies:
        cells = [collapse(records, group, -1, m) for m in metrics for group in ("collapse", "collapse_null")]
        print(f"| {name} | {collapse(records, 'collapse', -1, 'classes_present')} | {' | '.join(cells)} |")


def draw(studies, path):
    """The learning curve of each run, as running means over a twentieth of it; a panel a task, a colour an arm."""
    from plots import COLOURS, plt

    tasks, arms = (list(dict.fromkeys(name.rpartition(", ")[part] for name, _ in studies)) for part in (0, 2))
    colours = {"baseline": COLOURS["baseline"], "ACPG": COLOURS["acpg"], "random rows": COLOURS["random"]}
    figure, axes = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3), layout="constrained", squeeze=False)
    for name, records in studies:
        task, _, arm = name.rpartition(", ")
        axis = axes[0, tasks.index(task)]
        for number, record in enumerate(records):
            rows = [row for row in record["rows"] if row["charts/episodic_return"]]
            steps, returns = ([float(row[key]) for row in rows] for key in ("global_step", "charts/episodic_return"))
            width = math.ceil(len(rows) / 20)  # of the running mean
            steps, returns = (np.convolve(x, np.full(width, 1 / width), "valid") for x in (steps, returns))
            style = {"color": colours.get(arm, f"C{arms.index(arm)}"), "label": None if number else arm, "lw": 1}
            axis.plot(steps / 1000, returns, **style)
        axis.set(title=task, xlabel="thousand environment steps")
    axes[0, 0].set_ylabel("episodic return")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)


def main():
    args = tyro.cli(Args)
    check_numbers(args, seeds=(0, 2**32 - 1), jobs=(1, 10**4))
    if args.figure and not args.figure.parent.is_dir():
        sys.exit(f"error: --figure: there is no folder {args.figure.parent}")
    own = {
        "tune-minatar": range(101, 103),
        "minatar": range(1, 3),
        "large-actions": range(1, 4),
        "cartpole": range(1, 6),
    }
    seeds = args.seeds or own.get(args.study, range(101, 106) if args.study.startswith("tune") else range(1, 11))
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [
            [pool.submit(run_once, script, flags, seed) for seed in seeds] for _, script, flags in STUDIES[args.study]
        ]
    studies = [
        (name, [future.result() for future in runs])
        for (name, *_), runs in zip(STUDIES[args.study], futures, strict=True)
    ]
    print("| arm | final return, median | each seed | mean +- standard error | area under the curve |")
    print("|---|---|---|---|---|")
    for name, records in studies:
        finals, areas = [[record[key] for record in records] for key in ("final_return", "auc")]
        each = " ".join(f"{final:.0f}" for final in finals)
        print(f"| {name} | {statistics.median(finals):.1f} | {each} | {mean_error(finals)} | {mean_error(areas)} |")
    if args.study.startswith("report"):
        collapse_tables(studies)
    elif args.study in ("minatar", "large-actions"):
        collapse_table(studies)
    if args.figure:
        draw(studies, args.figure)


if __name__ == "__main__":
    main()
