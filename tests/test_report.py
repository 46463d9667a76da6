"""report.py: its estimators on cases worked by hand, the level of its intervals, and what it says of incomplete
sweeps."""

import json
import math
import os
import shutil
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
from helpers import ROOT
from PIL import Image
from scipy import stats

import interval_coverage
import intervals
import plots
import ppo_baseline
import reading
import report

WELL = {"diverged": False, "endless": False, "stale": False}  # how a run did not fail, in a table of runs
DIVERGED = {"status": "failed", "error": "error: non-finite loss at update 3 (step 9): x"}


def write_run(
    folder, env_id="CartPole-v1", algo="ppo", arm="baseline", seed=1, level=300.0, steps=10000, start=0.0, **more
):
    """A finished run whose return goes linearly from `start` to `level`."""
    path = folder / "runs" / ppo_baseline.run_name(env_id, f"{algo}_{arm}", seed)
    path.mkdir(parents=True)
    args = {"env_id": env_id, "exp_name": f"{algo}_{arm}", "seed": seed, "total_timesteps": steps, "env_kwargs": "{}"}
    args |= {"max_episode_steps": None, "learning_rate": 1e-3, "run_dir": str(path)} | more.pop("args", {})
    record = {"acpg_run": 1, "status": "finished", "args": args, "script_sha256": "x", "wall_time": 1.0, "versions": {}}
    record |= {"global_step": steps, "final_return": level} | more
    (path / "run.json").write_text(json.dumps(record))
    grid = np.linspace(0, steps, 51)
    curve = pd.DataFrame({"global_step": grid, "charts/episodic_return": np.linspace(start, level, 51)})
    curve.loc[0, "charts/episodic_return"] = np.nan
    for metric in plots.COLLAPSE:
        curve[f"collapse/{metric}"], curve[f"collapse_null/{metric}"] = np.linspace(0.2, 0.8, 51), 0.1
    curve.to_csv(path / "progress.csv", index=False)


def write_sweep(folder, seeds=4, envs=("CartPole-v1", "Acrobot-v1"), arms=("baseline", "acpg"), gain=60.0):
    rng = np.random.default_rng(0)
    for env_id in envs:
        for seed in range(1, seeds + 1):
            noise = rng.normal(0, 10)
            for k, arm in enumerate(arms):
                write_run(folder, env_id, "ppo", arm, seed, 300 + k * gain + noise + rng.normal(0, 3))


def make_report(folder, *more, **options):
    command = [sys.executable, str(ROOT / "benchmark" / "report.py"), str(folder), "--resamples", "2000", *more]
    return subprocess.run(command, capture_output=True, text=True, **options)


# Estimators


def test_summary_of_a_curve():
    """A ramp up to 1 over the first half, flat, then a fall to 0.5 in the last tenth."""
    curve = np.concatenate([np.linspace(0.02, 1, 50), np.ones(40), np.full(10, 0.5)])
    result = intervals.summarise(curve, 1000, 0.9)
    assert result["final"] == pytest.approx(0.5)
    assert result["best"] == pytest.approx(1.0)
    assert result["drawdown"] == pytest.approx(0.5)
    assert result["auc"] == pytest.approx((25.5 + 40 + 5) / 100)
    # the mean of points k-4..k is 0.02 (k - 2), first >= 0.9 at k = 47, that is at step 470
    assert result["steps_to_threshold"] == pytest.approx(470) and result["reached"]


def test_steps_to_threshold_are_censored_and_undefined():
    curve = np.linspace(0, 1, 100)
    assert intervals.summarise(curve, 1000, 2.0)["steps_to_threshold"] == 1000
    assert not intervals.summarise(curve, 1000, 2.0)["reached"]
    assert math.isnan(intervals.summarise(curve, 1000, None)["steps_to_threshold"])


def test_grid_interpolates_and_holds_its_ends():
    curve = {"global_step": np.array([0.0, 250, 500, 750]), "x": np.array([np.nan, 10.0, np.nan, 30.0])}
    read = reading.on_grid(curve, "x", 1000)
    assert read[24] == 10.0 and read[49] == pytest.approx(20.0) and read[-1] == 30.0 and read[0] == 10.0
    assert np.isnan(reading.on_grid(curve, "absent", 1000)).all()


def test_cvar_is_the_mean_of_the_worst_quarter():
    assert intervals.cvar(np.array([9.0, 1.0, 5.0, 7.0, 2.0, 8.0, 6.0, 3.0])) == 1.5
    assert intervals.cvar(np.arange(10.0)) == 1.0  # three of ten
    assert intervals.cvar(np.arange(8.0).reshape(4, 2), axis=0).tolist() == [0.0, 1.0]


def test_iqm_is_the_mean_of_the_middle_half():
    scores = np.array([[0.0, 1.0, 2.0, 100.0], [3.0, 4.0, 5.0, -50.0]])
    assert intervals.iqm(scores) == pytest.approx(np.mean([1, 2, 3, 4]))
    assert intervals.iqm(np.stack([scores, scores + 1])).tolist() == pytest.approx([2.5, 3.5])


def test_probability_of_improvement():
    p, low, high = intervals.improvement(np.array([1.0, 2.0, -1.0, 0.0]))
    assert p == pytest.approx(2.5 / 4)
    assert low == pytest.approx(stats.binomtest(2, 4).proportion_ci(method="wilson").low)
    assert high == pytest.approx(stats.binomtest(3, 4).proportion_ci(method="wilson").high)
    p, low, high = intervals.improvement(np.ones(10))
    assert p == 1 and 0.6 < low < 0.8 and high == 1


def test_resampling_keeps_tasks_and_pairs():
    """A seed is drawn from its own task, and the same one in both arms."""
    one = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    a, b = intervals.resampled([one, 2 * one], np.random.default_rng(0), 500)
    assert a.shape == (500, 3, 2)
    assert set(np.unique(a[..., 0])) == {1.0, 2.0, 3.0} and set(np.unique(a[..., 1])) == {10.0, 20.0, 30.0}
    assert (b == 2 * a).all()
    assert (a[..., 1] != 10 * a[..., 0]).any()  # the tasks are drawn independently


@pytest.mark.parametrize(
    "draw, truth",
    [
        (lambda rng: rng.normal(size=10), 0.0),
        (lambda rng: rng.gamma(4.0, size=10), 4.0),
        (lambda rng: rng.exponential(size=10) - rng.normal(size=10), 1.0),
    ],
    ids=["normal", "gamma", "exponential minus normal"],
)
def test_the_interval_holds_its_level_at_ten_seeds(draw, truth):
    """Between 93 % and 97 %; the percentile bootstrap, at about 89 %, would not."""
    rng, trials, covered, percentile = np.random.default_rng(0), 3000, 0, 0
    for _ in range(trials):
        x = draw(rng)
        low, high = intervals.mean_interval(x, rng, resamples=1000)
        covered += low <= truth <= high
        low, high = np.quantile(x[rng.integers(10, size=(1000, 10))].mean(1), [0.025, 0.975])
        percentile += low <= truth <= high
    assert 0.93 < covered / trials < 0.97
    assert percentile / trials < 0.93


def test_the_interval_at_its_edges():
    rng = np.random.default_rng(0)
    assert intervals.mean_interval(np.array([5.0, 5.0, 5.0]), rng) == (5.0, 5.0)
    assert all(math.isnan(x) for x in intervals.mean_interval(np.array([5.0]), rng))
    assert intervals.mean_interval(np.array([1.0, 3.0]), rng) == pytest.approx(
        (2 - 12.7062, 2 + 12.7062), rel=1e-4
    )  # t of one
    low, high = intervals.mean_interval(np.array([1.0, 2.0, 3.0, 4.0, 6.0]), rng)
    wide = intervals.mean_interval(np.array([1.0, 2.0, 3.0, 4.0, 6.0]), rng, level=0.99)
    assert wide[0] < low < 3.2 < high < wide[1]


def test_an_expanded_interval_is_a_t_interval_where_that_is_right():
    """For the mean of normal values the bootstrap's quantiles are those of a normal with the biased standard
    deviation."""
    x = stats.norm.ppf((np.arange(10) + 0.5) / 10)
    draws = x.mean() + x.std() / np.sqrt(10) * stats.norm.ppf((np.arange(99999) + 0.5) / 99999)
    for level in (0.95, 0.99):
        ours = intervals.expanded_interval(draws, x.mean(), 10, 9, level)
        assert ours == pytest.approx(stats.ttest_1samp(x, 0).confidence_interval(level), rel=1e-3)
    low, high = intervals.expanded_interval(np.array([[1.0, 5], [2, 5], [3, 5]]), np.array([2.0, 5]), 10, 9)
    assert low[0] < 1 and high[0] > 3 and low[1] == high[1] == 5  # several statistics at once


