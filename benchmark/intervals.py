"""The statistics of a sweep: what one run's curve says, intervals, aggregates over tasks, verdicts.

docs/benchmark.md explains them, studies/interval_coverage.py measures how often the intervals hold.
"""

import math

import numpy as np
from scipy import stats

from reading import POINTS

LAST = POINTS // 10  # points that "final" averages
SMOOTH = POINTS // 20  # points that "steps to threshold" averages
SPREAD_FLOOR = 0.3
VERDICT_SEEDS = 5  # fewer than so many have no verdict: the bootstrap of the aggregates would claim too much


def summarise(curve, budget, threshold):
    """What one run's gridded learning curve (POINTS,) says: a dict with the keys of METRICS, and whether it got there.

    final: mean of the last tenth; best: the largest mean of a tenth; drawdown: best - final; auc: mean of the curve;
    steps_to_threshold: first step at which the mean of a twentieth reaches `threshold`, the budget if none does.
    """
    tenths = np.convolve(curve, np.ones(LAST) / LAST, "valid")
    result = {"final": tenths[-1], "best": tenths.max(), "auc": curve.mean(), "drawdown": tenths.max() - tenths[-1]}
    reached = (
        np.convolve(curve, np.ones(SMOOTH) / SMOOTH, "valid") >= threshold if threshold is not None else np.array([])
    )
    steps = math.nan if threshold is None else budget
    if reached.any():
        steps = (np.argmax(reached) + SMOOTH) / POINTS * budget
    return result | {"steps_to_threshold": steps, "reached": bool(reached.any()) if threshold is not None else math.nan}


def mean_interval(x, rng, level=0.95, resamples=5000):
    """Interval for the mean of a sample (n,) by the studentised bootstrap (Efron and Tibshirani 1993, section 12.5).

    Unlike the percentile bootstrap, which covers about 90 % at ten values, it holds its level there, on skewed data
    too. A resample's standard deviation counts as at least SPREAD_FLOOR of the sample's: where one value lies far
    off, those without it would make the interval tens of times wider, and cover no more
    (studies/interval_coverage.py). Two or three values, which have next to no resamples, get a t interval, one NaN; a
    sample without spread has an interval without width.
    """
    x = np.asarray(x, dtype=float)
    if len(x) < 2 or not np.isfinite(x).all():
        return math.nan, math.nan
    if np.ptp(x) == 0:
        return x[0], x[0]
    if len(x) < 4:
        return tuple(stats.ttest_1samp(x, 0).confidence_interval(level))
    sample = x[rng.integers(len(x), size=(resamples, len(x)))]
    spread = sample.std(axis=1, ddof=1)
    t = (sample.mean(axis=1) - x.mean()) / np.maximum(spread, SPREAD_FLOOR * x.std(ddof=1))
    low, high = np.quantile(t, [(1 - level) / 2, (1 + level) / 2])
    return x.mean() - high * x.std(ddof=1), x.mean() - low * x.std(ddof=1)


def expanded_interval(draws, estimate, n, freedom, level=0.95):
    """Percentile bootstrap interval (resamples first in `draws`) of a statistic of `n` seeds, widened to hold at
    small n.

    Its distances from the estimate grow by the factor by which a t interval of so many degrees of freedom, with the
    unbiased standard deviation, exceeds a normal one with the bootstrap's (after Hesterberg 2015, The American
    Statistician 69(4), who moves the quantiles instead). studies/interval_coverage.py shows what it covers.
    """
    tail = (1 - level) / 2
    factor = math.sqrt(n / (n - 1)) * stats.t.ppf(tail, freedom) / stats.norm.ppf(tail)
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return estimate + factor * (low - estimate), estimate + factor * (high - estimate)


def failure_interval(differences, level=0.95):
    """Interval for the difference of two paired failure rates, from per-seed differences -1, 0, 1.

    Agresti and Min 2005 (Statistics in Medicine 24): Wald's interval after half a pair more in each of the four
    cells, since a bootstrap of ten pairs without a difference would have no width.
    """
    n, total, discordant = len(differences) + 2, np.sum(differences), np.sum(np.abs(differences)) + 1
    half = stats.norm.ppf((1 + level) / 2) * math.sqrt(discordant - total**2 / n) / n
    return max(-1.0, total / n - half), min(1.0, total / n + half)


def improvement(differences, level=0.95):
    """(p, low, high): probability that a seed does better with the treatment, ties counting half, with Wilson's
    interval."""
    n, wins = len(differences), np.sum(differences > 0) + np.sum(differences == 0) / 2
    low = stats.binomtest(math.floor(wins), n).proportion_ci(level, "wilson").low
    high = stats.binomtest(math.ceil(wins), n).proportion_ci(level, "wilson").high
    return wins / n, low, high


def cvar(x, share=0.25, axis=-1):
    """Mean of the worst `share` of the values, rounded up to whole ones."""
    x = np.sort(x, axis=axis)
    return np.take(x, range(math.ceil(share * x.shape[axis])), axis=axis).mean(axis=axis)


def iqm(x):
    """Interquartile mean over the last two axes (seeds, tasks) together: the middle half of all scores."""
    return stats.trim_mean(x.reshape(*x.shape[:-2], -1), 0.25, axis=-1)


def resampled(arrays, rng, resamples):
    """Stratified bootstrap: for each task its own seeds drawn anew, the same ones in all `arrays` (seeds, tasks).

    Returns arrays (resamples, seeds, tasks). Arms stay paired by seed.
    """
    seeds, tasks = arrays[0].shape
    index = rng.integers(seeds, size=(resamples, seeds, tasks))
    return [array[index, np.arange(tasks)] for array in arrays]


