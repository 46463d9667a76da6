"""What studies/tuned_checks.py computes, on runs made up."""

import sys

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT
from test_report import WELL
from test_study import make_part
from test_tuned import make_scores, planned

import study
import tuned
import tuned_checks

VALUES = ("1e-3", "1e-2", "1e-1")


def grid_scores(levels, seeds):
    """A run table of {(arm, value): areas (seeds,)} on one task; final returns are a tenth above."""
    rows = [
        {"env": "a", "algo": "ppo", "arm": f"{arm}.{value}", "seed": seed, "norm_auc": x, "norm_final": x + 0.1} | WELL
        for (arm, value), areas in levels.items()
        for seed, x in zip(seeds, areas, strict=True)
    ]
    return pd.DataFrame(rows)


def test_each_task_and_the_mean_over_the_others():
    tables = [
        make_scores({"acpg": 0.9, "learned": 0.4}, ("a",), 10),
        make_scores({"acpg": 0.5, "learned": 0.6}, ("b", "c"), 10),
    ]
    rows = list(tuned_checks.by_task("fixing", "acpg", "learned", tables, resamples=200))
    assert [(row["env"], row["measure"]) for row in rows] == [(env, m) for m in ("auc", "final") for env in "abc"]
    assert [row["difference"] for row in rows[:3]] == [pytest.approx(x, abs=0.02) for x in (0.5, -0.1, -0.1)]
    assert [row["rest_difference"] for row in rows[:3]] == [pytest.approx(x, abs=0.02) for x in (-0.1, 0.2, 0.2)]
    for row in rows:
        assert row["low"] < row["difference"] < row["high"] and row["rest_low"] < row["rest_high"]
    (alone,) = [row for row in tuned_checks.by_task("x", "acpg", "learned", tables[:1], 200) if row["measure"] == "auc"]
    assert "rest_low" not in alone


def test_how_close_a_choice_was():
    """One setting ahead on every seed, and two whose order the seeds decide."""
    part = make_part(tasks={"a": 1})
    sure, close = [0.2, 0.5, 0.9], [0.2, 0.61, 0.6]
    wide = np.array([0.3, -0.3, 0.1, -0.1])
    levels = {("baseline", v): x + np.zeros(4) for v, x in zip(VALUES, sure, strict=True)}
    levels |= {("acpg", v): x + wide * (v == "1e-2") for v, x in zip(VALUES, close, strict=True)}
    scores = grid_scores(levels, [1, 2, 3, 4])
    base, treated = tuned_checks.choices(part, scores, np.random.default_rng(0), 2000)
    assert (base["chosen"], base["second"], base["chosen_share"]) == ("1e-1", "1e-2", 1)
    assert (treated["chosen"], treated["second"]) == ("1e-2", "1e-1")
    assert treated["chosen_area"] == pytest.approx(0.61) and treated["second_area"] == pytest.approx(0.6)
    assert 0.4 < treated["chosen_share"] < 0.65 and treated["chosen_share"] + treated["second_share"] == pytest.approx(
        1
    )


def test_differences_at_each_rate():
    part = make_part(tasks={"a": 1})
    rng = np.random.default_rng(0)
    noise = lambda: rng.normal(0, 0.01, size=6)  # noqa: E731
    levels = {("baseline", v): x + noise() for v, x in zip(VALUES, (0.6, 0.5, 0.1), strict=True)}
    levels |= {("acpg", v): x + noise() for v, x in zip(VALUES, (0.5, 0.7, 0.6), strict=True)}
    rows = list(tuned_checks.at_each_rate(part, grid_scores(levels, range(6)), resamples=200))
    assert [row["value"] for row in rows] == list(VALUES) and all(row["seeds"] == 6 for row in rows)
    assert [row["difference"] for row in rows] == [pytest.approx(x, abs=0.03) for x in (-0.1, 0.2, 0.5)]
    assert [row["baseline_failed"] for row in rows] == [0, 0, 6] and [row["acpg_failed"] for row in rows] == [0, 0, 0]
    assert rows[0]["baseline_area"] == pytest.approx(0.6, abs=0.02) and rows[2]["acpg_runs"] == 6


@pytest.mark.parametrize("cut", [None, "tuning", "grid"])
def test_from_tables_to_files(tmp_path, monkeypatch, capsys, cut):
    """One part, of which all runs are there or one is lacking; of the others there are none."""
    parts, *rest = study.read_study(ROOT / "benchmark" / "tuned.toml")
    part = next(part for part in parts if part.name == "pendulum51")
    peaks = {"2.5e-4": 0.2, "8e-4": 0.3, "2.5e-3": 0.5, "8e-3": 0.7, "2.5e-2": 0.4}
    found = {
        stage: planned(part, stage, lambda arm, value: peaks[value] + 0.1 * (arm == "acpg"))
        for stage in ("tuning", "grid")
    }
    if cut:
        found[cut] = found[cut][1:]
    scores = {other.name: found if other is part else {} for other in parts}
    monkeypatch.setattr(tuned, "read_all", lambda out: (parts, [], scores, {}, {}))
    monkeypatch.setattr(sys, "argv", ["tuned_checks.py", "--out", str(tmp_path)])
    tuned_checks.main()
    written = {path.name for path in tmp_path.iterdir()}
    if cut:
        assert written == {"grid": {"choice.csv"}, "tuning": set()}[cut]
        assert "pendulum51" in capsys.readouterr().out
        return
    assert written == {"choice.csv", "rates.csv", "shift_without.csv"}
    assert set(pd.read_csv(tmp_path / "choice.csv", dtype=str).chosen) == {"8e-3"}
    rates = pd.read_csv(tmp_path / "rates.csv")
    assert (rates.seeds == 10).all() and rates.difference.to_numpy() == pytest.approx(0.1, abs=0.02)
    assert list(rates.acpg_runs) == [10] * 5 and list(rates.scaled_runs) == [5] * 5
    shifts = pd.read_csv(tmp_path / "shift_without.csv")
    assert list(shifts.measure) == ["shift, decades", "left after it"]
    assert shifts.estimate[1] == pytest.approx(0.1, abs=0.02)  # a level, no shift