def test_interval_of_a_difference_of_failure_rates():
    """By hand for ten pairs: all equal, 0 +- 1.96 sqrt(1) / 12; one up, three down, -2/12 +- 1.96 sqrt(5 - 4/12) /
    12."""
    assert intervals.failure_interval(np.zeros(10)) == pytest.approx((-1.96 / 12, 1.96 / 12), rel=1e-4)
    low, high = intervals.failure_interval(np.array([-1, -1, -1, 1, 0, 0, 0, 0, 0, 0]))
    half = 1.959964 * math.sqrt(5 - 4 / 12) / 12
    assert (low, high) == pytest.approx((-2 / 12 - half, -2 / 12 + half))
    assert intervals.failure_interval(-np.ones(10))[0] == -1.0
    # tasks weigh the same: two of ten pairs are one of twenty, two of ten and forty are worth 4 / (1/10 + 1/40) pairs
    d = np.array([-1, -1, -1, 1, 0, 0, 0, 0, 0, 0])
    assert intervals.stratified_failures([d, d])[1:] == pytest.approx(intervals.failure_interval(np.tile(d, 2)))
    estimate, low, high = intervals.stratified_failures([d, np.tile(-d, 4)])
    half = 1.959964 * math.sqrt(32 * 0.4 + 1) / 34
    assert (estimate, low, high) == pytest.approx((0, -half, half))


@pytest.mark.parametrize("seeds", [(5, 20, 20, 20, 20, 20), (5, 40)])
@pytest.mark.parametrize("level, least", [(0.95, 0.93), (1 - 0.05 / 6, 0.985)])
def test_failure_rates_hold_their_level_at_unequal_seeds(seeds, level, least):
    """Both arms fail half of the time on the task of the fewest seeds, and never elsewhere."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        first = rng.integers(2, size=seeds[0]) - rng.integers(2, size=seeds[0])
        _, low, high = intervals.stratified_failures([first, *(np.zeros(n) for n in seeds[1:])], level)
        held += low <= 0 <= high
    assert held / 1000 > least


def test_the_worst_quarter_holds_its_level_at_unequal_seeds():
    """All spread is in the task of five seeds: as many degrees of freedom as that has, not as all have."""
    rng, sizes, both = np.random.default_rng(0), (5, 40), []
    draw = lambda: [rng.normal(0, s, size=n) for n, s in zip(sizes, (1.0, 0.01), strict=True)]  # noqa: E731
    for _ in range(400):
        both.append(intervals.aggregate("cvar", draw(), draw(), rng, 400)[1:])
    assert np.mean([low <= 0 <= high for low, high in both]) > 0.92


def test_the_committed_pairs_of_the_coverage_study(tmp_path):
    """Baseline beside ACPG, seed by seed, tasks of all parts in order; no other arms, no seeds of one arm alone."""
    head, path = "name,env,algo,arm,seed,norm_final\n", "reports/tuned/report/runs.csv"
    parts = {
        "b": "r,B-v1,a2c,acpg,2,.4\nr,B-v1,a2c,baseline,1,.1\nr,B-v1,a2c,acpg,1,.3\nr,B-v1,a2c,baseline,2,.2\n"
        "r,B-v1,a2c,random,1,.9\nr,B-v1,a2c,acpg,3,.8\n",
        "c": "r,A-v1,ppo,acpg,5,.6\nr,A-v1,ppo,baseline,5,.5\n",
        "d": "r,A-v1,trpo,etf,5,.6\nr,A-v1,trpo,random,5,.5\nr,A-v2,ppo,acpg,5,.6\n",
    }
    for part, rows in parts.items():
        (tmp_path / part / path).parent.mkdir(parents=True)
        (tmp_path / part / path).write_text(head + rows)
    pairs = [x.tolist() for x in interval_coverage.committed(tmp_path)]
    assert pairs == [[[0.5, 0.6]], [[0.1, 0.3], [0.2, 0.4]]]
    with pytest.raises(SystemExit, match="has no reports"):
        interval_coverage.committed(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "gamma"])
def test_the_aggregate_intervals_hold_their_level_at_ten_seeds(kind):
    """On four tasks; and the plain percentile bootstrap does not, for the worst quarter."""
    family, corrected = len(intervals.FAMILY), 1 - 0.05 / len(intervals.FAMILY)
    held = interval_coverage.of_aggregates(4, kind, 0.95, trials=300, resamples=500)[:family]
    assert (held > 0.91).all() and 0.93 < held.mean() < 0.97, held  # the standard error of each is .013
    held = interval_coverage.of_aggregates(4, kind, corrected, trials=300, resamples=1000)[:family]
    assert (held > 0.97).all() and held.mean() > corrected - 0.01, held
    rng = np.random.default_rng(0)
    draw, truth, ours, plain = interval_coverage.sweeps(kind, 4, rng), [], 0, 0
    truth = np.mean([intervals.aggregate("cvar", *draw(), rng, 2)[0] for _ in range(3000)])
    for _ in range(300):
        base, treated = draw()
        _, low, high = intervals.aggregate("cvar", base, treated, rng, 500)
        ours += low <= truth <= high
        pair = [np.stack(arm, axis=-1) for arm in (base, treated)]
        draws = [intervals.cvar(x, axis=-2).mean(-1) for x in intervals.resampled(pair, rng, 500)]
        low, high = np.quantile(draws[1] - draws[0], [0.025, 0.975])
        plain += low <= truth <= high
    assert plain / 300 < ours / 300 - 0.02


def test_the_stratified_mean():
    """Of tasks that weigh the same however many seeds they have; for one task it is the interval of its mean."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 0.1, size=10), rng.normal(3, 0.1, size=40)
    estimate, low, high = intervals.stratified_mean([x, y], rng)
    assert estimate == pytest.approx((x.mean() + y.mean()) / 2) and low < estimate < high
    # the variance of a mean of means: (.1^2 / 10 + .1^2 / 40) / 4
    assert high - low == pytest.approx(2 * 2.1 * math.sqrt(0.01 * (1 / 10 + 1 / 40) / 4), rel=0.25)
    one = [
        intervals.stratified_mean([x], np.random.default_rng(1))[1:],
        intervals.mean_interval(x, np.random.default_rng(1)),
    ]
    assert one[0] == one[1]
    assert intervals.stratified_mean([x, x + 1], rng)[0] == pytest.approx(x.mean() + 0.5)
    # few values: Satterthwaite's t, of (v1 + v2)^2 / (v1^2 + v2^2) = 2 degrees of freedom for two equal pairs
    _, low, high = intervals.stratified_mean([np.array([0.0, 2.0])] * 2, rng)
    assert high == pytest.approx(1 + stats.t.ppf(0.975, 2) * math.sqrt(1 + 1) / 2)
    assert math.isnan(intervals.stratified_mean([x, np.array([1.0])], rng)[1])


def test_superiority_is_mann_and_whitneys():
    base, treated = np.array([1.0, 2, 3, 4]), np.array([2.0, 5, 6])
    p, low, high = intervals.superiority(base, treated)
    assert p == pytest.approx(stats.mannwhitneyu(treated, base).statistic / 12) == pytest.approx((1.5 + 4 + 4) / 12)
    assert 0 < low < p < high <= 1
    p, low, high = intervals.superiority(np.arange(10.0), np.arange(10.0) + 100)
    assert p == high == 1 and 0.7 < low < 0.9  # a width even where all runs of an arm do better
    assert intervals.superiority(np.arange(10.0) + 100, np.arange(10.0)) == pytest.approx((0, 0, 1 - low))
    assert intervals.superiority(np.ones(5), np.ones(5))[0] == 0.5
    p, low, high = intervals.stratified_superiority([(base, treated), (base, base)])
    assert p == pytest.approx((9.5 / 12 + 0.5) / 2) and low < p < high
    alone = intervals.superiority(base, treated)
    assert high - low < alone[2] - alone[1]  # two tasks say more than one


def test_as_in_rliable():
    """The values that rliable 1.2.0 gives for these scores."""
    base = np.array([[0.1, 0.9], [0.4, 0.7], [0.35, 0.8], [0.6, 1.1], [0.2, 0.95]])
    treated = np.array([[0.5, 0.9], [0.45, 1.0], [0.3, 0.85], [0.9, 1.2], [0.25, 0.6]])
    assert (intervals.iqm(base), intervals.iqm(treated)) == pytest.approx((0.625, 0.7))  # aggregate_iqm
    p = intervals.stratified_superiority(list(zip(base.T, treated.T, strict=True)))[0]
    assert p == pytest.approx(0.61)  # probability_of_improvement
    mean = intervals.aggregate("mean", list(base.T), list(treated.T), np.random.default_rng(0), 100)[0]
    assert mean == pytest.approx(0.695 - 0.61)  # aggregate_mean


def test_what_survives_the_trimming():
    """Of eight runs the middle four: all of the middle task's."""
    scores = np.array([[0.0, 5.0], [1.0, 6.0], [10.0, 7.0], [11.0, 8.0]])
    assert intervals.survival(scores).tolist() == [0.0, 1.0]


def test_sign_flips_and_holm():
    rng = np.random.default_rng(0)
    assert intervals.flip_test(np.ones(10), rng) == pytest.approx(2 / 1024)
    assert intervals.flip_test(np.array([1.0, -1, 1, -1]), rng) == 1
    # of (3, 2, -1) eight sums: 6, 4, 2, 0 and their negatives; at least 4 are four of them
    assert intervals.flip_test(np.array([3.0, 2, -1]), rng) == 0.5
    assert 0.0 < intervals.flip_test(np.ones(30), rng) < 1e-3
    # .01 * 4, .02 * 3, .03 * 2 -> .06, .04 * 1 -> .06
    assert intervals.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert intervals.holm([0.9, 0.8]).tolist() == [1, 1]


