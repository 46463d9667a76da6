"""tabular.py: from training to the table, and what the table says of given evaluations."""

import csv
import subprocess
import sys

import pytest
from helpers import ROOT

import tabular


def evaluation(alignment, agreement):
    """What evaluate.py writes, as far as the table reads it."""
    metrics = {"alignment": alignment, "variability_quotient": 0.5, "etf_error": None, "mean_weight_cosine": 0.25}
    group = {"collapse": metrics, "collapse_null": metrics | {"alignment": 0.125}}
    group |= {"logged": {"alignment": 0.75, "variability_quotient": float("nan"), "etf_error": 0.5}}
    return {"sampled": {"mean": 3.0}, "greedy": {"mean": 4.0}, "agreement": agreement, "states": 7} | group


def test_table():
    """Means with t intervals over the seeds, metrics that evaluate.py had no value for left out, and the verdict."""
    rows = {("Env-v0", "acpg"): [evaluation(0.995, 0.5), evaluation(0.996, 0.7)]}
    cells = [cell.strip() for cell in tabular.table(rows)[-1].strip("|").split("|")]
    assert cells[:3] == ["Env-v0", "acpg", "3 [3, 3]"]
    assert cells[3] == "60% [-67%, 187%]"  # t = 12.7 with one degree of freedom
    assert cells[4] == "7" and cells[5].startswith("1.00 [0.99, 1.00]") and cells[7].startswith("nan")
    assert cells[9].startswith("0.12, 0.5, nan") and cells[10].startswith("open / no")
    assert cells[11] == "0.75, nan, 0.50"
    header, rule, *_ = tabular.table(rows)
    assert header.count("|") == rule.count("|") == tabular.table(rows)[-1].count("|")


@pytest.mark.slow
def test_end_to_end(tmp_path):
    """Two seeds: every run is evaluated on exact labels, and running again trains nothing."""
    flags = [
        "--num-seeds",
        "2",
        "--total-timesteps",
        "1024",
        "--out",
        str(tmp_path / "runs"),
        "--tables",
        str(tmp_path / "t"),
    ]
    command = [sys.executable, str(ROOT / "studies" / "tabular.py"), "--envs", "FrozenLake-v1", *flags]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path) for _ in range(2)
    )
    assert "4 runs, 0 of them finished before" in first.stdout and "4 runs, 4 of them finished before" in second.stdout
    with open(tmp_path / "t" / "tabular.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (arm, seed) for arm in ("baseline", "acpg") for seed in ("1", "2")
    ]
    assert {row["states"] for row in rows} == {"10"}  # of 11 states that are not terminal one is tied
    assert all(0 <= float(row["greedy_is_optimal"]) <= 1 for row in rows)
    with open(tmp_path / "runs" / "runs" / "FrozenLake-v1__ppo_acpg__1" / "progress.csv") as file:
        *_, last = [value for row in csv.DictReader(file) if (value := row["collapse/alignment"])]
    assert float(rows[2]["logged_alignment"]) == float(last)
    assert len((tmp_path / "t" / "tabular.md").read_text().splitlines()) == 2 + 2


@pytest.mark.parametrize(
    "flags, what",
    [
        (["--envs", "Nowhere-v0"], "Nowhere-v0"),
        (["--envs", "CartPole-v1"], "no transition table"),
        (["--num-seeds", "0"], "--num-seeds"),
    ],
)
def test_bad_input(flags, what, tmp_path):
    command = [sys.executable, str(ROOT / "studies" / "tabular.py"), "--out", str(tmp_path / "runs"), *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode and what in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()
