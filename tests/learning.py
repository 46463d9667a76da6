"""The runs behind docs/learning.md: how the defaults were chosen, and what both scripts learn with them.

    python tests/learning.py tune        # seeds 101..105: defaults of ppo_acpg.py, learning rates on LunarLander-v3
    python tests/learning.py report      # seeds 1..10: CartPole-v1 and LunarLander-v3

Runs land in runs/learning/ and are kept: a run that finished with the same arguments is not repeated. Prints markdown.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "learning"
RATES = ("2.5e-4", "8e-4", "2e-3")
TANH = "--feature-constraint tanh --etf-scale 1 --feature-gain 0.1"
BALL = "--feature-constraint ball --etf-scale 5 --feature-gain 0.01"
LUNAR = "--env-id LunarLander-v3 --total-timesteps 500000"
STUDIES = {
    "tune": [
        *[
            (f"LunarLander lr {lr} {name}", script, f"{LUNAR} --learning-rate {lr} {flags}")
            for lr in RATES
            for name, script, flags in [
                ("baseline", "ppo_baseline", ""),
                ("tanh", "ppo_acpg", TANH),
                ("ball", "ppo_acpg", BALL),
            ]
        ],
        *[
            (f"{env} {name}", script, f"--env-id {env} --total-timesteps {steps} {flags}")
            for env, steps in [("CartPole-v1", 500000), ("Acrobot-v1", 300000)]
            for name, script, flags in [
                ("baseline", "ppo_baseline", ""),
                ("tanh", "ppo_acpg", TANH),
                ("ball", "ppo_acpg", BALL),
            ]
        ],
    ],
}


@dataclass
class Args:
    study: Annotated[Literal["tune", "report"], tyro.conf.Positional]
    """which runs"""
    seeds: list[int] = field(default_factory=list)
    """their seeds; empty means the study's own"""
    jobs: int = 2
    """runs at a time"""


def run_once(script, flags, seed):
    folder = RUNS / "__".join([script, flags.replace("--", "").replace(" ", "_"), str(seed)])
    try:
        record = json.loads((folder / "run.json").read_text())
    except OSError:
        record = {}
    if record.get("status") != "finished":
        command = [sys.executable, str(ROOT / f"{script}.py"), *flags.split(), "--seed", str(seed), "--run-dir", str(folder)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        record = json.loads((folder / "run.json").read_text())
    with open(folder / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    record["rows"] = rows
    record["auc"] = float(np.mean([float(row["charts/episodic_return"]) for row in rows if row["charts/episodic_return"]]))
    print(f"{script} {flags} seed {seed}: {record['final_return']:.1f}", file=sys.stderr, flush=True)
    return record


def main():
    args = tyro.cli(Args)
    seeds = args.seeds or {"tune": range(101, 106), "report": range(1, 11)}[args.study]
    study = STUDIES[args.study]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [[pool.submit(run_once, script, flags, seed) for seed in seeds] for _, script, flags in study]
        print("| arm | final return, median (each seed) | final, mean +- standard error | area under the curve |")
        print("|---|---|---|---|")
        for (name, _, _), runs in zip(study, futures, strict=True):
            records = [run.result() for run in runs]
            finals, areas = [[record[key] for record in records] for key in ("final_return", "auc")]
            error = lambda x: f"{np.mean(x):.1f} +- {np.std(x, ddof=1) / len(x) ** 0.5:.1f}"  # noqa: E731
            each = " ".join(f"{final:.0f}" for final in finals)
            print(f"| {name} | {statistics.median(finals):.1f} ({each}) | {error(finals)} | {error(areas)} |", flush=True)


if __name__ == "__main__":
    main()