def test_one_value_far_off_does_not_blow_the_interval_up():
    x = np.array([-84.0, -85, -83, -84, -86, -82, -84, -85, -83, -500])
    low, high = intervals.mean_interval(x, np.random.default_rng(0))
    assert low < x.mean() < high and high - low < 3 * x.std(ddof=1)


@pytest.mark.parametrize("arm, against, sign", [("acpg", "baseline", 1), ("baseline", "acpg", -1)])
def test_every_measure_knows_which_way_is_better(arm, against, sign):
    """ACPG higher, earlier and steadier by far: all are in its favour, and against the baseline the other way round."""
    rng, rows = np.random.default_rng(0), []
    for seed in range(10):
        for name, final, auc, steps, spread in (("baseline", 0.4, 0.3, 0.9, 0.1), ("acpg", 0.9, 0.8, 0.3, 0.01)):
            values = rng.normal([final, auc, steps], spread)
            values = dict(zip(("norm_final", "norm_auc", "norm_steps"), values, strict=True))
            rows.append({"env": "e", "algo": "ppo", "arm": name, "seed": seed} | values | WELL)
    family = (*intervals.FAMILY, *intervals.EXPLORATORY)
    table = intervals.compare_aggregates(pd.DataFrame(rows), arm, rng, 2000, against, family=family)
    assert len(table) == 10 and all((row["tasks"], row["most_seeds"]) == (1, 10) for row in table)
    for row in table:
        none = 0.5 if "probability" in row["measure"] else 0
        assert min(sign * (row["low"] - none), sign * (row["high"] - none)) > 0, row
        assert row["low"] <= row["estimate"] <= row["high"]


def test_aggregates_pair_seeds_whatever_their_order():
    """ACPG's score is its own seed's baseline score plus .05, which only the pairs can tell from noise of .1."""
    rng, rows = np.random.default_rng(0), []
    for seed in rng.permutation(10):
        score = rng.normal(0.7, 0.1)
        rows += [(seed, "baseline", score), (-seed % 10, "acpg", None)]
    scores = pd.DataFrame(rows, columns=["seed", "arm", "norm_final"]).assign(env="e", algo="ppo", **WELL)
    base = scores[scores.arm == "baseline"].set_index("seed").norm_final
    own = scores.arm == "acpg"
    scores.loc[own, "norm_final"] = scores.seed[own].map(base) + 0.05
    scores = scores.assign(norm_auc=scores.norm_final, norm_steps=1 - scores.norm_final)
    table = {row["measure"]: row for row in intervals.compare_aggregates(scores, "acpg", rng, 2000)}
    row = table["final return, mean difference"]
    assert row["low"] == pytest.approx(0.05) == row["high"]


def test_unequal_seeds_all_count():
    """A task with twenty pairs and one with ten: all thirty are used, and the tasks weigh the same."""
    rng, rows = np.random.default_rng(0), []
    for env, seeds, gain in (("a", 20, 0.1), ("b", 10, 0.3)):
        for seed in range(seeds):
            for arm in ("baseline", "acpg"):
                score = rng.normal(0.5, 0.1) + gain * (arm == "acpg")
                rows.append({"env": env, "algo": "ppo", "arm": arm, "seed": seed, "norm_final": score} | WELL)
    scores = pd.DataFrame(rows)
    scores = scores.assign(norm_auc=scores.norm_final, norm_steps=1.0)
    (row,) = (
        r
        for r in intervals.compare_aggregates(scores, "acpg", rng, 2000)
        if r["measure"].startswith("final return, mean")
    )
    wide = scores.pivot(index=["env", "seed"], columns="arm", values="norm_final")
    expected = (wide.acpg - wide.baseline).groupby("env").mean().mean()
    assert row["estimate"] == pytest.approx(expected) and (row["fewest_seeds"], row["most_seeds"]) == (10, 20)


# Verdicts: each rule with a case that would fool a weaker one


def judged(claim, rows, final=(-0.01, 0.2), learns=True, margin=0.05):
    """The verdict on a claim with these (low, high) of its mean difference and its probability of improvement."""
    names = ("mean difference", "probability of improvement")
    table = [{"measure": name, "low": low, "high": high} for name, (low, high) in zip(names, rows, strict=False)]
    return intervals.verdict(claim, table, {"low": final[0], "high": final[1]}, margin, learns)


def test_verdicts():
    assert judged("faster", [(0.02, 0.2)]) == "supported"
    assert judged("faster", [(-0.02, 0.2), (0.55, 0.8)]) == "supported"  # more often, if not by more
    assert judged("faster", [(-0.02, 0.2), (0.4, 0.6)]) == "not distinguishable"
    assert judged("faster", [(-0.2, -0.02), (0.4, 0.6)]) == "contradicted"
    assert (
        judged("faster", [(-0.02, 0.2), (0.2, 0.45)])
        == "not distinguishable: more often behind, perhaps ahead in the mean"
    )
    assert judged("faster", [(-0.2, 0.02), (0.2, 0.45)]) == "contradicted"
    assert judged("faster", [(-0.2, -0.02), (0.55, 0.8)]) == "mixed"
    assert judged("faster", [(math.nan, math.nan)]) == "not distinguishable"  # all steps censored, or a single pair


def test_equivalent_takes_an_interval_within_the_margin():
    assert judged("better", [(-0.04, 0.04), (0.4, 0.6)]) == "equivalent"
    assert judged("better", [(-0.04, 0.06), (0.4, 0.6)]) == "not distinguishable"
    assert judged("better", [(0.01, 0.04), (0.55, 0.8)]) == "equivalent"  # a difference that does not matter
    assert judged("better", [(-0.04, 0.06), (0.4, 0.6)], margin=0.1) == "equivalent"


def test_an_arm_that_returns_less_is_not_more_robust():
    """Steadier, since it never gets far: the worst quarter is better, the final return may be worse by a fifth."""
    assert judged("more robust", [(0.1, 0.3)], final=(-0.2, 0.1)) == "not supported: it may return less"
    assert judged("more robust", [(0.1, 0.3)], final=(-0.04, 0.1)) == "supported"
    assert judged("more robust", [(0.1, 0.3)], final=(math.nan, math.nan)) == "not supported: it may return less"
    assert judged("faster", [(0.1, 0.3)], final=(-0.2, 0.1)) == "supported"


def test_an_arm_that_never_learns_is_never_supported():
    """Above a baseline that falls below the random policy."""
    for claim in intervals.CLAIMS:
        assert judged(claim, [(0.1, 0.3)], learns=False) == "not supported: the arm never learns"
    assert judged("faster", [(-0.3, -0.1)], learns=False) == "contradicted"


