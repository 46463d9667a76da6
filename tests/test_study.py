"""Studies in a file: what is refused, how settings are chosen, and a small one to its end."""

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT
from scipy import stats
from test_report import write_run

import study
import sweep

SMALL = (ROOT / "benchmark" / "small.toml").read_text()


def run(path, out, *more):
    command = [sys.executable, str(ROOT / "benchmark" / "sweep.py"), "--study", str(path), "--out", str(out), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "old, new, word",
    [
        ("[[part]]", "[[parts]]", "parts"),
        ("[[part]]", "[[part]", "toml"),
        ('algos = ["ppo"]', 'algos = "ppo"', "algos"),
        ('algos = ["ppo"]', 'algorithms = ["ppo"]', "algorithms"),
        ('algos = ["ppo"]', 'algos = ["dqn"]', "dqn"),
        ('name = "cartpole"', "", "lacks name"),
        ('name = "cartpole"', 'name = "a/b"', "a/b"),
        ("30_000", "0", "tasks"),
        ("30_000", '"many"', "tasks"),
        ("CartPole-v1", "CartPole-v77", "CartPole-v77"),
        ('report = "1-5"', 'report = "102-105"', "102"),
        ('report = "1-5"', 'report = "5-1"', "5-1"),
        ('report = "1-5"', 'report = { acpg = "1-5" }', "baseline"),
        ('report = "1-5"', 'report = "1-5", grid = "101"', "101"),
        ('tuning = "101-102", report = "1-5"', "", "tuning"),
        ('["1e-6", "2.5e-3"]', "[]", "grid"),
        ('["1e-6", "2.5e-3"]', '["-1"]', "learning-rate"),
        ('"--learning-rate"', '"--no-such-flag"', "no-such-flag"),
        ("acpg auc", "acpg reward", "acpg reward"),
        ("acpg auc", "acpg grid", "grid"),
        (', report = "1-5"', ', grid = "1-5"', "seeds of the report"),
        ('tuning = "101-102", ', "", "tuning"),
        ('report = "1-5"', 'report = "1-5", common = "101"', "101"),
        ("[[part]]", "[[primary]]\n[[part]]", "primary"),
        ("[[part]]", "[[primary]]\noutcome = 'acpg auc'\nparts = ['x']\n[[part]]", "primary"),
        ("[[part]]", "[[primary]]\noutcome = 'acpg grid'\nparts = ['cartpole']\n[[part]]", "grid"),
        ("acpg auc", "baseline auc", "baseline auc"),
        ("frozen=acpg:", "frozen=dqn:", "--arms"),
        ("[[part]]", "[threshold]\n'CartPole-v0' = 3\n[[part]]", "CartPole-v0"),
        ("[[part]]", "[threshold]\n'CartPole-v1' = inf\n[[part]]", "[threshold]"),
        ("[[part]]", "margin = 0\n[[part]]", "margin"),
        ("[[part]]", "margin = true\n[[part]]", "margin"),
        ("[[part]]", f"margin = {'9' * 400}\n[[part]]", "margin"),
        ("[[part]]", f"margin = {'9' * 5000}\n[[part]]", "toml"),
        ("[[part]]", f"[threshold]\n'CartPole-v1' = {'9' * 400}\n[[part]]", "[threshold]"),
        ("[[part]]", "margin = " + "[" * 5000 + "]" * 5000 + "\n[[part]]", "toml"),
        ('arms = ["baseline", "acpg"', 'arms = [1, 2, "acpg"', "arms"),
        ('arms = ["baseline", "acpg"', 'arms = ["baseline", ["acpg"]', "arms"),
        ("frozen=acpg:", "others=acpg:", "others"),
        ('name = "cartpole"', 'name = ".."', ".."),
        ('name = "cartpole"', 'name = "report.md"', "report.md"),
        ('algos = ["ppo"]', 'algos = ["ppo", "ppo"]', "algos"),
        ('["1e-6", "2.5e-3"]', '["2.5e-3", "0.0025"]', "grid"),
        ('report = "1-5"', 'report = "1-99999999999999999999"', "no seeds"),
        ('report = "1-5"', 'report = "4294967295-4294967296"', "no seeds"),
        ('report = "1-5"', f'report = "{"9" * 5000}"', "no seeds"),
        ('report = "1-5"', "report = []", "report"),
        ('report = "1-5"', 'report = { baseline = "1-5", acpg = "6-10", frozen = "1-5" }', "in common"),
        ("[[part]]", "[[primary]]\noutcome = 'acpg auc'\nparts = [['x']]\n[[part]]", "primary"),
        ("[[part]]", "[[primary]]\noutcome = 'acpg final'\nparts = ['cartpole', 'cartpole']\n[[part]]", "primary"),
        ("[[part]]", "[[primary]]\noutcome = 'acpg auc'\nparts = ['cartpole']\n[[part]]", "twice"),
        ('"CartPole-v1" = 30_000', '"CliffWalking-v1" = 30_000', "[threshold]"),
    ],
)
def test_what_is_wrong_is_named(old, new, word, tmp_path, monkeypatch):
    """In one line that names the file and none of a sweep's options alone, before there is a folder."""
    path, out = tmp_path / "study.toml", tmp_path / "out"
    assert old in SMALL
    path.write_text(SMALL.replace(old, new))
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--study", str(path), "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        sweep.main()
    assert str(end.value).startswith("error: ") and word in str(end.value) and "\n" not in str(end.value), end.value
    assert not out.exists()


