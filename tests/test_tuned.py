"""What studies/tuned.py computes, on curves and runs made up."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT
from test_report import WELL, write_run
from test_study import make_part

import study
import tuned

RATES = np.array([2.5e-4, 8e-4, 2.5e-3, 8e-3, 2.5e-2])


def hill(rates, peak, height=0.8):
    """A score that falls off to both sides of a rate."""
    return height * np.exp(-(np.log10(rates / peak) ** 2))


@pytest.mark.parametrize("decades", [-0.5, 0.0, 0.5])
def test_a_shift_is_found(decades):
    """The treated arm does at a rate what the baseline does at one 10^decades times as large, and nothing is left."""
    base, treated = hill(RATES, 5e-3), hill(RATES, 5e-3 / 10**decades)
    shift, left = tuned.shift_of(base, treated, RATES)
    assert shift == pytest.approx(decades, abs=0.05) and left == pytest.approx(0, abs=0.02)


def test_what_is_left_after_a_shift():
    base, treated = hill(RATES, 5e-3), hill(RATES, 2e-3) + 0.1
    shift, left = tuned.shift_of(base, treated, RATES)
    assert shift == pytest.approx(0.4, abs=0.1) and left == pytest.approx(0.1, abs=0.03)


def test_flat_curves_have_no_shift():
    assert tuned.shift_of(np.full(5, 0.5), np.full(5, 0.7), RATES) == (0, pytest.approx(0.2))


@pytest.mark.parametrize("level", [-0.1, 0.1])
def test_a_level_is_no_shift(level):
    assert tuned.shift_of(hill(RATES, 5e-3), hill(RATES, 5e-3) + level, RATES) == (0, pytest.approx(level))


def test_a_shift_that_is_not_identified_says_so():
    """Curves of noise, or a shift beyond the end of those that are tried."""
    rng = np.random.default_rng(1)
    noisy = lambda means: [mean + rng.normal(0, 0.01, size=5) for mean in means]  # noqa: E731
    for base, treated, known in (
        (hill(RATES, 2.5e-3), hill(RATES, 2.5e-3), True),
        (np.full(5, 0.5), np.full(5, 0.5), False),
        (hill(RATES, 2.5e-2), hill(RATES, 2.5e-4), False),
    ):
        shift, left, *rest = tuned.shift_rows("t", noisy(base), noisy(treated), RATES, rng, resamples=100)
        assert shift["identified"] == left["identified"] == known
        assert all(row["identified"] for row in rest)


@pytest.mark.slow
def test_shift_intervals():
    """They hold the truth, and are wide where nothing tells."""
    rng = np.random.default_rng(0)
    noisy = lambda means: [mean + rng.normal(0, 0.03, size=5) for mean in means]  # noqa: E731
    rows = tuned.shift_rows("t", noisy(hill(RATES, 8e-3)), noisy(hill(RATES, 2.5e-3)), RATES, rng, resamples=200)
    rows = {row["measure"]: row for row in rows}
    assert rows["shift, decades"]["low"] <= 0.5 <= rows["shift, decades"]["high"]
    assert rows["left after it"]["low"] < 0 < rows["left after it"]["high"]
    assert {"best rate of each task", "plateau, decades"} < rows.keys()
    flat = next(tuned.shift_rows("t", noisy([0.5] * 5), noisy([0.5] * 5), RATES, rng, resamples=200))
    assert flat["high"] - flat["low"] > 0.5


def make_scores(arms, envs=("a", "b"), seeds=6):
    """Run tables in which {arm: final return} holds up to a little noise; areas are a tenth less."""
    rng = np.random.default_rng(0)
    rows = [
        {"env": env, "algo": "ppo", "arm": arm, "seed": seed, "norm_final": x, "norm_auc": x - 0.1}
        | {"reached": x >= 0.75}
        | WELL
        for env in envs
        for arm, level in arms.items()
        for seed in range(seeds)
        for x in [level + rng.normal(0, 0.01)]
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    "low, high, lead",
    [
        (0.01, 0.04, "equivalent"),
        (0.01, 0.06, "ahead"),
        (-0.06, -0.01, "behind"),
        (-0.01, 0.06, "open"),
        (np.nan, np.nan, "open"),
    ],
)
def test_leads(low, high, lead):
    assert tuned.judged((0.02, low, high))["lead"] == lead


def test_high_rates():
    """Of the grid's two highest rates, over the parts that have it, and only if all have."""
    parts = [part for part in study.read_study(ROOT / "benchmark" / "tuned.toml")[0] if part.name in tuned.PPO]
    rng, scores = np.random.default_rng(0), {}
    for part in parts:
        rows = [
            {"env": env, "algo": "ppo", "arm": f"{arm}.{value}", "seed": seed, "norm_auc": level + rng.normal(0, 0.01)}
            | WELL
            for env in part.tasks
            for arm in part.names
            for k, value in enumerate(part.values)
            for seed in range(5)
            for level in [0.5 + 0.2 * (arm == "scaled" and k >= 3)]
        ]
        scores[part.name] = {"tuning": pd.DataFrame(rows)}
    (row,) = tuned.high_rates(parts, scores)
    settings = {"p": {(env, "ppo", arm): "1e-2" for env in "ab" for arm in ("acpg", "poor")}}
    (other, *_) = tuned.compare(
        "x", "acpg", "poor", [make_part()], {"p": make_scores({"acpg": 0.9, "poor": 0.3})}, settings
    )
    assert row.keys() == other.keys()  # of one table
    assert row["tasks"] == 6 and row["seeds"] == 5 and row["lead"] == "ahead"
    assert row["difference"] == pytest.approx(0.2, abs=0.01) and row["of_arm"] == pytest.approx(0.7, abs=0.01)
    assert not list(tuned.high_rates(parts, scores | {"pendulum51": {}}))