@pytest.mark.parametrize("gain, faster", [(60.0, "supported"), (0.0, "equivalent"), (-60.0, "contradicted")])
def test_a_known_difference_is_found(tmp_path, gain, faster):
    """On CartPole, where the arms differ by `gain` at the end, and by half of that on average."""
    write_sweep(tmp_path, seeds=10, envs=("CartPole-v1",), gain=gain)
    result = make_report(tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"acpg faster: {faster}" in result.stdout
    frame = pd.read_csv(tmp_path / "report" / "differences.csv").set_index("metric")
    assert frame.difference["auc"] == pytest.approx(gain / 2, abs=4)
    assert (frame.low["auc"] < frame.difference["auc"]) and (frame.difference["auc"] < frame.high["auc"])
    paired = pd.read_csv(tmp_path / "report" / "runs.csv").pivot(index="seed", columns="arm", values="auc")
    assert frame.difference["auc"] == pytest.approx((paired.acpg - paired.baseline).mean(), abs=1e-3)


def test_more_often_ahead_is_not_enough(tmp_path):
    """By next to nothing in eighteen of twenty pairs; in two the arm never learns."""
    often = "not distinguishable: more often ahead, perhaps behind in the mean"
    for claim in ("faster", "better"):
        assert judged(claim, [(-0.41, 0.03), (0.67, 1.0)]) == often
        assert judged(claim, [(-0.04, 0.2), (0.67, 1.0)]) == "supported"
    for seed in range(20):
        write_run(tmp_path, arm="baseline", seed=seed, level=450.0)
        write_run(tmp_path, arm="acpg", seed=seed, level=22.0 if seed < 2 else 452.0)
    result = make_report(tmp_path)
    assert f"acpg better: {often}" in result.stdout and f"acpg faster: {often}" in result.stdout, result.stdout


# The report


def test_everything_is_written(tmp_path):
    write_sweep(tmp_path)
    result = make_report(tmp_path)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    text = (tmp_path / "report.md").read_text()
    for name in ("verdicts", "curves", "collapse_ppo", "aggregate", "profile", "efficiency"):
        picture = tmp_path / "report" / f"{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and f"report/{name}.png" in text
    collapse = pd.read_csv(tmp_path / "report" / "collapse.csv")
    assert (collapse.untrained - 0.2).abs().max() < 1e-6 and (collapse.trained - 0.8).abs().max() < 1e-6
    assert (collapse.null - 0.1).abs().max() < 1e-6
    profile = pd.read_csv(tmp_path / "report" / "profile.csv")
    assert set(profile.arm) == {"baseline", "acpg"} and (profile.low <= profile.value + 1e-9).all()
    assert profile.low.min() == 0 and profile.high.max() == 1
    for _, own in profile.groupby("arm"):
        assert own.value.iloc[0] == 1 and own.value.iloc[-1] == 0 and (np.diff(own.value) <= 0).all()
    curves = pd.read_csv(tmp_path / "report" / "curves.csv.gz")
    last = curves[(curves.env == "CartPole-v1") & (curves.tag == "charts/episodic_return") & (curves.step == 10000)]
    ends = [
        pd.read_csv(path)["charts/episodic_return"].iloc[-1]
        for path in sorted(tmp_path.glob("runs/CartPole*acpg*/*.csv"))
    ]
    known = stats.ttest_1samp(ends, 0).confidence_interval(0.95)
    assert last[last.arm == "acpg"][["mean", "low", "high"]].to_numpy()[0] == pytest.approx(
        [np.mean(ends), *known], rel=1e-3
    )
    efficiency = pd.read_csv(tmp_path / "report" / "efficiency.csv")
    assert (efficiency.groupby("arm").value.last() > efficiency.groupby("arm").value.first()).all()
    references = json.loads((tmp_path / "references.json").read_text())
    (random,) = (value["mean"] for key, value in references.items() if key.startswith("CartPole"))
    assert 15 < random < 30
    runs = pd.read_csv(tmp_path / "report" / "runs.csv")
    cartpole = runs[runs.env == "CartPole-v1"]
    assert np.allclose(cartpole.norm_final, (cartpole.final - random) / (475 - random), atol=1e-3)


def test_failures_and_censored_steps(tmp_path):
    """Baseline fails, ACPG does not; neither reaches the threshold, so nothing is known of the steps' difference."""
    for seed in (1, 2, 3):
        write_run(tmp_path, arm="baseline", seed=seed, level=30 + seed)
        write_run(tmp_path, arm="acpg", seed=seed, level=400 + seed)
    assert make_report(tmp_path).returncode == 0
    frame = pd.read_csv(tmp_path / "report" / "differences.csv").set_index("metric")
    assert frame.difference["failed"] == -1 and frame.p_improvement["failed"] == 1
    assert frame.low["failed"] == -1 and frame.high["failed"] == pytest.approx(
        (-3 + 1.96 * math.sqrt(4 - 9 / 5)) / 5, rel=1e-2
    )
    assert frame.difference["steps_to_threshold"] == 0 and math.isnan(frame.low["steps_to_threshold"])
    frame = pd.read_csv(tmp_path / "report" / "aggregates.csv").set_index("measure")
    assert math.isnan(frame.low["share of the budget to the threshold, decrease"])
    assert frame.low["final return, mean difference"] > 0
    write_run(tmp_path, arm="baseline", seed=4, level=20)
    write_run(tmp_path, arm="acpg", seed=4, level=900)
    assert make_report(tmp_path).returncode == 0
    frame = pd.read_csv(tmp_path / "report" / "differences.csv").set_index("metric")
    assert frame.low["steps_to_threshold"] < frame.difference["steps_to_threshold"] < 0
    # of sixteen pairs of runs those with the one that got there are better, those of two that did not are ties
    assert frame.p_improvement["steps_to_threshold"] == (4 + 12 / 2) / 16


@pytest.mark.slow
def test_controls_are_compared_with_acpg(tmp_path):
    """On the tasks both have, with the sign of ACPG minus the control, and without verdicts of their own."""
    write_sweep(tmp_path, seeds=5, arms=("baseline", "acpg"))
    for seed in range(1, 6):
        write_run(tmp_path, arm="random", seed=seed, level=200.0 + seed)
    result = make_report(tmp_path)
    assert result.returncode == 0 and "against" not in result.stdout
    frame = pd.read_csv(tmp_path / "report" / "aggregates.csv")
    against = frame[(frame.arm == "acpg") & (frame.against == "random")].set_index("measure")
    assert len(against) == 6 and (against.tasks == 1).all()
    assert against.loc["final return, mean difference"].low > 0
    assert "ACPG against the controls" in (tmp_path / "report.md").read_text()
    for path in tmp_path.glob("runs/*baseline*"):  # without a baseline there are no verdicts, but still controls
        shutil.rmtree(path)
    assert make_report(tmp_path).returncode == 0
    frame = pd.read_csv(tmp_path / "report" / "aggregates.csv")
    assert len(frame) == 6 and frame.estimate.notna().all()
    assert "ACPG against the controls" in (tmp_path / "report.md").read_text()


def test_missing_runs_are_named(tmp_path):
    """One that crashed, one interrupted, one that the manifest planned: none is dropped silently, pairs stay whole."""
    write_sweep(tmp_path, seeds=4)
    write_run(tmp_path, arm="acpg", seed=5, status="interrupted")
    write_run(tmp_path, arm="baseline", seed=5)
    write_run(tmp_path, arm="acpg", seed=7)  # which has no baseline
    planned = {5: "interrupted", 6: "failed", 1: "finished"}
    runs = {f"CartPole-v1__ppo_acpg__{seed}": {"flags": "", "status": status} for seed, status in planned.items()}
    (tmp_path / "manifest.json").write_text(json.dumps({"runs": runs}))
    result = make_report(tmp_path)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "report.md").read_text()
    assert "Missing: 3 runs" in text and "ppo_acpg 5: interrupted" in text and "ppo_acpg 6: failed" in text
    assert "ppo_baseline 7: no run" in text
    assert "unequal" in text
    frame = pd.read_csv(tmp_path / "report" / "differences.csv")
    assert (frame.seeds[frame.env == "CartPole-v1"] == 4).all()


def test_seeds_that_an_arm_was_never_to_have_are_not_missing(tmp_path):
    """Where the manifest has all runs that there are, it says what was planned: fewer seeds of the controls, say."""
    for arm, seeds in (("baseline", 6), ("acpg", 6), ("random", 5)):
        for seed in range(seeds):
            write_run(tmp_path, arm=arm, seed=seed, level=300.0 + seed)
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    known = {name: {"flags": "", "status": "finished"} for name in names} | {"lost": {"flags": "", "status": "failed"}}
    (tmp_path / "manifest.json").write_text(json.dumps({"runs": known}))
    _, _, problems, _ = report.read_runs(tmp_path)
    assert problems == {"lost": "failed"}
    (tmp_path / "manifest.json").unlink()
    _, _, problems, _ = report.read_runs(tmp_path)
    assert problems == {"CartPole-v1__ppo_random__5": "no run"}


def test_one_poor_task_is_left_out_of_the_verdicts(tmp_path):
    write_sweep(tmp_path, seeds=6, envs=("CartPole-v1",), gain=200.0)
    write_sweep(tmp_path, seeds=1, envs=("Acrobot-v1",))
    assert "acpg faster: supported (1 tasks, 6 seeds)" in make_report(tmp_path).stdout


def test_environments_that_the_baseline_does_not_learn_are_named(tmp_path):
    for arm in ("baseline", "acpg"):
        write_run(tmp_path, arm=arm, level=40.0)  # a random policy's is about 22
        write_run(tmp_path, algo="a2c", arm=arm, level=400.0)
        write_run(tmp_path, algo="reinforce", arm=arm, level=600.0)
        write_run(tmp_path, algo="reinforce", arm=arm, seed=2, level=40.0)
    assert make_report(tmp_path).returncode == 0
    text = (tmp_path / "report.md").read_text()
    assert "reached the reward threshold within the budget: CartPole-v1 a2c, CartPole-v1 ppo.\n" in text
    assert "**Never learned** by the baseline (every seed ends nearer to the random policy): CartPole-v1 ppo.\n" in text


def test_no_scores_where_the_random_policy_reaches_the_threshold(tmp_path):
    write_sweep(tmp_path, seeds=5, envs=("CartPole-v1",))
    reference = {"mean": 480.0, "standard_error": 1.0, "episodes": 100, "seed": 0}
    (tmp_path / "references.json").write_text(json.dumps({"CartPole-v1 {} None": reference}))
    result = make_report(tmp_path)
    assert result.returncode == 0 and "acpg" not in result.stdout, result.stderr
    assert "In no aggregate" in (tmp_path / "report.md").read_text()


def test_the_reference_of_the_random_policy(monkeypatch):
    """By the return's known value where every step pays 1 and the time limit ends all; none if episodes do not end."""
    own = {"env_id": "CartPole-v1", "env_kwargs": "{}", "max_episode_steps": 5}
    settings, cache, args = {("CartPole-v1", "ppo", "acpg"): own}, {}, report.Args(None)
    ((_, entry),) = cache.items() if (found := report.references(settings, args, cache)) else ()
    assert found == ({"CartPole-v1": 475.0}, {"CartPole-v1": 5.0}, {"CartPole-v1": entry})
    assert entry["episodes"] == 800 and entry["standard_error"] == 0 and entry["threshold"] == 475.0
    endless = own | {"max_episode_steps": None}
    assert report.random_return(endless, 0, 475.0)["mean"] > 15
    # near to the threshold the mean must be known better: to a hundredth of the distance, or from 10,000 episodes
    near = report.random_return(endless, 0, 32.0)
    assert near["episodes"] > 100 and near["standard_error"] <= 0.1 + 1e-3 or near["episodes"] == 10_000
    monkeypatch.setattr(report, "REFERENCE_STEPS", 300)
    assert report.references(settings, args, cache)[1] == {"CartPole-v1": 5.0}  # not measured again
    args.seed = 1
    assert report.references(settings, args, cache)[1] == {"CartPole-v1": None}


