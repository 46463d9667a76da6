"""studies/paper_setting.py: epochs and stops worked by hand, and its parts run, packed, resumed and reported."""

import csv
import dataclasses
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import paper_setting
from paper_setting import PARTS, Result, epochs_of
from reading import RETURN, STEP

NAN = math.nan


def curves(steps, returns, lengths=()):
    table = {STEP: steps, RETURN: returns, "charts/episodic_length": lengths or returns}
    return {name: np.array(values, dtype=float) for name, values in table.items()}


def test_epochs_of_reinforce(monkeypatch):
    """An epoch ends with the update at which the steps of its episodes, eight an update, reach its length."""
    monkeypatch.setitem(paper_setting.EPOCH, "reinforce", 800)
    # eight episodes of 50, 60, 30 steps: 400, 880 -> an epoch; 240, 720, 1,120 -> another; the last has only begun
    found = epochs_of(curves([0, 900, 2000, 2300, 2900, 3600, 3700], [NAN, 50, 60, 30, 60, 50, 9]), "reinforce")
    assert found == [(55, pytest.approx((8 * 60 + 2 * 50) / 10)), (pytest.approx(140 / 3), pytest.approx(52))]
    # an epoch of one update takes its last two episodes from the epoch before
    found = epochs_of(curves([900, 2000], [100, 200]), "reinforce")
    assert found == [(100, 100), (200, pytest.approx(180))]


def test_epochs_of_the_others(monkeypatch):
    """An entry is an epoch; what is left at the end is none."""
    monkeypatch.setitem(paper_setting.EPOCH, "ppo", 1000)
    assert epochs_of(curves([0, 1000, 2000, 2300], [NAN, 5, 7, 9]), "ppo") == [(5, 5), (7, 7)]


def result(*lasts, threshold=10):
    return Result(
        SimpleNamespace(curves={"collapse/alignment": np.array([0.2, NAN])}), [(x + 1, x) for x in lasts], threshold
    )


def test_a_result():
    run = result(3, 10, 30, 2)
    assert (run.stop, run.best, run.final) == (2, 31, 3)
    assert math.isnan(run.collapse("collapse/alignment"))  # undefined at the end: never the untrained network's
    run.cut(1)
    assert (run.stop, run.final) == (math.inf, 4)


def test_comparison():
    """Two that never stop are a tie, one that stops beats one that does not, by seed."""
    control = {1: result(1, 1), 2: result(1, 10), 3: result(10, 1), 4: result(1, 1), 9: result(1, 10)}
    results = {1: result(1, 1), 2: result(10, 1), 3: result(1, 10), 4: result(1, 10), 7: result(10, 10)}
    stop, _, _, earlier, _ = paper_setting.cells_of(results, control)
    assert stop == "2 (4 of 5)"
    assert earlier.startswith("0.62 [")  # .5, 1, 0, 1: of the four common seeds
    stop, *_, earlier, difference = paper_setting.cells_of(control, control)
    assert stop == "2 (3 of 5)" and earlier == difference == ""
    never = {seed: result(1, 1) for seed in range(3)}
    assert paper_setting.cells_of(never, never)[0] == "never (0 of 3)"


def test_best_rate():
    """The rate that stops soonest on the median seed; of equals the one that is best at its best."""
    key = ("CartPole-v1", "acpg")
    cells = {
        "a": [result(1, 10), result(1, 1)],
        "b": [result(1, 10), result(1, 10)],
        "c": [result(1, 10), result(1, 90)],
    }
    parts = {name: {key: dict(enumerate(runs))} for name, runs in cells.items()}
    assert paper_setting.best_rate(parts, key) == "c"
    parts["a"][key] = {0: result(10)}
    assert paper_setting.best_rate(parts, key) == "a"


def main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["paper_setting.py", *map(str, words)])
    try:
        paper_setting.main()
    except SystemExit as end:
        return end.code


@pytest.mark.slow
def test_run_resume_report(tmp_path, monkeypatch, capfd):
    small = dataclasses.replace(PARTS["reinforce-1e-3"], epochs=3, seeds=2, envs=("CartPole-v1",))
    monkeypatch.setitem(paper_setting.EPOCH, "reinforce", 2000)
    monkeypatch.setitem(PARTS, "reinforce-1e-3", small)
    monkeypatch.setitem(PARTS, "reinforce-1e-4", dataclasses.replace(small, rate="1e-4"))
    out = tmp_path / "out"
    assert "drop --report-only" in main(monkeypatch, "--out", out, "--report-only")
    flags = ("--out", out, "--jobs", 2, "--parts", "reinforce-1e-3")
    assert main(monkeypatch, *flags, "--seeds", 1) is None
    assert main(monkeypatch, *flags) is None
    said = capfd.readouterr().out
    assert "6 runs, 3 of them finished before" in said
    assert main(monkeypatch, "--out", out, "--jobs", 2, "--parts", "reinforce-1e-4") is None
    report = (out / "report.md").read_text()
    assert report.count("| CartPole-v1 | 1e-3 | ") == report.count("| CartPole-v1 | 1e-4 | ") == 6
    assert report.count("**best: ") == 3 and "33 -> 20" in report and (out / "reinforce.png").exists()
    with open(out / "reinforce-1e-3" / "epochs.csv") as file:
        assert len({row["run"] for row in csv.DictReader(file)}) == 6
    assert not list((out / "reinforce-1e-3" / "runs").glob("*/progress.csv"))

    # the report is made of what is packed alone; runs of other scripts are not mixed with these
    (out / "report.md").unlink()
    assert main(monkeypatch, "--out", out, "--report-only") is None
    assert (out / "report.md").read_text() == report
    monkeypatch.setattr(paper_setting, "digest", lambda script: "other")
    assert "another version of the scripts" in main(monkeypatch, *flags)


def test_unknown_part(monkeypatch):
    assert "reinforce-1e-3" in main(monkeypatch, "--parts", "reinforce")