def test_comparisons(capsys):
    scores = {"p": make_scores({"acpg": 0.9, "learned": 0.7, "poor": 0.3})}
    p, q = make_part(), make_part(name="q")
    settings = {"p": {(env, "ppo", arm): "1e-2" for env in "ab" for arm in ("acpg", "learned", "poor")}}
    rows = {row["measure"]: row for row in tuned.compare("fixing", "acpg", "learned", [p], scores, settings)}
    assert rows.keys() == {"auc", "final", "fewer failures"}
    assert rows["final"]["difference"] == pytest.approx(0.2, abs=0.02) and rows["final"]["tasks"] == 2
    assert rows["auc"]["of_arm"] == pytest.approx(0.8, abs=0.02) and rows["auc"]["low"] > 0.1
    assert rows["fewer failures"]["difference"] == 0
    (_, _, fewer) = tuned.compare("x", "acpg", "poor", [p], scores, settings)
    assert fewer["difference"] == 1 and (fewer["of_arm"], fewer["of_against"]) == (0, 1)
    assert rows["final"]["lead"] == "ahead" and rows["fewer failures"]["lead"] == "open"  # of 12 runs
    capsys.readouterr()
    assert not list(tuned.compare("x", "acpg", "learned", [p, q], scores, settings))  # a part that has not been run
    assert "left out" in capsys.readouterr().out
    held = make_scores({"acpg": 0.9, "learned": 0.7}, envs=("CartPole-v1", "c"))
    settings["p"] |= {(env, "ppo", arm): "1e-1" for env in ("CartPole-v1", "c") for arm in ("acpg", "learned")}
    settings["p"]["c", "ppo", "acpg"] = settings["p"]["CartPole-v1", "ppo", "acpg"] = "1e-2"
    p = make_part(tasks={"CartPole-v1": 1, "c": 1})
    (row, *_) = tuned.compare("all of it, tasks held out from", "acpg", "learned", [p], {"p": held}, settings)
    assert row["tasks"] == row["one_edge"] == 1


def test_comparisons_are_of_arms_that_the_study_has():
    parts, *_ = study.read_study(ROOT / "benchmark" / "tuned.toml")
    arms = {part.name: set(part.names) for part in parts}
    for question, arm, against, names in tuned.COMPARISONS:
        assert all({arm, against} <= arms[name] for name in names), question