def test_the_reference_of_rare_returns(monkeypatch):
    """One episode in sixty has a return, and none of the first hundred: that all are alike is no end."""
    rng = np.random.default_rng(0)
    rewards = iter(np.concatenate([np.zeros(150), rng.random(20_000) < 1 / 60]))

    class Rare(gym.Env):
        observation_space, action_space = gym.spaces.Discrete(1), gym.spaces.Discrete(2)

        def reset(self, seed=None, options=None):
            return 0, {}

        def step(self, action):
            return 0, next(rewards), True, False, {}

    monkeypatch.setattr(report.gym, "make", lambda *_, **__: Rare())
    found = report.random_return({"env_id": "Rare-v0", "env_kwargs": "{}", "max_episode_steps": None}, 0, 0.7)
    assert found["mean"] == pytest.approx(1 / 60, abs=3 * 0.0068) and found["episodes"] > 150
    assert 0 < found["standard_error"] <= 0.007


def test_modules_are_imported_when_told_to(tmp_path):
    """A run.json may name any module: the report imports none by itself, and needs none where the reference is kept."""
    proof = tmp_path / "imported"
    code = f"open({str(proof)!r}, 'w')\nimport gymnasium as gym\nentry = 'gymnasium.envs.classic_control:CartPoleEnv'\n"
    code += "gym.register('Own-v0', entry, max_episode_steps=9, reward_threshold=8.0)\n"
    (tmp_path / "own.py").write_text(code)
    sweep = tmp_path / "sweep"
    for arm in ("baseline", "acpg"):
        write_run(sweep, env_id="own:Own-v0", arm=arm, level=8.0)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = make_report(sweep, env=environment)
    assert result.returncode == 1 and "--import-modules" in result.stderr and result.stderr.count("\n") == 1
    assert not proof.exists() and not (sweep / "report.md").exists()
    result = make_report(sweep, "--import-modules", env=environment)
    assert result.returncode == 0 and proof.exists(), result.stderr
    assert "| own:Own-v0 | 9 | 0 | 800 | 8 |" in (sweep / "report.md").read_text()
    proof.unlink()
    assert make_report(sweep, env=environment).returncode == 0 and not proof.exists()


def test_a_single_seed(tmp_path):
    write_sweep(tmp_path, seeds=1)
    result = make_report(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "single seed" in (tmp_path / "report.md").read_text()
    assert "acpg faster: none: fewer than 5 seeds (2 tasks, 1 seeds)" in result.stdout


@pytest.mark.parametrize("seeds, faster", [(4, "none: fewer than 5 seeds"), (5, "supported")])
def test_a_verdict_takes_five_seeds(tmp_path, seeds, faster):
    write_sweep(tmp_path, seeds=seeds, envs=("CartPole-v1",), gain=200.0)
    assert f"acpg faster: {faster}" in make_report(tmp_path).stdout


def test_no_baseline_and_no_threshold(tmp_path):
    write_sweep(tmp_path, seeds=2, envs=("CliffWalking-v1",), arms=("acpg",))
    result = make_report(tmp_path)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "report.md").read_text()
    assert "No reward threshold" in text and "None: it takes a baseline" in text


@pytest.mark.parametrize(
    "change, word",
    [({"args": {"learning_rate": 2e-3}}, "learning_rate"), ({"script_sha256": "y"}, "script_sha256")],
    ids=["another flag", "another script"],
)
def test_mixed_settings_are_refused(tmp_path, change, word):
    write_sweep(tmp_path, seeds=2)
    write_run(tmp_path, seed=3, **change)
    result = make_report(tmp_path)
    assert result.returncode == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert word in result.stderr
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    "key, value", [("total_timesteps", 15000), ("max_episode_steps", 100), ("env_kwargs", '{"a": 1}')]
)
def test_arms_that_do_not_compare_are_refused(tmp_path, key, value):
    write_sweep(tmp_path, seeds=2, arms=("baseline",))
    write_run(tmp_path, arm="acpg", args={key: value})
    result = make_report(tmp_path)
    assert result.returncode == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert key in result.stderr and "acpg" in result.stderr and not (tmp_path / "report.md").exists()


def test_algorithms_in_other_environments_are_refused(tmp_path):
    """Another time limit is another environment, another budget is not."""
    write_sweep(tmp_path, seeds=1)
    write_run(tmp_path, algo="a2c", steps=20000)
    assert make_report(tmp_path).returncode == 0
    write_run(tmp_path, algo="reinforce", args={"max_episode_steps": 100})
    result = make_report(tmp_path)
    assert result.returncode == 1 and "max_episode_steps" in result.stderr and result.stderr.count("\n") == 1


def test_damaged_files_are_named(tmp_path):
    write_sweep(tmp_path, seeds=1)
    (tmp_path / "references.json").write_text("[1")
    result = make_report(tmp_path)
    assert result.returncode == 1 and "references.json" in result.stderr and result.stderr.count("\n") == 1


def test_the_same_run_twice_is_refused(tmp_path):
    write_sweep(tmp_path / "a", seeds=1)
    write_sweep(tmp_path / "b", seeds=1)
    result = make_report(tmp_path)
    assert result.returncode == 1 and "twice" in result.stderr and result.stderr.count("\n") == 1


def test_too_few_resamples_are_refused(tmp_path):
    write_sweep(tmp_path, seeds=1)
    result = make_report(tmp_path, "--resamples", "1999")
    assert result.returncode == 1 and "--resamples" in result.stderr and result.stderr.count("\n") == 1


def test_folders_without_runs_are_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        result = make_report(folder)
        assert result.returncode == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_threshold_of_ones_own(tmp_path):
    """An environment without a reward threshold has verdicts once it is given one, which is kept."""
    write_sweep(tmp_path, seeds=5, envs=("Pendulum-v1",), arms=("baseline", "acpg"), gain=200.0)
    (tmp_path / "references.json").write_text("{}")
    entry = {"mean": -1200.0, "standard_error": 30.0, "episodes": 100, "seed": 0, "threshold": None}
    (tmp_path / "references.json").write_text(json.dumps({"Pendulum-v1 {} None": entry}))
    result = make_report(tmp_path)
    assert result.returncode == 0 and "acpg" not in result.stdout, result.stderr
    for flags in (["--threshold", "Pendulum-v1=400"], []):
        result = make_report(tmp_path, *flags)
        assert result.returncode == 0 and "acpg faster: " in result.stdout, result.stderr
    for wrong in ("Pendulum-v1", "Pendulum-v1=nan", "Other-v0=1", "Pendulum-v1=x"):
        result = make_report(tmp_path, "--threshold", wrong)
        assert result.returncode == 1 and "--threshold" in result.stderr and result.stderr.count("\n") == 1


def test_a_run_that_diverged_scores_nothing_and_one_that_was_killed_is_missing(tmp_path):
    write_sweep(tmp_path, seeds=5, envs=("CartPole-v1",))
    write_run(tmp_path, arm="baseline", seed=6)
    write_run(tmp_path, arm="acpg", seed=6, status="failed", error="error: non-finite loss at update 3 (step 9): x")
    write_run(tmp_path, arm="baseline", seed=7)
    write_run(tmp_path, arm="acpg", seed=7, status="failed", error="error: at step 9: ValueError: y")
    result = make_report(tmp_path)
    assert result.returncode == 0, result.stderr
    runs = pd.read_csv(tmp_path / "report" / "runs.csv")
    (own,) = runs[(runs.arm == "acpg") & (runs.seed == 6)].itertuples()
    assert (own.norm_final, own.norm_auc, own.norm_steps, own.failed, own.reached) == (0, 0, 1, 1, False)
    assert own.final == pytest.approx(own.auc) and 15 < own.final < 30  # what the random policy gets
    text = (tmp_path / "report.md").read_text()
    assert "non-finite loss: 1 runs**" in text and "CartPole-v1 ppo acpg 6" in text
    assert "Missing: 1 runs" in text and "ppo_acpg 7: failed" in text


def test_trained_is_the_trained_network(tmp_path):
    """Where a metric is undefined at the end, as with one greedy action, no earlier value stands in for it."""
    write_sweep(tmp_path, seeds=3, envs=("CartPole-v1",))
    for seed, defined in ((1, 1), (2, 0), (3, 0)):
        path = tmp_path / "runs" / f"CartPole-v1__ppo_acpg__{seed}" / "progress.csv"
        curve = pd.read_csv(path)
        curve["collapse/classes_present"] = np.nan
        curve.loc[[0, 25, 50], "collapse/classes_present"] = [2, 2, 2 if defined else 1]
        curve.loc[np.setdiff1d(np.arange(51), [0, 25, 50] if defined else [0, 25]), "collapse/alignment"] = np.nan
        curve.to_csv(path, index=False)
    assert make_report(tmp_path).returncode == 0
    collapse = pd.read_csv(tmp_path / "report" / "collapse.csv").set_index(["arm", "metric"])
    row = collapse.loc["acpg", "alignment"]
    assert (
        (row.defined, row.seeds) == (1, 3) and row.trained == pytest.approx(0.8) and row.untrained == pytest.approx(0.2)
    )
    assert "| acpg | AC1 alignment (1) | 0.2 | 3 of 3 | 0.8 [-, -] | 1 of 3 |" in (tmp_path / "report.md").read_text()