# The family of aggregate comparisons: claim, name, statistic of (..., seeds, tasks) arrays, sign, which array, and
# what its interval takes for its degrees of freedom: the seeds of all tasks, of one (worst seeds and spreads vary
# more), or none.
AGGREGATES = [
    ("faster", "area under the curve, IQM", iqm, 1, "auc", "tasks"),
    ("faster", "share of the budget to the threshold, mean", lambda x: x.mean((-2, -1)), -1, "steps", "tasks"),
    ("better", "final return, IQM", iqm, 1, "final", "tasks"),
    ("more robust", "CVaR 25 % over seeds, mean over tasks", lambda x: cvar(x, axis=-2).mean(-1), 1, "final", "task"),
    ("more robust", "failure rate", lambda x: (x < 0.5).mean((-2, -1)), -1, "final", "pairs"),
    (
        "more robust",
        "spread over seeds, mean over tasks",
        lambda x: x.std(axis=-2, ddof=1).mean(-1),
        -1,
        "final",
        "task",
    ),
]


def aggregate_difference(statistic, kind, base, treated, rng, resamples, level):
    """(difference, low, high) of a statistic of two arrays (seeds, tasks), treated minus base, paired by seed.

    `kind`, see AGGREGATES: "pairs" is the failure rate, whose interval is that of failure_interval, over all tasks'
    pairs.
    """
    seeds, tasks = base.shape
    estimate = float(statistic(treated) - statistic(base))
    if kind == "pairs":
        return estimate, *failure_interval(((treated < 0.5).astype(int) - (base < 0.5)).ravel(), level)
    draws = [statistic(x) for x in resampled([base, treated], rng, resamples)]
    freedom = (tasks if kind == "tasks" else 1) * (seeds - 1)
    return estimate, *expanded_interval(draws[1] - draws[0], estimate, seeds, freedom, level)


def verdict(claim, rows):
    """Supported if a corrected interval of the claim lies on the favourable side of zero and none on the other."""
    good, bad = any(r["better"] for r in rows), any(r["worse"] for r in rows)
    return "mixed" if good and bad else "supported" if good else "contradicted" if bad else "not distinguishable"


def compare_aggregates(scores, arm, rng, resamples, against="baseline"):
    """(rows, tasks, seeds): the aggregate table of one arm against another over the tasks (env, algo) that both have.

    `scores` is the run table with normalised columns. Intervals are those of the whole family together (Bonferroni).
    All tasks have the same number of pairs, the fewest that any has; one with fewer than VERDICT_SEEDS is left out if
    another has more.
    """
    both = {}
    for key, group in scores.groupby(["env", "algo"]):
        seeds = [set(group.loc[group.arm == name, "seed"]) for name in (against, arm)]
        if common := sorted(seeds[0] & seeds[1]):
            both[key] = (group, common)
    if not both:
        return [], 0, 0
    enough = {key: value for key, value in both.items() if len(value[1]) >= VERDICT_SEEDS}
    both = enough or both
    n = min(len(common) for _, common in both.values())
    if n < 2:
        return [], len(both), n
    arrays = {}
    for column in ("auc", "steps", "final"):
        for name in (against, arm):
            tables = [g[g.arm == name].set_index("seed").loc[c[:n], f"norm_{column}"] for g, c in both.values()]
            arrays[column, name] = np.stack(tables, axis=-1)
    rows, level = [], 1 - 0.05 / len(AGGREGATES)
    for claim, name, statistic, sign, column, kind in AGGREGATES:
        base, treated = arrays[column, against], arrays[column, arm]
        difference, low, high = aggregate_difference(statistic, kind, base, treated, rng, resamples, level)
        if column == "steps" and (base == 1).all() and (treated == 1).all():
            low = high = math.nan  # all are censored: that they are equal says nothing
        row = {"arm": arm, "against": against, "claim": claim, "measure": name, "tasks": len(both), "seeds": n}
        row |= {"of_against": float(statistic(base)), "of_arm": float(statistic(treated)), "difference": difference}
        row |= {"low": low, "high": high, "more_is_better": sign > 0}
        rows.append(row | {"better": min(sign * low, sign * high) > 0, "worse": max(sign * low, sign * high) < 0})
    return rows, len(both), n


def interval_of(statistic, array, rng, resamples):
    """95 % interval of a statistic of the scores (seeds, tasks) of one arm, all tasks' seeds counting."""
    seeds, tasks = array.shape[:2]
    draws = statistic(resampled([array], rng, resamples)[0])
    return expanded_interval(draws, statistic(array), seeds, tasks * (seeds - 1))


def matrix(scores, column):
    """(seeds, tasks) of a column, over the seeds that all tasks have, so far as there are as many."""
    groups = [group.sort_values("seed")[column].to_numpy() for _, group in scores.groupby(["env", "algo"])]
    n = min(map(len, groups))
    return np.stack([group[:n] for group in groups], axis=-1)


def mean_band(curves):
    """(mean, low, high) of the finite ones of `curves` (n, points): pointwise 95 % t interval, NaN from fewer than
    two."""
    curves = curves[np.isfinite(curves).all(1)]
    mean = curves.mean(0) if len(curves) else np.full(POINTS, math.nan)
    half = stats.t.ppf(0.975, len(curves) - 1) * stats.sem(curves) if len(curves) > 1 else np.full(POINTS, math.nan)
    return mean, mean - half, mean + half