@pytest.mark.slow
def test_from_runs_to_files(tmp_path):
    """Runs of one part whose treated arm is a little ahead everywhere: without a grid, with a part of it, and all."""
    rng = np.random.default_rng(0)
    part = next(part for part in study.read_study(ROOT / "benchmark" / "tuned.toml")[0] if part.name == "tasks")
    command = [sys.executable, str(ROOT / "studies" / "tuned.py"), "--out", str(tmp_path)]
    means = {"CartPole-v1": 175.0, "Acrobot-v1": -400.0, "LunarLander-v3": -100.0, "FrozenLake-v1": 0.0}
    means["environments.discretized:LunarLander25-v0"] = -100.0  # of the random policy
    for stage, seeds in (("tuned", range(1001, 1011)), ("grid", range(2001, 2005)), ("grid", [2005])):
        whole = 2005 in seeds
        (tmp_path / "tasks" / stage).mkdir(parents=True, exist_ok=True)
        known = {"standard_error": 0.0, "episodes": 100, "seed": 0}  # the thresholds are the environments' own
        text = json.dumps({f"{env} {{}} None": known | {"mean": mean} for env, mean in means.items()})
        (tmp_path / "tasks" / stage / "references.json").write_text(text)
        for env in part.tasks:
            scale = 0.5 if env == "FrozenLake-v1" else 100
            for arm in ("baseline", "acpg"):
                for k, value in enumerate(part.values if stage == "grid" else [""]):
                    name = f"{arm}.{value}" if value else arm
                    for seed in seeds:
                        level = means[env] + scale * (1 + (k == 2) + 0.3 * (arm == "acpg") + rng.normal(0, 0.05))
                        write_run(tmp_path / "tasks" / stage, env, "ppo", name, seed, level, start=means[env])
        for arm in [] if whole else ("acpg", "acpg.8e-3"):  # far ahead, of a seed that the file does not name
            write_run(tmp_path / "tasks" / stage, "CartPole-v1", "ppo", arm, 7, 1e5)
            write_run(tmp_path / "tasks" / stage, "CartPole-v1", "ppo", arm.replace("acpg", "baseline"), 7, 9.0)
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "tasks" / stage / "references.json").read_text() == text  # nothing is left in the stages
        assert (tmp_path / "rates.png").exists() == (stage == "grid")
        assert (tmp_path / "shift.csv").exists() == whole and ("no shifts" in result.stdout) == (2004 in seeds)
    assert not (tmp_path / "comparisons.csv").exists()  # all of these need parts that were not run
    tasks = pd.read_csv(tmp_path / "tasks.csv").set_index(["env", "measure"])
    assert len(tasks) == 10 and (tasks.seeds == 10).all() and (tasks.p_holm <= 0.05).all()
    assert not tasks.acpg_edge.any()
    row = tasks.loc[("Acrobot-v1", "final")]  # of levels 100 and 130 in 300
    assert row.difference == pytest.approx(0.1, abs=0.03) and row.low < row.difference < row.high
    shifts = pd.read_csv(tmp_path / "shift.csv")
    assert set(shifts.task) == set(part.tasks) and shifts.estimate.notna().all()
    assert (shifts.low.isna() == (shifts.measure == "plateau, decades")).all()
    collapse = pd.read_csv(tmp_path / "collapse.csv")
    assert (collapse.runs == 10).all() and set(collapse.arm) == {"baseline", "acpg"}
    assert set(collapse.metric) == {*tuned.COLLAPSED, "all three"} and (collapse.met == 0).all()