def test_what_is_undefined_is_drawn_and_written_as_such(tmp_path):
    """From the measurement at which it becomes undefined on, although the run has earlier values."""
    write_sweep(tmp_path, seeds=3, envs=("CartPole-v1",))
    for path in tmp_path.glob("runs/*acpg*/progress.csv"):
        curve = pd.read_csv(path)
        curve["collapse/classes_present"] = np.where(np.arange(51) < 20, 3, 1)
        curve.loc[20:, "collapse/alignment"] = np.nan
        curve.to_csv(path, index=False)
    assert make_report(tmp_path).returncode == 0
    curves = pd.read_csv(tmp_path / "report" / "curves.csv.gz")
    own = curves[(curves.tag == "collapse/alignment") & (curves.arm == "acpg")]
    assert own["mean"][own.step <= 3800].notna().all() and own["mean"][own.step >= 4000].isna().all()
    text = (tmp_path / "report.md").read_text()
    assert "| acpg | AC1 alignment (1) | 0.2 | 3 of 3 | undefined | 0 of 3 | - | 0 of 3 |" in text


def test_two_actions_say_nothing_of_the_etf_error(tmp_path):
    """Where three runs of five use two actions its zeros are no collapse; where all do, it is void."""
    write_sweep(tmp_path, seeds=5, envs=("CartPole-v1",))
    for path in tmp_path.glob("runs/*/progress.csv"):
        two = "acpg" not in path.parent.name or path.parent.name[-1] in "123"
        curve = pd.read_csv(path)
        curve["collapse/classes_present"] = 2 if two else 4
        if two:
            curve["collapse/etf_error"] = curve["collapse_null/etf_error"] = 0.0
        curve.to_csv(path, index=False)
    assert make_report(tmp_path).returncode == 0
    table = pd.read_csv(tmp_path / "report" / "collapse.csv").set_index(["arm", "metric"])
    row = table.loc["acpg", "etf_error"]
    assert (row.trained, row.null, row.defined, row.void) == (pytest.approx(0.8), pytest.approx(0.1), 2, False)
    assert table.loc["baseline", "etf_error"].void and not table.loc["baseline", "alignment"].void
    text = (tmp_path / "report.md").read_text()
    assert "| baseline | AC3 ETF error of the means (0) | - | 0 of 5 | void: two actions | 0 of 5 |" in text


def reference(folder, **values):
    """references.json with a random policy's return for each environment."""
    keys = {"CartPole": ("CartPole-v1 {} None", 475.0), "LunarLander": ("LunarLander-v3 {} None", 200.0)}
    entry = {"standard_error": 1.0, "episodes": 100, "seed": 0}
    cache = {keys[k][0]: entry | {"mean": x, "threshold": keys[k][1]} for k, x in values.items()}
    (folder / "references.json").write_text(json.dumps(cache))


def test_a_run_that_diverged_is_not_ahead_of_one_that_is_worse_than_random(tmp_path):
    """Alike on CartPole; on LunarLander the baseline falls far below the random policy, and all runs of ACPG end with a
    loss that is not finite."""
    rng = np.random.default_rng(0)
    for seed in range(8):
        write_run(tmp_path, arm="baseline", seed=seed, level=450 + rng.normal(0, 3))
        write_run(tmp_path, arm="acpg", seed=seed, level=450 + rng.normal(0, 3))
        write_run(tmp_path, "LunarLander-v3", arm="baseline", seed=seed, level=-900.0)
        write_run(tmp_path, "LunarLander-v3", arm="acpg", seed=seed, **DIVERGED)
    reference(tmp_path, CartPole=20.0, LunarLander=-185.0)
    result = make_report(tmp_path)
    assert result.returncode == 0 and "supported" not in result.stdout, result.stdout + result.stderr
    assert "acpg: 0 wins" in (tmp_path / "report.md").read_text()
    curves = pd.read_csv(tmp_path / "report" / "curves.csv.gz")
    last = curves[(curves.env == "LunarLander-v3") & (curves.tag == reading.RETURN) & (curves.step == 10000)]
    assert last.set_index("arm")["mean"].to_dict() == pytest.approx({"baseline": -900.0, "acpg": -185.0}, rel=0.02)


@pytest.mark.parametrize("lost", ["random", "baseline", "acpg"])
def test_a_run_that_diverged_hides_no_other(lost, tmp_path):
    """ACPG is far behind, both being worse than random: one run that diverged, of whichever arm, changes no verdict."""
    for seed in range(10):
        for arm, level in (("baseline", -190.0), ("acpg", -700.0), ("random", -190.0)):
            diverged = DIVERGED if (arm, seed) == (lost, 0) else {}
            write_run(tmp_path, "LunarLander-v3", arm=arm, seed=seed, level=level - seed, start=level, **diverged)
    reference(tmp_path, LunarLander=-185.0)
    result = make_report(tmp_path)
    for claim in ("faster", "better"):
        assert f"acpg {claim}: contradicted (1 tasks, 10 seeds)" in result.stdout, result.stdout
    rows = pd.read_csv(tmp_path / "report" / "differences.csv").set_index(["arm", "metric"])
    assert rows.difference["acpg", "final"] < -450 and rows.difference["acpg", "auc"] < -450


def blank(folder, keep):
    """Take the returns out of a run's curve but where `keep` (start, end) has them, as shares of its budget."""
    (path,) = folder.rglob("progress.csv") if folder.is_dir() else [folder]
    curve = pd.read_csv(path)
    curve.loc[~curve.global_step.between(*(share * 10000 for share in keep)), reading.RETURN] = np.nan
    curve.to_csv(path, index=False)


def test_a_run_of_which_no_episode_ended_failed(tmp_path):
    """It scores 0, as one that diverged: left out, the others would speak for it. Where none of the task has ended an
    episode, nothing is known."""
    for seed in range(10):
        write_run(tmp_path, arm="baseline", seed=seed, level=300.0 + seed)
        write_run(tmp_path, arm="acpg", seed=seed, level=450.0 + seed)
        if seed < 5:
            blank(tmp_path / "runs" / f"CartPole-v1__ppo_acpg__{seed}", (2, 2))
        for arm in ("baseline", "acpg"):
            write_run(tmp_path, "LunarLander-v3", arm=arm, seed=seed)
            blank(tmp_path / "runs" / f"LunarLander-v3__ppo_{arm}__{seed}", (2, 2))
    reference(tmp_path, CartPole=22.0, LunarLander=-185.0)
    result = make_report(tmp_path)
    assert "none: missing runs leave fewer than 5 pairs on 1 tasks" in result.stdout, result.stdout
    runs = pd.read_csv(tmp_path / "report" / "runs.csv")
    own = runs[(runs.arm == "acpg") & (runs.seed < 5)]
    assert set(runs.env) == {"CartPole-v1"} and (own.norm_final == 0).all() and (own.failed == 1).all()
    text = (tmp_path / "report.md").read_text()
    assert "Not one episode ended: 5 runs**" in text and "Missing: 20 runs" in text
    for path in (tmp_path / "runs").glob("LunarLander*"):
        shutil.rmtree(path)
    assert "supported" not in make_report(tmp_path).stdout


def test_before_the_first_episode_and_after_the_last(tmp_path):
    """Before it there is the random policy; a run without an episode in the last tenth has no scores, and its arm no
    verdict. Packed runs say the same."""
    for seed in range(6):
        write_run(tmp_path, arm="baseline", seed=seed, level=240.0, start=220.0)
        write_run(tmp_path, arm="acpg", seed=seed, level=460.0, start=440.0)
        blank(tmp_path / "runs" / f"CartPole-v1__ppo_acpg__{seed}", (0.9, 1))
    reference(tmp_path, CartPole=22.0)
    for packed in (False, True):
        result = make_report(tmp_path)
        assert "acpg faster: contradicted" in result.stdout and "acpg better: supported" in result.stdout, result.stdout
        runs = pd.read_csv(tmp_path / "report" / "runs.csv")
        assert runs.auc[runs.arm == "acpg"].to_numpy() == pytest.approx(0.88 * 22 + 0.12 * 459, abs=1)
        if not packed:
            reading.write_packed(tmp_path / reading.PACKED, report.find_runs(tmp_path)[0])
            shutil.rmtree(tmp_path / "runs")
    (tmp_path / reading.PACKED).unlink()
    for seed in range(6):
        write_run(tmp_path, arm="baseline", seed=seed, level=240.0, start=220.0)
        write_run(tmp_path, arm="acpg", seed=seed, level=460.0, start=440.0)
    blank(tmp_path / "runs" / "CartPole-v1__ppo_acpg__0", (0, 0.85))
    for packed in (False, True):
        result = make_report(tmp_path)
        assert result.stdout.count("none: no episode ended in the last tenth of 1 runs") == 3, result.stdout
        assert "No episode ended in the last tenth: 1 runs**" in (tmp_path / "report.md").read_text()
        if not packed:
            reading.write_packed(tmp_path / reading.PACKED, report.find_runs(tmp_path)[0])
            shutil.rmtree(tmp_path / "runs")