def test_one_value_has_no_common_setting(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(SMALL.replace('["1e-6", "2.5e-3"]', '["2.5e-3"]').replace('"1-5"', '"1-5", common = "1-3"'))
    with pytest.raises(SystemExit, match="seeds has common"):
        study.read_study(path)


@pytest.mark.parametrize("flags", [("--quick",), ("--envs", "CartPole-v1"), ("--seeds", "3"), ("--jobs", "0")])
def test_options_that_the_file_decides(flags, tmp_path):
    result = run(ROOT / "benchmark" / "small.toml", tmp_path / "out", *flags)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and flags[0] in result.stderr


def make_part(**more):
    own = {"name": "p", "tasks": {"a": 1, "b": 1}, "arms": ["baseline", "acpg"], "flag": "--learning-rate"}
    kinds = ("tuning", "report", "common", "grid")
    seeds = {kind: dict.fromkeys(("baseline", "acpg"), [1, 2]) for kind in kinds}
    return study.Part(**(own | {"values": ["1e-3", "1e-2", "1e-1"]} | seeds | more))


def make_scores(means):
    """A run table in which {(env, arm): area at each value} holds for two seeds, one above and one below."""
    rows = [
        {"env": env, "algo": "ppo", "arm": f"{arm}.{value}", "norm_auc": mean + sign * 0.05, "seed": sign}
        | {"name": f"{env}.{arm}.{value}.{sign}"}
        for (env, arm), row in means.items()
        for value, mean in zip(("1e-3", "1e-2", "1e-1"), row, strict=True)
        for sign in (-1, 1)
    ]
    return pd.DataFrame(rows)


def test_choice():
    """Each task's own best, and the one with the best mean over tasks."""
    means = {("a", "baseline"): [0.5, 0.4, 0.1], ("b", "baseline"): [0.1, 0.4, 0.5]}
    means |= {("a", "acpg"): [0.7, 0.2, 0.1], ("b", "acpg"): [0.7, 0.9, 0.8]}
    own, common = study.choose(make_scores(means), make_part())
    assert [own[env, "ppo", "baseline"] for env in "ab"] == ["1e-3", "1e-1"]
    assert [common[env, "ppo", "baseline"] for env in "ab"] == ["1e-2", "1e-2"]
    assert [own[env, "ppo", "acpg"] for env in "ab"] == ["1e-3", "1e-2"]
    assert common["a", "ppo", "acpg"] == "1e-3"  # .7 and .7 against .2 and .9
    with pytest.raises(ValueError, match="acpg"):
        study.choose(make_scores({key: row for key, row in means.items() if key != ("b", "acpg")}), make_part())
    unknown = make_scores(means)
    unknown.loc[unknown.name == "b.acpg.1e-2.1", "norm_auc"] = math.nan
    with pytest.raises(ValueError, match="no score is known of b.acpg.1e-2.1"):
        study.choose(unknown, make_part())


def test_a_part_of_which_nothing_can_be_chosen_stops_alone(tmp_path, monkeypatch, capsys):
    """As no score is known of a run, say: the parts after it go on, and the end is an error that names it."""
    path, done = tmp_path / "study.toml", []
    path.write_text(SMALL + SMALL[SMALL.index("[[part]]") :].replace('"cartpole"', '"b"'))
    monkeypatch.setattr(study, "stage", lambda part, args, name, jobs: args.planned.setdefault((part.name, name)) or [])
    monkeypatch.setattr(study, "scores_of", lambda folder, *_, **__: folder.parent.name)
    monkeypatch.setattr(study, "publish", lambda part, *_: done.append(part.name))

    def choose(scores, part):
        if scores == "cartpole":
            raise ValueError("part cartpole: no")
        own = dict.fromkeys(study.cells_of(part), "2.5e-3")
        return own, own

    monkeypatch.setattr(study, "choose", choose)
    with pytest.raises(SystemExit, match="nothing was chosen in 1 parts"):
        study.main(sweep.Args(study=path, out=tmp_path / "out"))
    assert done == ["b"] and "part cartpole: no" in capsys.readouterr().err


def test_seeds_of_tuning_in_one_part_are_not_reported_in_another(tmp_path):
    """For the same task and algorithm."""
    path = tmp_path / "study.toml"
    other = (
        SMALL[SMALL.index("[[part]]") :]
        .replace('"cartpole"', '"other"')
        .replace('tuning = "101-102"', 'tuning = "1-2"')
    )
    other = other.replace('report = "1-5"', 'report = "11-15"')
    path.write_text(SMALL + other)
    with pytest.raises(SystemExit, match="1, 2 of CartPole-v1 are for tuning in part other and for the report in cart"):
        study.read_study(path)
    path.write_text(SMALL + other.replace('["ppo"]', '["a2c"]'))
    study.read_study(path)


def test_the_order_in_which_runs_are_read_does_not_matter():
    """Packed runs come before others; halves of the seeds, and pairs of the arms, are by seed nevertheless."""
    scores = make_scores({(env, "acpg"): [0.2, 0.5, 0.3] for env in "ab"})
    for order in (scores, scores[::-1], scores.sample(frac=1, random_state=1)):
        (grid,) = study.grids_of(order, make_part(), ["acpg"])
        np.testing.assert_allclose(grid, [[[0.15, 0.25], [0.45, 0.55], [0.25, 0.35]]] * 2)


def test_a_grid_is_of_the_seeds_that_all_have():
    """A run that is missing takes its seed's others, on its task, with it: pairs are of the same seeds everywhere."""
    scores = make_scores({(env, arm): [0.2, 0.5, 0.3] for env in "ab" for arm in ("baseline", "acpg")})
    lost = (scores.env == "a") & (scores.arm == "acpg.1e-2") & (scores.seed == -1)
    base, treated = study.grids_of(scores[~lost], make_part(), ["baseline", "acpg"])
    for grid in (base, treated):
        np.testing.assert_allclose(grid[0], [[0.25], [0.55], [0.35]])
        np.testing.assert_allclose(grid[1], [[0.15, 0.25], [0.45, 0.55], [0.25, 0.35]])
    assert len(study.grids_of(scores[~lost], make_part(), ["baseline"])[0][0][0]) == 2
    gone = lost | (scores.env == "a") & (scores.arm == "baseline.1e-3") & (scores.seed == 1)
    assert study.grids_of(scores[~gone], make_part(), ["baseline", "acpg"]) is None


def test_scores_of_runs(tmp_path):
    """An area counts 0 to 1, a final return from 0: a run that is worse than the random policy is not behind one that
    diverged."""
    known = {"threshold": 400, "mean": 200.0, "standard_error": 0.0, "episodes": 100, "seed": 0}
    (tmp_path / "references.json").write_text(json.dumps({"CartPole-v1 {} None": known}))
    for seed, level in enumerate((100, 700, 1300)):  # areas are about half of it
        write_run(tmp_path, "CartPole-v1", "ppo", "acpg", seed, level)
    scores = study.scores_of(tmp_path, {"CartPole-v1": 400}).sort_values("seed")
    assert list(scores.norm_auc) == [0, pytest.approx(0.75, abs=0.03), 1]
    assert list(scores.norm_final) == [0, pytest.approx((665 - 200) / 200, abs=0.03), pytest.approx(5.2, abs=0.05)]


def test_a_primary_outcome_of_the_grid_has_one_score_a_seed():
    """Its mean over the values, so that a seed that is good at all of them counts once."""
    scores = make_scores({(env, arm): [0.2, 0.5, 0.3] for env in "ab" for arm in ("baseline", "acpg")})
    scores.loc[(scores.env == "b") & (scores.arm == "acpg.1e-1"), "norm_auc"] += 0.3
    pairs = study.paired_cells(make_part(), lambda part, stage: scores if stage == "grid" else None, "acpg", "grid")
    third = 1 / 3
    expected = [[[third - 0.05, third + 0.05]] * 2, [[third - 0.05, third + 0.05], [third + 0.05, third + 0.15]]]
    np.testing.assert_allclose(pairs, expected)


def test_runs_of_an_earlier_file_do_not_count(tmp_path):
    """Tuned on four seeds, of which the file now names two: the others are none of the study's."""
    known = {"threshold": 400, "mean": 200.0, "standard_error": 0.0, "episodes": 100, "seed": 0}
    (tmp_path / "references.json").write_text(json.dumps({"CartPole-v1 {} None": known}))
    for seed in range(4):
        write_run(tmp_path, "CartPole-v1", "ppo", "acpg", seed, 500)
    names = {f"CartPole-v1__ppo_acpg__{seed}" for seed in (1, 2, 7)}
    assert sorted(study.scores_of(tmp_path, {}, names).seed) == [1, 2]
    assert len(study.scores_of(tmp_path, {})) == 4


def test_a_threshold_that_the_file_gives_no_more(tmp_path):
    write_run(tmp_path, "CartPole-v1", "ppo", "acpg", 1, 500)
    known = {"mean": 20.0, "standard_error": 0.0, "episodes": 100, "seed": 0}
    (tmp_path / "references.json").write_text(json.dumps({"CartPole-v1 {} None": known}))
    assert study.scores_of(tmp_path, {"CartPole-v1": 220}).norm_final[0] > 2
    assert study.scores_of(tmp_path, {}).norm_final[0] == pytest.approx(1, abs=0.06)  # 475


def test_a_primary_outcome_without_pairs_has_no_verdict(monkeypatch):
    """All runs of an arm failed, say: the others' outcomes are given nevertheless."""
    (part,), outcomes, *_ = study.read_study(ROOT / "benchmark" / "small.toml")
    rng = np.random.default_rng(0)
    own = [(rng.normal(0.5, 0.01, size=20), rng.normal(0.8, 0.01, size=20))]
    monkeypatch.setattr(study, "paired_cells", lambda part, read, arm, measure: own if arm == "acpg" else [])
    chosen = dict.fromkeys(study.cells_of(part), "2.5e-3")
    rows = study.primary_rows(outcomes, None, {part.name: (chosen, chosen)})
    assert [row["verdict"] for row in rows] == ["ahead", "none: runs of 0 of 1 tasks"]


def test_arms_without_seeds_of_the_grid_are_in_its_figure(tmp_path, monkeypatch):
    """On those of the tuning; the sensitivities compare arms on the same seeds only."""
    means = {(env, arm): [0.2, 0.5, 0.3] for env in "ab" for arm in ("baseline", "acpg", "more")}
    scores = make_scores(means).assign(norm_final=0.7)
    part = make_part(arms=["baseline", "acpg", "more=acpg:"], tuning=dict.fromkeys(("baseline", "acpg", "more"), [1]))
    monkeypatch.setattr(study, "scores_of", lambda folder, *_: scores)
    (tmp_path / "p").mkdir()
    args = SimpleNamespace(out=tmp_path, thresholds={}, planned={("p", "grid"): set(), ("p", "tuning"): set()})
    text = "\n".join(study.sensitivity_lines(part, args))
    assert "| a | ppo | more | tuning | 0.200 | 0.500 | 0.300 |" in text and "| a | ppo | acpg | grid |" in text
    assert "| acpg | mean over the grid |" in text and "| more | mean over the grid |" not in text
    assert set(pd.read_csv(tmp_path / "p" / "grid.csv").arm) == {"baseline", "acpg", "more"}


def test_print_only_prints(tmp_path, monkeypatch, capsys):
    """What is left to run, or that nothing is; nothing is made, and no report written."""
    path, out = tmp_path / "study.toml", tmp_path / "out"
    path.write_text(SMALL)
    args = sweep.Args(study=path, out=out, print=True)
    with pytest.raises(SystemExit):
        study.main(args)
    assert all("--runs-only" in line for line in capsys.readouterr().out.splitlines()) and not out.exists()
    monkeypatch.setattr(sweep.Job, "record", lambda job, packed: {})
    chosen = dict.fromkeys(
        study.cells_of(make_part(tasks={"CartPole-v1": 1}, arms=["baseline", "acpg", "frozen=acpg:"])), "1"
    )
    monkeypatch.setattr(study, "choose", lambda scores, part: (chosen, chosen))
    monkeypatch.setattr(study, "scores_of", lambda *args, keep: None)
    study.main(args)
    said = capsys.readouterr()
    assert said.out == "" and "nothing is left" in said.err and not out.exists()


def test_a_study_leaves_signals_as_they_were(tmp_path):
    """There is more to do after a stage: what comes then must not be taken for a signal to a sweep that is over."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    job = SimpleNamespace(record=lambda packed: None, path=tmp_path / "x", args={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "refuse_other_settings", lambda *_: None)
        patch.setattr(sweep, "write_manifest", lambda *_: None)
        patch.setattr(sweep, "sweep", lambda *_: [signal.signal(number, lambda *_: None) for number in numbers] and [])
        assert study.run(make_part(), sweep.Args(out=tmp_path), "tuned", [job]) == []
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("name, text", [("study.json", ""), ("study.json", "[]"), ("study.json", "{}")])
def test_a_damaged_record_ends_in_one_line(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    result = run(ROOT / "benchmark" / "small.toml", tmp_path)
    said = [line for line in result.stderr.splitlines() if "core-hours" not in line]
    assert result.returncode == 1 and len(said) == 1 and name in said[0], result.stderr


def test_the_folder_of_something_else_is_refused(tmp_path):
    """Nothing of another study's, or of a sweep's, is overwritten."""
    for name, text, word in (
        ("study.json", '{"name": "other.toml", "sha256": "", "commit": ""}', "other.toml"),
    ) + tuple((name, "mine", name) for name in ("report.md", "manifest.json")):
        out = tmp_path / word
        out.mkdir()
        (out / name).write_text(text)
        result = run(ROOT / "benchmark" / "small.toml", out)
        assert result.returncode == 1 and word in result.stderr.splitlines()[-1] and (out / name).read_text() == text


def test_edges():
    assert study.edges(make_part(values=["1e-3", "2e-4", "1e-1"])) == ["2e-4", "1e-1"]
    assert study.edges(make_part(values=["tanh", "relu"])) == []


def test_nothing_is_chosen_while_runs_of_the_tuning_are_missing(tmp_path, monkeypatch):
    """With them another value may be chosen, for which the report's runs would have to be made again; other parts go
    on."""
    path = tmp_path / "study.toml"
    second = SMALL[SMALL.index("[[part]]") :].replace('name = "cartpole"', 'name = "again"')
    path.write_text(SMALL + second)
    stages = []
    monkeypatch.setattr(study, "stage", lambda part, args, name, jobs: stages.append((part.name, name)) or jobs[:2])
    with pytest.raises(SystemExit, match="4 runs failed: .*101.* for cartpole, again"):
        study.main(sweep.Args(study=path, out=tmp_path / "out"))
    assert stages == [("cartpole", "tuning"), ("again", "tuning")] and not (tmp_path / "out" / "report.md").exists()


def test_a_setting_at_one_arms_edge():
    part = make_part()
    own = {("a", "ppo", "baseline"): "1e-3", ("a", "ppo", "acpg"): "1e-2"}
    own |= {("b", "ppo", "baseline"): "1e-3", ("b", "ppo", "acpg"): "1e-1"}
    assert study.one_edge(part, own, "acpg") == 1 and study.one_edge(part, own, "acpg", envs=["b"]) == 0
    assert study.one_edge(make_part(values=["1e-3"]), own, "acpg") == 0


def test_p_value():
    """For many values near that of a t test; tiny where all differences are alike."""
    rng = np.random.default_rng(0)
    x = rng.normal(0.4, 1, size=40)
    assert study.p_value([x]) == pytest.approx(stats.ttest_1samp(x, 0).pvalue, abs=0.01)
    assert study.p_value([np.full(10, 0.1), np.full(10, 0.2)]) == 1e-4  # the least that 20,000 resamples can tell


def test_parts_that_only_tune_or_only_report(tmp_path):
    """Without report seeds nothing but the tuning runs; with a single value there is nothing to tune."""
    path = tmp_path / "study.toml"
    short = SMALL.replace('primary = ["acpg auc", "frozen final"]', "")
    path.write_text(short.replace(', report = "1-5"', ""))
    (part,), outcomes, *_ = study.read_study(path)
    assert outcomes == [] and study.plan_all([part], sweep.Args(out=tmp_path)).keys() == {("cartpole", "tuning")}
    path.write_text(short.replace('tuning = "101-102", ', "").replace('"1e-6", ', ""))
    (part,), *_ = study.read_study(path)
    assert study.plan_all([part], sweep.Args(out=tmp_path)).keys() == {("cartpole", "report")}


def test_primary_outcomes_over_parts(tmp_path, monkeypatch):
    """A mean over the tasks of all parts; Holm and the corrected level count the outcomes of the whole file."""
    path = tmp_path / "study.toml"
    second = SMALL[SMALL.index("[[part]]") :].replace('name = "cartpole"', 'name = "again"')
    second = second.replace('primary = ["acpg auc", "frozen final"]', "")
    path.write_text(f"[[primary]]\noutcome = 'acpg final'\nparts = ['cartpole', 'again']\n{SMALL}{second}")
    parts, outcomes, *_ = study.read_study(path)
    assert outcomes[-1] == ("acpg final", parts) and len(outcomes) == 3
    rng = np.random.default_rng(0)
    base = rng.normal(0.5, 0.01, size=20)
    gains = {"auc": (0.2,), "final": (0.0, 0.5)}  # of the first part, of the second

    def cells(part, read, arm, measure):
        gain = -0.3 if arm == "frozen" else gains[measure][parts.index(part)]
        return [(base, base + gain + rng.normal(0, 0.01, size=20))]  # one for each part's single task

    monkeypatch.setattr(study, "paired_cells", cells)
    own = {
        (env, "ppo", arm): value
        for env in parts[0].tasks
        for arm, value in (("baseline", "2.5e-3"), ("acpg", "5e-4"), ("frozen", "2.5e-3"))
    }
    rows = study.primary_rows(outcomes, None, {part.name: (own, own) for part in parts})
    assert [row["one_edge"] for row in rows] == [1, 0, 2]
    assert [row["verdict"] for row in rows] == ["ahead", "behind", "ahead"]
    assert [row["difference"] for row in rows] == [pytest.approx(x, abs=0.02) for x in (0.2, -0.3, 0.25)]
    assert [row["tasks"] for row in rows] == [1, 1, 2]
    for row in rows:
        assert row["corrected_low"] < row["low"] < row["difference"] < row["high"] < row["corrected_high"]


@pytest.mark.parametrize(
    "difference, half, p, verdict",
    [
        (0.02, 0.01, 1e-4, "equivalent"),  # surely more, and no matter
        (0.06, 0.02, 0.01, "ahead"),
        (-0.06, 0.02, 0.01, "behind"),
        (0.06, 0.02, 0.06, "not decided"),
        (0.0, 0.06, 1.0, "not decided"),
    ],
)
def test_primary_verdict(difference, half, p, verdict):
    row = {"difference": difference, "corrected_low": difference - half, "corrected_high": difference + half}
    whole = row | {"p_holm": p, "seeds": 5, "tasks": 6, "of_tasks": 6}
    assert study.primary_verdict(whole) == verdict
    assert study.primary_verdict(whole | {"seeds": 4}).startswith("none")
    assert study.primary_verdict(whole | {"tasks": 5}) == "none: runs of 5 of 6 tasks"


def test_seeds():
    assert study.seeds_of("3-5", "x") == [3, 4, 5] and study.seeds_of(7, "x") == [7]
    assert study.seeds_of(["1-2", 9], "x") == [1, 2, 9]


def test_common_seeds_are_the_reports_unless_given(tmp_path):
    path = tmp_path / "study.toml"
    for more, common in (("", [1, 2, 3, 4, 5]), (', common = "7-8"', [7, 8])):
        path.write_text(SMALL.replace('report = "1-5"', f'report = "1-5"{more}'))
        part = study.read_study(path)[0][0]
        assert part.common == dict.fromkeys(part.names, common)
        assert part.report == dict.fromkeys(part.names, [1, 2, 3, 4, 5])


def test_jobs_keep_stages_and_settings_apart(tmp_path):
    """Arms are called by their value where all values run, and by their name where one was chosen."""
    (part,), outcomes, thresholds, margin = study.read_study(ROOT / "benchmark" / "small.toml")
    args, settings = sweep.Args(out=tmp_path), {("CartPole-v1", "ppo", "frozen"): ["2.5e-3"]}
    job, *_ = study.jobs_of(part, args, "tuning", settings, part.tuning)
    assert job.args["exp_name"] == "ppo_frozen.2.5e-3" and job.args["learning_rate"] == 2.5e-3
    assert job.args["etf_scale"] == 1e-6 and job.args["seed"] == 101 and job.args["total_timesteps"] == 30_000
    jobs = study.jobs_of(part, args, "tuned", settings, part.report)
    assert [job.args["seed"] for job in jobs] == [1, 2, 3, 4, 5] and jobs[0].args["exp_name"] == "ppo_frozen"
    assert jobs[0].args["learning_rate"] == 2.5e-3 and jobs[0].path.is_relative_to(tmp_path / "cartpole" / "tuned")
    assert thresholds == {} and margin == 0.05 and outcomes == [("acpg auc", [part]), ("frozen final", [part])]


def test_slurm_submits_the_first_stage_and_a_job_that_goes_on(tmp_path):
    """With a stand-in for sbatch, which writes down what it is told."""
    stub = tmp_path / "bin" / "sbatch"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\necho 7\n')
    stub.chmod(0o755)
    command = [sys.executable, str(ROOT / "benchmark" / "sweep.py"), "--study", str(ROOT / "benchmark" / "small.toml")]
    command += ["--out", str(tmp_path / "out"), "--slurm"]
    environment = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and "submitted 12 runs" in result.stdout, result.stderr
    array, then = (tmp_path / "told").read_text().splitlines()
    assert "--array=1-12" in array and "--dependency=afterany:7" in then
    for word in ("--slurm", "small.toml", f"--out={tmp_path / 'out'}"):
        assert word in then.partition("--wrap=")[2]
    assert "--report-only" not in then and "thresholds" not in then
    commands = (tmp_path / "out" / "cartpole" / "tuning" / "slurm" / "commands.txt").read_text()
    assert commands.count("--runs-only") == 12 and "--study" not in commands


def test_slurm_neither_submits_twice_nor_without_end(tmp_path, monkeypatch):
    """Outside a job, nothing while the queue has this study's; in the job that goes on, not what has just failed."""
    path, told = tmp_path / "study.toml", []
    path.write_text(SMALL)
    monkeypatch.setattr(sweep, "submit", lambda args, jobs, then: told.append(len(jobs)))
    args = sweep.Args(study=path, out=tmp_path / "out", slurm=True)
    queue = ["7,8"]
    monkeypatch.setattr(sweep, "submitted", lambda out: queue[0])
    monkeypatch.setattr(study.fcntl, "flock", lambda *_: None)  # which another process would not hold any more
    (part,), *_ = study.read_study(path)
    args.out = args.out.resolve()
    jobs = study.plan_all([part], args)["cartpole", "tuning"]
    folder = tmp_path / "out" / "cartpole" / "tuning" / "slurm"
    folder.mkdir(parents=True)
    (folder / "commands.txt").write_text("".join(sweep.one_command(job) + "\n" for job in jobs))
    with pytest.raises(SystemExit, match="7,8"):
        study.main(args)
    assert told == []
    monkeypatch.setenv(study.CHAIN, "1")
    with pytest.raises(SystemExit, match="12 runs failed"):
        study.main(args)
    assert told == [] and len(json.loads((folder.parent / "manifest.json").read_text())["runs"]) == 12
    monkeypatch.delenv(study.CHAIN)
    queue[0] = ""  # by hand, when nothing is queued, all is tried anew
    with pytest.raises(SystemExit) as end:
        study.main(args)
    assert told == [12] and end.value.code == 0 and not (folder / "commands.txt").exists()


def test_two_studies_into_one_folder(tmp_path):
    with open(tmp_path / "study.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run(ROOT / "benchmark" / "small.toml", tmp_path)
    assert result.returncode == 1 and "another study" in result.stderr and not (tmp_path / "study.json").exists()


@pytest.mark.slow
def test_a_small_study_to_its_end(tmp_path):
    """Its winner is known: `frozen` cannot learn, and nothing learns at the smaller rate."""
    path, out = tmp_path / "tiny.toml", tmp_path / "out"
    path.write_text(SMALL)
    listed = run(path, out, "--print")
    assert listed.returncode == 0 and listed.stdout.count("sweep.py") == 12 and "core-hours" in listed.stderr
    first = listed.stdout.splitlines()[0]
    assert subprocess.run(first, shell=True, capture_output=True).returncode == 0
    result = run(path, out)
    assert result.returncode == 0, result.stderr
    assert "12 runs, 1 of them finished before" in result.stdout and "frozen faster: contradicted" in result.stdout
    text = (out / "report.md").read_text()
    assert "| CartPole-v1 | ppo | baseline | 2.5e-3 *edge* | 2.5e-3 |" in text
    settings = pd.read_csv(out / "chosen.csv", dtype=str).set_index("arm")
    assert settings.value["acpg"] == settings.common["acpg"] == "2.5e-3"
    assert "frozen, final return, cartpole | -" in text and "| behind |" in text and "changed after" not in text
    assert (out / "cartpole" / "grid.png").exists()
    cells = pd.read_csv(out / "cartpole" / "grid.csv").set_index(["arm", "value"])
    assert set(cells.seeds) == {2} and set(cells.failed) <= {0, 1, 2}
    assert cells.loc[("frozen", 2.5e-3), "failed"] == 2 and cells.loc[("frozen", 2.5e-3), "area"] < 0.3
    for stage in ("tuned", "common"):
        assert (out / "cartpole" / "reports" / stage / "report.md").exists()

    # packed, it is finished; a file that changed is said to have
    for stage in ("tuning", "tuned"):
        pack = [sys.executable, str(ROOT / "benchmark" / "pack.py"), str(out / "cartpole" / stage), "--remove"]
        assert subprocess.run(pack, capture_output=True).returncode == 0
    path.write_text(path.read_text() + "# later\n")
    result = run(path, out)
    assert result.returncode == 0 and "finished before" not in result.stdout, result.stderr
    assert "changed after the first run" in (out / "report.md").read_text()
    assert json.loads((out / "study.json").read_text())["commit"].startswith("uncommitted")


def test_a_common_setting_shares_runs(tmp_path, monkeypatch):
    """A task whose own setting is the common one is in both reports, with the same runs, as far as those are wanted."""
    runs = {}
    for stage, cells in (("tuned", ("a1", "a3", "b1")), ("common", ("b1",))):
        records = [{"args": {"env_id": env, "exp_name": "ppo_acpg", "seed": int(seed)}} for env, seed in cells]
        names = [f"{env}{seed}" for env, seed in cells]
        runs[stage] = [SimpleNamespace(record=record, name=x) for record, x in zip(records, names, strict=True)]
    written = {}
    monkeypatch.setattr(study.report, "find_runs", lambda folder: (runs[folder.name], {}))
    monkeypatch.setattr(study, "write_packed", lambda path, runs: written.update({path.parent.name: list(runs)}))
    monkeypatch.setattr(study.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=0))
    own = {("a", "ppo", "acpg"): "1", ("b", "ppo", "acpg"): "2"}
    jobs = {}
    for stage, given in runs.items():
        records = [run.record["args"] for run in given]
        jobs[stage] = [SimpleNamespace(path=tmp_path / f"{own['env_id']}{own['seed']}", args=own) for own in records]
    for stage, given in jobs.items():
        (tmp_path / "p" / stage).mkdir(parents=True)
        known = {job.path.name: {"status": "finished", "of": stage} for job in given}
        (tmp_path / "p" / stage / "manifest.json").write_text(json.dumps({"runs": known}))
    left = SimpleNamespace(record={"args": runs["tuned"][0].record["args"]}, name="a9")  # of an earlier file
    runs["tuned"].append(left)
    args = SimpleNamespace(out=tmp_path, thresholds={}, margin=0.05)
    study.publish(make_part(), args, own, dict.fromkeys(own, "1"), jobs)
    assert written["tuned"] == runs["tuned"][:-1]
    assert written["common"] == [runs["common"][0], runs["tuned"][0]]
    manifest = json.loads((tmp_path / "p" / "reports" / "common" / "manifest.json").read_text())["runs"]
    assert {name: run["of"] for name, run in manifest.items()} == {"b1": "common", "a1": "tuned"}