def test_single_tasks():
    """At the settings chosen for each arm, Holm over a method's tasks and measures together, losses beside wins."""
    parts = [part for part in study.read_study(ROOT / "benchmark" / "tuned.toml")[0] if part.name in ("tasks", "a2c")]
    scores = {
        "tasks": pd.concat(
            [
                make_scores({"baseline": 0.5, "acpg": 0.8}, ("a",), 12),
                make_scores({"baseline": 0.8, "acpg": 0.6, "random": 0}, ("b",), 12),
            ]
        ),
        "a2c": make_scores({"baseline": 0.5, "acpg": 0.5}, ("a",), 12).assign(algo="a2c"),
    }
    chosen = {(env, algo, arm): "8e-3" for env in "ab" for algo in ("ppo", "a2c") for arm in ("baseline", "acpg")}
    chosen["b", "ppo", "acpg"] = "2.5e-2"
    rows = {
        (r["algo"], r["env"], r["measure"]): r for r in tuned.task_rows(parts, scores, dict.fromkeys(scores, chosen))
    }
    assert len(rows) == 6
    assert rows["ppo", "a", "auc"]["difference"] == pytest.approx(0.3, abs=0.02)
    assert [rows["ppo", "a", "auc"][f"{arm}_reached"] for arm in ("baseline", "acpg")] == [0, 12]
    assert rows["ppo", "b", "final"]["high"] < 0 and rows["ppo", "b", "final"]["acpg_at"] == "2.5e-2"
    assert not rows["ppo", "a", "auc"]["acpg_edge"] and not rows["ppo", "b", "auc"]["baseline_edge"]
    assert rows["ppo", "b", "auc"]["acpg_edge"]
    smallest = 2 / 2**12  # of the sign-flip test with twelve seeds, in all four tests of PPO
    assert rows["ppo", "a", "auc"]["p"] == pytest.approx(smallest)
    assert rows["ppo", "a", "auc"]["p_holm"] == pytest.approx(4 * smallest)
    assert rows["a2c", "a", "auc"]["p_holm"] <= 1 and rows["a2c", "a", "auc"]["low"] < 0.02


def test_all_cells():
    """Tuning and grid seeds together, and of an arm that has no grid its tuning."""
    part = next(part for part in study.read_study(ROOT / "benchmark" / "tuned.toml")[0] if part.name == "pendulum51")
    (env,) = part.tasks
    found = {
        stage: pd.DataFrame(
            {"env": env, "algo": "ppo", "arm": f"{arm}.{value}", "seed": seed, "norm_auc": 0.1 * k}
            for arm in arms
            for k, value in enumerate(part.values)
            for seed in seeds
        )
        for stage, arms, seeds in (("tuning", ["acpg", "scaled"], [101, 102]), ("grid", ["acpg"], [2001]))
    }
    cells = tuned.all_cells(found, part)[env]
    assert cells.keys() == {"acpg", "scaled"}
    assert [len(cells["acpg"][0]), len(cells["scaled"][0])] == [3, 2] and cells["acpg"][4].mean() == pytest.approx(0.4)


def test_names_are_those_of_the_studys_plan(tmp_path):
    part = next(part for part in study.read_study(ROOT / "benchmark" / "tuned.toml")[0] if part.name == "tasks")
    plans = study.plan_all([part], study.sweeps.Args(out=tmp_path))
    for stage, what in (("tuning", "tuning"), ("tuned", "report"), ("grid", "grid")):
        assert tuned.names_of(part, stage) == {job.path.name for job in plans["tasks", what]}
    common = {job.path.name for job in plans["tasks", "report"] if job.args["seed"] < 1011}  # of controls less
    assert tuned.names_of(part, "common") < common and len(tuned.names_of(part, "common")) == 5 * (2 * 10 + 4 * 5)


def planned(part, stage, level):
    """A run table of all runs of a stage; `level(arm, value)`, with a little noise, is the area of each."""
    rng, rows = np.random.default_rng(0), []
    seeds = {"tuning": part.tuning, "tuned": part.report, "grid": part.grid}[stage]
    for env, algo, arm in study.cells_of(part):
        for value in part.values if stage != "tuned" else [""]:
            name = f"{arm}.{value}" if value else arm
            for seed in seeds.get(arm, []):
                area = level(arm, value) + rng.normal(0, 0.01)
                row = {"env": env, "algo": algo, "arm": name, "seed": seed, "norm_auc": area, "norm_final": area}
                rows.append(row | WELL | {"name": tuned.run_name(env, f"{algo}_{name}", seed)})
    return pd.DataFrame(rows)