def test_an_arm_without_a_task_in_common_is_in_no_family(tmp_path):
    for seed in range(6):
        write_run(tmp_path, arm="baseline", seed=seed, level=300.0 + seed)
        write_run(tmp_path, arm="acpg", seed=seed, level=400.0 + seed)
        write_run(tmp_path, "LunarLander-v3", arm="random", seed=seed)
    reference(tmp_path, CartPole=22.0, LunarLander=-185.0)
    result = make_report(tmp_path)
    assert result.stdout.count("random") == 3 == result.stdout.count("none: no scored task in common"), result.stdout
    text = (tmp_path / "report.md").read_text()
    assert "Drawn from 6 comparisons, 6 measures of acpg against" in text and "99.17 %" in text
    assert "and so left out" not in text


def test_references_are_those_of_the_runs(tmp_path):
    """Of two that the folder has for an environment, with other limits on its episodes."""
    write_sweep(tmp_path, seeds=5, envs=("CartPole-v1",))
    entry = {"mean": 22.0, "standard_error": 0.4, "episodes": 800, "seed": 0, "threshold": 475.0}
    other = entry | {"mean": 21.0, "standard_error": 9.9, "episodes": 123}
    (tmp_path / "references.json").write_text(json.dumps({"CartPole-v1 {} None": entry, "CartPole-v1 {} 50": other}))
    assert make_report(tmp_path).returncode == 0
    assert "| CartPole-v1 | 22 | 0.4 | 800 | 475 |" in (tmp_path / "report.md").read_text()


def test_a_report_that_is_stopped_leaves_the_one_before(tmp_path, monkeypatch):
    write_sweep(tmp_path, seeds=5, envs=("CartPole-v1",))
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), "--resamples", "2000"])
    report.main()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def stop(*_):
        raise KeyboardInterrupt

    for name in ("plot_curves", "collapse_section"):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped"):
            patch.setattr(report, name, stop)
            report.main()
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_numbers():
    given = {999.6: "1,000", -999.9: "-1,000", 999.4: "999", 1234.5: "1,234", 0.12345: "0.123", math.inf: "inf"}
    assert {x: report.number(x) for x in given} == given


def test_means_are_of_all_runs_or_of_none(tmp_path):
    """Without a threshold nothing is known of what a run that diverged would have: no mean is given of the others."""
    write_sweep(tmp_path, seeds=5, envs=("CliffWalking-v1",))
    shutil.rmtree(tmp_path / "runs" / "CliffWalking-v1__ppo_acpg__1")
    write_run(tmp_path, "CliffWalking-v1", arm="acpg", seed=1, **DIVERGED)
    assert make_report(tmp_path).returncode == 0
    cells = pd.read_csv(tmp_path / "report" / "cells.csv").set_index("arm")
    assert cells[["final", "auc", "best", "final_median"]].isna().all(axis=1).to_dict() == {
        "baseline": False,
        "acpg": True,
    }
    assert "no return: CliffWalking-v1" in (tmp_path / "report.md").read_text()


def test_missing_runs_are_no_reason_to_leave_a_lost_task_out(tmp_path):
    """Ahead on CartPole, far behind on LunarLander, where most of ACPG's runs were killed."""
    for seed in range(8):
        for arm, cartpole, lunar in (("baseline", 200.0, 150.0), ("acpg", 400.0, -100.0)):
            write_run(tmp_path, arm=arm, seed=seed, level=cartpole + seed)
            killed = {"status": "interrupted"} if arm == "acpg" and seed > 2 else {}
            write_run(tmp_path, "LunarLander-v3", arm=arm, seed=seed, level=lunar + seed, **killed)
    reference(tmp_path, CartPole=20.0, LunarLander=-185.0)
    result = make_report(tmp_path)
    assert result.stdout.count("none: missing runs leave fewer than 5 pairs on 1 tasks") == 3, result.stdout
    assert "acpg: fewer than 5 pairs, and so left out: LunarLander-v3 ppo" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("arm", ["acpg", "my__arm", "h\u00e9"])
def test_missing_runs_are_found_by_their_names(arm, tmp_path):
    """Whatever the arm is called; and where no run of a task is left at all, only the manifest knows of it."""
    names = []
    for seed in range(6):
        for name, level in (("baseline", 200.0), (arm, 400.0)):
            write_run(tmp_path, arm=name, seed=seed, level=level + seed)
            names += [ppo_baseline.run_name(env, f"ppo_{name}", seed) for env in ("CartPole-v1", "LunarLander-v3")]
    known = {name: {"flags": "", "status": "failed" if "Lunar" in name else "finished"} for name in names}
    (tmp_path / "manifest.json").write_text(json.dumps({"runs": known}))
    reference(tmp_path, CartPole=20.0, LunarLander=-185.0)
    result = make_report(tmp_path)
    assert result.stdout.count("none: missing runs leave fewer than 5 pairs on 1 tasks") == 3, result.stdout


def test_an_arm_must_learn_where_it_is_compared(tmp_path):
    """One run elsewhere that learns, without a pair, does not make it an arm that does."""
    for seed in range(8):
        write_run(tmp_path, "LunarLander-v3", arm="baseline", seed=seed, level=-900.0 - seed)
        write_run(tmp_path, "LunarLander-v3", arm="acpg", seed=seed, level=-300.0 - seed)
    write_run(tmp_path, arm="acpg", level=500.0)
    reference(tmp_path, CartPole=20.0, LunarLander=-185.0)
    stdout = make_report(tmp_path).stdout
    assert "acpg better: not supported: the arm never learns (1 tasks, 8 seeds)" in stdout


def test_an_arm_that_shares_no_seed_with_the_baseline_is_named(tmp_path):
    for seed in range(5):
        write_run(tmp_path, arm="baseline", seed=seed)
        write_run(tmp_path, arm="acpg", seed=seed + 10)
    result = make_report(tmp_path)
    assert result.stdout.count("acpg") == 3 and "none: missing runs" in result.stdout, result.stdout


def test_the_report_judges_by_its_own_table(tmp_path):
    """The verdicts follow from the rows of aggregates.csv, corrected for the family that the report names, by the rule
    of docs/benchmark.md; the robust one asks the final return, not the area."""
    rng = np.random.default_rng(0)
    for seed in range(8):
        for arm, level in (("baseline", 300.0), ("acpg", 360.0), ("other", 250.0)):
            write_run(tmp_path, arm=arm, seed=seed, level=level + rng.normal(0, 30))
    reference(tmp_path, CartPole=20.0)
    assert make_report(tmp_path).returncode == 0
    table = pd.read_csv(tmp_path / "report" / "aggregates.csv")
    family = table[(table.against == "baseline") & (table.level > 0.96)]
    assert len(family) == 12 and family.level.to_numpy() == pytest.approx(1 - 0.05 / 12, abs=1e-5)
    text = (tmp_path / "report.md").read_text()
    assert "Drawn from 12 comparisons, 6 measures of acpg, other against the baseline" in text
    assert "### Exploratory: other measures, and ACPG against the controls" in text and "not corrected together" in text
    verdicts = pd.read_csv(tmp_path / "report" / "verdicts.csv")
    for arm, claim, what in zip(verdicts.arm, verdicts.claim, verdicts.verdict, strict=True):
        rows = family[(family.arm == arm) & (family.claim == claim)].to_dict("records")
        (final,) = family[(family.arm == arm) & (family.measure == "final return, mean difference")].to_dict("records")
        assert what == intervals.verdict(claim, rows, final, 0.05, True)


def test_robustness_asks_the_final_return():
    """Every run of the arm ends at .7; half of the baseline's fail, and the others end at 1.4. That the area is ahead
    is no reason to call it more robust."""
    rows = []
    for seed in range(20):
        for arm, final, area in (("baseline", 0.2 if seed % 2 else 1.4, 0.1), ("acpg", 0.7 + seed / 1000, 0.5)):
            values = {"norm_final": final, "norm_auc": area + seed / 1000, "norm_steps": 1.0}
            rows.append({"env": "e", "algo": "ppo", "arm": arm, "seed": seed} | values | WELL)
    args, rng = report.Args(None, resamples=2000), np.random.default_rng(0)
    verdicts = report.judge(pd.DataFrame(rows), ["baseline", "acpg"], {}, rng, args)[1]
    assert [row[2] for row in verdicts] == ["supported", "not distinguishable", "not supported: it may return less"]


def test_a_wider_margin_makes_no_arm_robust():
    assert judged("more robust", [(0.4, 0.5)], final=(-0.2, 0.1), margin=0.3) == "not supported: it may return less"