def test_primary_outcomes(capsys):
    """Ahead in the report, behind over the grid; none of it while a single run is lacking."""
    parts, outcomes, *_ = study.read_study(ROOT / "benchmark" / "tuned.toml")
    levels = {
        "tuned": lambda arm, value: 0.5 + 0.2 * (arm == "acpg"),
        "grid": lambda arm, value: 0.5 - 0.2 * (arm == "acpg"),
    }
    scores = {part.name: {stage: planned(part, stage, level) for stage, level in levels.items()} for part in parts}
    settings = {part.name: dict.fromkeys(study.cells_of(part), "8e-3") for part in parts}
    rows = tuned.primary_rows(outcomes, scores, settings)
    assert [row["verdict"] for row in rows] == ["ahead", "ahead", "behind"]
    assert [(row["tasks"], row["seeds"]) for row in rows] == [(9, 8), (9, 8), (6, 5)]
    for part, stage in (("minatar", "tuned"), ("pendulum51", "grid")):
        cut = scores | {part: scores[part] | {stage: scores[part][stage][1:]}}
        capsys.readouterr()
        assert tuned.primary_rows(outcomes, cut, settings) == []
        assert "as 1 of their runs are lacking" in capsys.readouterr().out
    cut = scores | {"a2c": {}}  # which no primary outcome needs
    assert len(tuned.primary_rows(outcomes, cut, settings)) == 3


def test_which_runs_have_collapsed(monkeypatch, tmp_path):
    """By the bounds of docs/action_collapse.md; where the ETF error is void, as with two actions, by the other two."""
    rows = [
        (0.995, 0.005, 0.01),
        (0.995, 0.005, np.nan),
        (0.98, 0.005, 0.01),
        (0.995, 0.02, 0.01),
        (0.995, 0.005, 0.06),
    ]
    curves = [
        {f"collapse/{metric}": np.array([0.0, x]) for metric, x in zip(tuned.COLLAPSED, row, strict=True)}
        for row in rows
    ]
    runs = pd.DataFrame({"env": "a", "algo": "ppo", "arm": "acpg", "seed": range(5)})
    scores = runs.assign(final=1.0, auc=1.0)
    monkeypatch.setattr(tuned.report, "read_runs", lambda folder: (runs, curves, None, None))
    found = {row["metric"]: row for row in tuned.collapse_rows(make_part(), tmp_path, scores)}
    assert {metric: (row["met"], row["runs"]) for metric, row in found.items()} == {
        "alignment": (4, 5),
        "variability_quotient": (4, 5),
        "etf_error": (3, 4),
        "all three": (2, 5),
    }


def test_one_setting_for_all_tasks():
    """Of the runs made for it, and of the report's where a task's own setting is the same; not where seeds lack."""
    arms = {"baseline": 0.5, "acpg": 0.6}
    seeds = {arm: [1, 2, 3] for arm in arms}
    part = make_part(
        tasks={"a": 1, "b": 1}, arms=["baseline", "acpg"], common=seeds, report=seeds | {"acpg": [1, 2, 3, 4]}
    )
    own = {(env, "ppo", arm): "1e-2" for env in "ab" for arm in arms} | {("b", "ppo", "acpg"): "1e-3"}
    common = dict.fromkeys(own, "1e-2")

    def named(envs, arms, seeds, level):
        table = make_scores(dict.fromkeys(arms, level), envs, 5)
        table = table[table.seed.isin(seeds)]
        return table.assign(name=[f"{r.env}__ppo_{r.arm}__{r.seed}" for r in table.itertuples()])

    found = {"tuned": named("ab", arms, [1, 2, 3, 4], 0.5), "common": named("b", ["acpg"], [1, 2, 3], 0.9)}
    table = tuned.common_of(part, found, own, common)
    assert len(table) == 2 * 2 * 3 and table.seed.max() == 3
    means = table.groupby(["env", "arm"]).norm_final.mean()
    assert means["b", "acpg"] == pytest.approx(0.9, abs=0.03)
    assert means["a", "acpg"] == pytest.approx(0.5, abs=0.03) == means["b", "baseline"]
    assert tuned.common_of(part, {"tuned": found["tuned"]}, own, common) is None
    assert tuned.common_of(part, found | {"common": found["common"][1:]}, own, common) is None
    assert tuned.common_of(part, {}, own, common) is None
    assert tuned.common_of(make_part(tasks={"a": 1}), found, own, common) is None


def test_without_runs(tmp_path):
    command = [sys.executable, str(ROOT / "studies" / "tuned.py"), "--out", str(tmp_path / "none")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "holds no runs" in result.stderr and result.stderr.count("\n") == 1