def test_the_iqms_shares_are_of_what_it_averages(tmp_path):
    """Of the runs in the figure, which leaves an environment out that one arm lacks, and of those of the difference."""
    write_sweep(tmp_path, seeds=5, envs=("CartPole-v1", "Acrobot-v1"))
    for seed in range(1, 6):
        write_run(tmp_path, arm="third", seed=seed, level=200.0 + seed)
    assert make_report(tmp_path).returncode == 0
    text = (tmp_path / "report.md").read_text()
    assert "| ppo | acpg | auc | CartPole-v1 60% |" in text  # of five the middle three
    assert "| all | acpg, of acpg and baseline | auc | Acrobot-v1 ppo " in text
    assert "| all | third, of third and baseline | auc | CartPole-v1 ppo 60% |" in text


@pytest.fixture
def figures(monkeypatch):
    """What the functions of plots.py drew, instead of files."""
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    yield drawn
    for figure in drawn:
        plots.plt.close(figure)


def test_the_verdicts_figure_has_its_rows_signs(figures):
    row = {"arm": "acpg", "tasks": 1, "claim": "better", "level": 0.95}
    rows = [row | {"measure": "final return, mean difference", "low": 0.1, "estimate": 0.2, "high": 0.3}]
    rows += [row | {"measure": "final return, probability of improvement", "low": 0.4, "estimate": 0.6, "high": 0.7}]
    plots.plot_verdicts(rows, 0.05, plots.colours_of(["acpg"]), None)
    lines = [list(line.get_xdata()) for line in figures[0].axes[0].lines][:4]
    for line, expected in zip(lines, ([0.1, 0.3], [0.2], [-0.1, 0.2], [0.1]), strict=True):
        assert line == pytest.approx(expected)


@pytest.mark.parametrize(
    "classes, void",
    [([2, 2, 2, 2], 1), ([2, 2, 2, 1], 1), ([1, 1, 1, 1], 0), ([2, 2, 2, 3], 0), ([math.nan] * 4, 0)],
    ids=str,
)
def test_the_panel_is_void_where_no_run_has_three_actions(classes, void, figures):
    """Said once, whatever the number of arms; and not where nothing is known, as of runs that diverged."""
    runs = pd.DataFrame({"env": "e", "algo": "ppo", "arm": ["baseline", "baseline", "acpg", "acpg"], "budget": 100})
    steps = {reading.STEP: np.array([0.0, 100.0])}
    curves = [steps | {reading.CLASSES: np.array([3, c]), "collapse/etf_error": np.array([0.5, 0.4])} for c in classes]
    curves = list(map(reading.defined, curves))
    plots.plot_collapse(runs, curves, np.zeros((4, 100)), "ppo", plots.colours_of(["baseline", "acpg"]), None)
    texts = [text.get_text() for axes in figures[0].axes for text in axes.texts]
    assert texts == ["void: two actions"] * void


def test_figures_are_small_and_keep_their_legend(tmp_path):
    """256 colours, which look the same: no pixel far from what was drawn."""
    figure, axes = plots.plt.subplots(1, 2, figsize=(6, 2), layout="constrained")
    for axis, x in zip(axes, ([1, 2, 3], [3, 1, 2]), strict=True):
        axis.plot(x, color=plots.COLOURS["acpg"], label="acpg")
        axis.fill_between(range(3), x, 0, color=plots.COLOURS["baseline"], alpha=0.2, label="band")
    plots.save(figure, tmp_path / "a.png")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["acpg", "band"]
    figure.savefig(tmp_path / "b.png")
    small, full = (Image.open(tmp_path / f"{name}.png") for name in "ab")
    assert small.mode == "P" and small.size == full.size
    assert (tmp_path / "a.png").stat().st_size < 0.6 * (tmp_path / "b.png").stat().st_size
    difference = np.abs(np.asarray(small.convert("RGB"), int) - np.asarray(full.convert("RGB"), int))
    assert difference.mean() < 0.5 and difference.max() < 64


def test_an_arms_colour_does_not_depend_on_the_order():
    one, other = plots.colours_of(["acpg", "half", "ball"]), plots.colours_of(["ball", "half", "acpg"])
    assert one == other and len(set(one.values())) == 3


@pytest.mark.parametrize("pairs, least", [(1, 1), (5, 2 / 32), (20, 1 / 20001)])
def test_the_smallest_p(pairs, least):
    assert report.smallest_p(pairs) == pytest.approx(least)
    found = intervals.flip_test(np.full(pairs, 1.0), np.random.default_rng(0))
    assert found >= least * (1 - 1e-9) and (pairs > 14 or found == least)


def test_wins_and_losses_stand_in_one_table(tmp_path):
    """A win on CartPole and a loss on Acrobot, each on all of twelve seeds, both named."""
    write_sweep(tmp_path, seeds=12, envs=("CartPole-v1",), gain=60.0)
    write_sweep(tmp_path, seeds=12, envs=("Acrobot-v1",), gain=-60.0)
    assert make_report(tmp_path).returncode == 0
    text = (tmp_path / "report.md").read_text()
    assert "acpg: 2 wins and 2 losses in 4 tests" in text
    assert "| CartPole-v1 | ppo | auc | win |" in text and "| Acrobot-v1 | ppo | auc | loss |" in text
    frame = pd.read_csv(tmp_path / "report" / "differences.csv")
    tested = frame[frame.p_value.notna()]
    assert len(tested) == 4 and np.allclose(tested.p_holm, 4 * 2 / 2**12, rtol=1e-3)


# Sensitivity to the learning rate


def cells(*means, n=4, noise=0.0):
    """A grid of one row of means a task, n runs a cell that scatter symmetrically about them."""
    scatter = noise * np.array([-1.0, -1, 1, 1])[:n]
    return [[mean + scatter for mean in row] for row in means]


def test_one_rate_for_all():
    """The best rates of two tasks are 1 and 3: either costs .4 in one of them, the middle one .1 in both."""
    assert intervals.one_for_all(cells([0.9, 0.8, 0.5], [0.5, 0.8, 0.9])) == pytest.approx(0.1)
    assert intervals.one_for_all(cells([0.9, 0.5], [0.9, 0.5])) == pytest.approx(0)


def test_noise_does_not_count_as_a_need_for_tuning():
    """All rates alike, 40 tasks: the best of noisy means seems to gain much, chosen and scored apart nothing."""
    rng = np.random.default_rng(0)
    grid = [[rng.normal(0.5, 0.2, size=4) for _ in range(6)] for _ in range(40)]
    means = intervals.grid_means(grid)
    assert means.max(1).mean() - means.mean(0).max() > 0.1
    assert abs(intervals.one_for_all(grid)) < 0.05


def test_plateau():
    """Scores 0, 1, 1, 0 at decades: within 90 % over one decade and a tenth to each side."""
    assert intervals.plateau(cells([0.0, 1, 1, 0]), [1e-4, 1e-3, 1e-2, 1e-1]) == pytest.approx(1.2, abs=0.02)
    assert intervals.plateau(cells([1.0, 1, 1]), [1e-3, 1e-2, 1e-1]) == pytest.approx(2)
    assert intervals.plateau(cells([1.0, 1, 0, 0]), [1e-3, 1e-2, 1e-4, 1e-1]) == pytest.approx(
        1.2, abs=0.02
    )  # any order
    # two of the measure's kind, far apart, count together
    assert intervals.plateau(cells([1.0, 0, 1.0]), [1e-3, 1e-2, 1e-1]) == pytest.approx(0.2, abs=0.02)


def test_the_worst_rate_is_not_the_least_of_noisy_means():
    """Of two arms whose rates are all alike, the noisier one is not the worse at its worst."""
    rng = np.random.default_rng(0)
    grids = [[[rng.normal(0.5, sd, size=6) for _ in range(5)]] for sd in (0.02, 0.2) for _ in range(300)]
    calm, noisy = (np.mean([intervals.worst_rates(grid) for grid in half]) for half in (grids[:300], grids[300:]))
    assert calm == pytest.approx(0.5, abs=0.01) and noisy == pytest.approx(0.5, abs=0.02)


def test_sensitivity_of_two_arms():
    """A flat arm beside a peaked one: less lost at the worst rate, a wider plateau; the known differences are held."""
    rng, rates = np.random.default_rng(0), [1e-4, 1e-3, 1e-2]
    peaked, flat = (
        cells([0.1, 0.9, 0.1], [0.1, 0.1, 0.9], noise=0.02),
        cells([0.7, 0.8, 0.7], [0.7, 0.7, 0.8], noise=0.02),
    )
    rows = {row["measure"]: row for row in intervals.compare_sensitivity(peaked, flat, rates, rng, 300)}
    two = cells([0.1, 0.9, 0.1], n=2)
    assert all(math.isnan(row["low"]) for row in intervals.compare_sensitivity(two, two, rates, rng, 10))
    assert set(rows) == set(intervals.SENSITIVITY)
    expected = {"mean over the grid": 2.2 / 3 - 1.1 / 3, "worst rate of each task": 0.6}
    for name, value in expected.items():
        assert rows[name]["difference"] == pytest.approx(value, abs=0.01)
        assert rows[name]["low"] <= value + 1e-9 and rows[name]["high"] >= value - 1e-9
    assert rows["plateau, decades"]["difference"] > 0 and math.isnan(rows["plateau, decades"]["low"])
    assert rows["lost by one rate for all tasks"]["high"] < 0
    assert rows["lost by one rate for all tasks"]["base"] == pytest.approx(0.4)
