"""The statistics of a sweep: what one run's curve says, intervals, aggregates over tasks, verdicts.

docs/benchmark.md explains them, studies/interval_coverage.py measures how often the intervals hold.
"""

import math

import numpy as np
from scipy import optimize, stats

from reading import POINTS, VERDICT_SEEDS

LAST = POINTS // 10  # points that "final" averages
SMOOTH = POINTS // 20  # points that "steps to threshold" averages
SPREAD_FLOOR = 0.3


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
    """Interval for the mean of a sample (n,): that of `stratified_mean` for one task."""
    return stratified_mean([x], rng, level, resamples)[1:]


def stratified_mean(tasks, rng, level=0.95, resamples=5000):
    """(estimate, low, high): the mean over tasks of the tasks' means, from their samples [(n,), ...], by the
    studentised bootstrap with each task resampled by itself (Efron and Tibshirani 1993, section 12.5).

    Unlike the percentile bootstrap, which covers about 90 % at ten values, it holds its level there, on skewed data
    too. A resample's standard error counts as at least SPREAD_FLOOR of the sample's: where one value lies far
    off, those without it would make the interval tens of times wider, and cover no more
    (studies/interval_coverage.py). Tasks of two or three values, which have next to no resamples, get a t interval
    with Satterthwaite's degrees of freedom, one of a single value NaN; samples without spread an interval without
    width.
    """
    tasks = [np.asarray(x, dtype=float) for x in tasks]
    if not tasks or not all(len(x) and np.isfinite(x).all() for x in tasks):
        return math.nan, math.nan, math.nan
    estimate = float(np.mean([x.mean() for x in tasks]))
    if min(map(len, tasks)) < 2:
        return estimate, math.nan, math.nan
    variances = np.array([x.var(ddof=1) / len(x) if np.ptp(x) else 0.0 for x in tasks])  # of the tasks' means
    if not variances.any():
        return estimate, estimate, estimate
    error = math.sqrt(variances.sum()) / len(tasks)
    if min(map(len, tasks)) < 4:
        freedom = variances.sum() ** 2 / sum(v**2 / (len(x) - 1) for v, x in zip(variances, tasks, strict=True))
        half = stats.t.ppf((1 + level) / 2, freedom) * error
        return estimate, estimate - half, estimate + half
    mean, variance = np.zeros((2, resamples))
    for x in tasks:
        sample = x[rng.integers(len(x), size=(resamples, len(x)))]
        mean += sample.mean(axis=1) / len(tasks)
        variance += sample.var(axis=1, ddof=1) / len(x) / len(tasks) ** 2
    t = (mean - estimate) / np.maximum(np.sqrt(variance), SPREAD_FLOOR * error)
    low, high = np.quantile(t, [(1 - level) / 2, (1 + level) / 2])
    return estimate, estimate - high * error, estimate - low * error


def expanded_interval(draws, estimate, n, freedom, level=0.95):
    """Percentile bootstrap interval (resamples first in `draws`) of a statistic of `n` seeds, widened to hold at
    small n. `n` is None if the draws have the unbiased standard deviation already.

    Its distances from the estimate grow by the factor by which a t interval of so many degrees of freedom, with the
    unbiased standard deviation, exceeds a normal one with the bootstrap's (after Hesterberg 2015, The American
    Statistician 69(4), who moves the quantiles instead). studies/interval_coverage.py shows what it covers.
    """
    tail = (1 - level) / 2
    factor = stats.t.ppf(tail, freedom) / stats.norm.ppf(tail) * (math.sqrt(n / (n - 1)) if n else 1)
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return estimate + factor * (low - estimate), estimate + factor * (high - estimate)


def failure_interval(differences, level=0.95):
    """Interval for the difference of two paired failure rates, from per-seed differences -1, 0, 1."""
    return stratified_failures([differences], level)[1:]


def stratified_failures(tasks, level=0.95):
    """(estimate, low, high): the mean over tasks of the differences of paired failure rates, from the tasks' per-seed
    differences -1, 0, 1.

    Agresti and Min 2005 (Statistics in Medicine 24): Wald's interval after half a pair more in each of the four
    cells, since a bootstrap of ten pairs without a difference would have no width. All tasks' pairs together, each
    task weighing the same; in the variance of that mean a task of few pairs weighs the more.
    """
    means, shares = (np.array([np.mean(x) for x in y]) for y in (tasks, [np.abs(d) for d in tasks]))
    estimate, weights = means.mean(), np.array([1 / len(d) for d in tasks])
    pairs = len(tasks) ** 2 / weights.sum()  # their number, where all tasks have equally many
    n, total = pairs + 2, pairs * estimate
    discordant = pairs * np.average(shares, weights=weights) + 1
    square = min(estimate**2, np.average(means**2, weights=weights))
    half = stats.norm.ppf((1 + level) / 2) * math.sqrt(discordant - pairs**2 / n * square) / n
    return float(estimate), max(-1.0, total / n - half), min(1.0, total / n + half)


def improvement(differences, level=0.95):
    """(p, low, high): share of the pairs that do better with the treatment, ties counting half, with Wilson's
    interval, widened to whole pairs."""
    n, wins = len(differences), np.sum(differences > 0) + np.sum(differences == 0) / 2
    low = stats.binomtest(math.floor(wins), n).proportion_ci(level, "wilson").low
    high = stats.binomtest(math.ceil(wins), n).proportion_ci(level, "wilson").high
    return wins / n, low, high


def superiority(base, treated, level=0.95):
    """(p, low, high): probability that a run of the treatment does better than one of the baseline, whatever their
    seeds: Mann and Whitney's statistic over n m, ties counting half (Agarwal et al. 2021's probability of improvement).

    The interval is, to each side, the wider of two. Newcombe's method 5 (2006, Statistics in Medicine 25, 559) takes
    the p from which the estimate lies no more than z standard errors away, of a variance that does not vanish where all
    runs of one arm do better; DeLong's variance (1988) assumes nothing of the arms' spreads. Each alone holds too
    rarely, for one task or for many.
    """
    base, treated = np.asarray(base, dtype=float), np.asarray(treated, dtype=float)
    wins = (np.sign(treated[:, None] - base) + 1) / 2
    p, (n, m) = float(wins.mean()), wins.shape
    more, z = (n + m) / 2 - 1, stats.norm.ppf((1 + level) / 2)

    def beyond(x, sign):
        variance = x * (1 - x) * (1 + more * ((1 - x) / (2 - x) + x / (1 + x))) / (n * m)
        return sign * (p - x) - z * math.sqrt(variance)

    low = optimize.brentq(beyond, 0, p - 1e-9, args=(1,)) if p > 1e-6 else 0.0
    high = optimize.brentq(beyond, p + 1e-9, 1, args=(-1,)) if p < 1 - 1e-6 else 1.0
    if min(n, m) > 1:
        variance = wins.mean(1).var(ddof=1) / n + wins.mean(0).var(ddof=1) / m
        half = stats.t.ppf((1 + level) / 2, n + m - 2) * math.sqrt(variance)
        low, high = min(low, max(0.0, p - half)), max(high, min(1.0, p + half))
    return p, low, high


def stratified_superiority(tasks, level=0.95):
    """(p, low, high): the mean over tasks [(base, treated), ...] of the probability of improvement.

    The tasks' own intervals combine by their distances from the estimates (Zou and Donner 2008, Statistics in
    Medicine 27, 1693), which keeps them asymmetric.
    """
    p, low, high = np.array([superiority(*pair, level) for pair in tasks]).T
    down, up = (math.sqrt(np.square(distance).sum()) / len(tasks) for distance in (p - low, high - p))
    return float(p.mean()), float(p.mean() - down), float(p.mean() + up)


def flip_test(differences, rng, flips=20000):
    """Two-sided p of "the differences are symmetric about zero" (Fisher's randomisation test of the mean): the share
    of all ways to flip their signs, or of so many random ones, whose mean lies as far out."""
    d = np.asarray(differences, dtype=float)
    if 2 ** len(d) <= flips:
        signs = 1 - 2 * (np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1)
    else:
        signs = np.vstack([np.ones(len(d)), rng.choice([-1, 1], size=(flips, len(d)))])
    means = np.abs(signs @ d)
    return float((means >= abs(d.sum()) * (1 - 1e-9)).mean())


def holm(p):
    """Holm's adjusted p values (1979) of a family: each is significant where it is at most .05."""
    p = np.asarray(p, dtype=float)
    order, adjusted = np.argsort(p), np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))))
    return adjusted


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


# The family of comparisons that verdicts draw on: claim, measure, the column of the run table, its estimator. All are
# differences in favour of the arm: more is better, of the failure rate and its like the decrease.
FAMILY = [
    ("faster", "area under the curve, mean difference", "auc", "mean"),
    ("faster", "area under the curve, probability of improvement", "auc", "superiority"),
    ("better", "final return, mean difference", "final", "mean"),
    ("better", "final return, probability of improvement", "final", "superiority"),
    ("more robust", "worst quarter of the seeds, final return, difference", "final", "cvar"),
    ("more robust", "failure rate, decrease", "final", "failures"),
]
# Beside them, at 95 % without correction
EXPLORATORY = [
    ("faster", "share of the budget to the threshold, decrease", "steps", "mean"),
    ("faster", "area under the curve, IQM, difference", "auc", "iqm"),
    ("better", "final return, IQM, difference", "final", "iqm"),
    ("more robust", "spread over seeds, decrease", "final", "spread"),
]
CLAIMS = ("faster", "better", "more robust")
AT_MOST_LESS = 0.05  # that an arm called more robust may return in the end


def aggregate(kind, base, treated, rng, resamples, level=0.95):
    """(estimate, low, high) of a measure of two arms, in favour of `treated`, over tasks.

    `base` and `treated` are lists of each task's scores (n,), paired by seed. Kinds: `mean` of the differences;
    `superiority`, the probability of improvement, .5 being none; `cvar`, the difference of the means of the worst
    quarters; `failures`, the decrease of the failure rate; `spread`, of the standard deviation; `iqm`, the difference
    of the interquartile means over all tasks, with as many seeds of each as the poorest has.
    """
    pairs = list(zip(base, treated, strict=True))
    if kind == "mean":
        return stratified_mean([t - b for b, t in pairs], rng, level, resamples)
    if kind == "superiority":
        return stratified_superiority(pairs, level)
    if kind == "failures":
        return stratified_failures([(b < 0.5).astype(int) - (t < 0.5) for b, t in pairs], level)
    if kind == "iqm":
        arrays = [np.stack([x[: min(map(len, arm))] for x in arm], axis=-1) for arm in (base, treated)]
        draws = [iqm(x) for x in resampled(arrays, rng, resamples)]
        estimate, freedom = float(iqm(arrays[1]) - iqm(arrays[0])), sum(len(x) - 1 for x in base)
        n = np.mean([len(b) for b in base])
        return estimate, *expanded_interval(draws[1] - draws[0], estimate, n, freedom, level)
    statistic = cvar if kind == "cvar" else lambda x: -x.std(axis=-1, ddof=1)
    differences = [statistic(t) - statistic(b) for b, t in pairs]
    estimate, draws, variances, freedoms = float(np.mean(differences)), 0.0, [], []
    for (b, t), difference in zip(pairs, differences, strict=True):
        index, n = rng.integers(len(b), size=(resamples, len(b))), len(b)
        deviations = (statistic(t[index]) - statistic(b[index]) - difference) * math.sqrt(n / (n - 1)) / len(pairs)
        draws += deviations
        variances.append(deviations.var())
        freedoms.append(math.ceil(n / 4) if kind == "cvar" else n - 1)  # the values that it is a mean of
    total = sum(variances)  # Satterthwaite's degrees of freedom: those of the tasks that vary
    freedom = total**2 / sum(v**2 / f for v, f in zip(variances, freedoms, strict=True)) if total else 1
    return estimate, *expanded_interval(estimate + draws, estimate, None, freedom, level)


def survival(scores):
    """Of arrays (seeds, tasks) the share of each task's runs that is among the middle half that `iqm` averages."""
    flat = scores.ravel()
    cut = int(0.25 * flat.size)
    kept = np.zeros(flat.size, dtype=bool)
    kept[np.argsort(flat, kind="stable")[cut : flat.size - cut]] = True
    return kept.reshape(scores.shape).mean(axis=0)


def verdict(claim, rows, final, margin, learns):
    """What the corrected intervals of a claim's rows (FAMILY) say, as docs/benchmark.md has it.

    `final` is the row of the final return's mean difference; `learns` says whether any run of the arm does. An
    interval that is not known (NaN) says nothing.
    """
    neutral = lambda row: 0.5 if "probability" in row["measure"] else 0.0  # noqa: E731
    sizes = [row for row in rows if "probability" not in row["measure"]]
    good, bad = any(row["low"] > neutral(row) for row in rows), any(row["high"] < neutral(row) for row in rows)
    if all(-margin <= row["low"] and row["high"] <= margin for row in sizes):
        return "equivalent"
    if good and bad:
        return "mixed"
    if claim != "more robust" and good and not sizes[0]["low"] > -margin:
        return "not distinguishable: more often ahead, perhaps behind in the mean"
    if claim != "more robust" and bad and not sizes[0]["high"] < margin:
        return "not distinguishable: more often behind, perhaps ahead in the mean"
    if bad:
        return "contradicted"
    if good and not learns:
        return "not supported: the arm never learns"
    if good and claim == "more robust" and not final["low"] > -AT_MOST_LESS:
        return "not supported: it may return less"
    return "supported" if good else "not distinguishable"


def not_ahead(base, treated, columns):
    """Two tables of the same seeds, in which a run that diverged, or never ended an episode, has in `columns` what the
    other arm's run has, if that is less: its score, 0, would put it ahead of one that is worse than random."""
    failed = [table.diverged | table.endless for table in (base, treated)]
    less = np.minimum(base[columns], treated[columns])
    tables = zip((base, treated), failed, strict=True)
    return tuple(table.assign(**{c: table[c].mask(lost, less[c]) for c in columns}) for table, lost in tables)


def paired_tasks(scores, arm, against):
    """{(env, algo): (base, treated) tables by seed, of common seeds}, of the tasks that both arms have; without those
    of fewer than VERDICT_SEEDS pairs where others have more. A run that failed is not ahead of its pair."""
    both = {}
    for key, group in scores.groupby(["env", "algo"]):
        tables = [group[group.arm == name].set_index("seed") for name in (against, arm)]
        if len(common := tables[0].index.intersection(tables[1].index).sort_values()):
            both[key] = not_ahead(*(table.loc[common] for table in tables), ["norm_final", "norm_auc"])
    enough = {key: pair for key, pair in both.items() if len(pair[0]) >= VERDICT_SEEDS}
    return enough or both


def compare_aggregates(scores, arm, rng, resamples, against="baseline", level=0.95, family=FAMILY):
    """The rows of an aggregate table: one arm against another over their common tasks, in each measure of `family`.

    `scores` is the run table with normalised columns.
    """
    tasks = paired_tasks(scores, arm, against).values()
    counts = [len(base) for base, _ in tasks]
    if not counts or min(counts) < 2:
        return []
    rows = []
    for claim, measure, column, kind in family:
        base, treated = ([table[f"norm_{column}"].to_numpy(float) for table in arm] for arm in zip(*tasks, strict=True))
        if column == "steps":  # fewer are better
            base, treated = [-x for x in base], [-x for x in treated]
        estimate, low, high = aggregate(kind, base, treated, rng, resamples, level)
        if column == "steps" and all((x == -1).all() for x in (*base, *treated)):
            low = high = math.nan  # all are censored: that they are equal says nothing
        row = {"arm": arm, "against": against, "claim": claim, "measure": measure, "tasks": len(counts)}
        row |= {"fewest_seeds": min(counts), "most_seeds": max(counts), "estimate": estimate, "low": low, "high": high}
        rows.append(row | {"level": level})
    return rows


def interval_of(statistic, array, rng, resamples):
    """95 % interval of a statistic of the scores (seeds, tasks) of one arm, all tasks' seeds counting."""
    seeds, tasks = array.shape[:2]
    draws = statistic(resampled([array], rng, resamples)[0])
    return expanded_interval(draws, statistic(array), seeds, tasks * (seeds - 1))


def where_all_arms_ran(cell):
    """Of an algorithm's runs those of environments on which all of its arms have runs."""
    return cell[cell.groupby("env").arm.transform("nunique") == cell.arm.nunique()]


def matrix(scores, column):
    """(seeds, tasks) of a column, over the seeds that all tasks have, so far as there are as many."""
    groups = [group.sort_values("seed")[column].to_numpy() for _, group in scores.groupby(["env", "algo"])]
    n = min(map(len, groups))
    return np.stack([group[:n] for group in groups], axis=-1)


def mean_band(curves):
    """(mean, low, high) of what is finite of `curves` (n, points): pointwise 95 % t interval, NaN from fewer than
    two at a point."""
    known = np.isfinite(curves)
    n = known.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, curves, 0).sum(0) / n
        variance = np.where(known, curves - mean, 0) ** 2
        half = stats.t.ppf(0.975, n - 1) * np.sqrt(variance.sum(0) / (n - 1) / n)
    return mean, mean - half, mean + half


# Sensitivity to a hyperparameter. `grid` is a list over tasks of a list over rates of an arm's scores (n,), of the same
# seeds at all rates of a task: per-run normalised areas, clipped to [0, 1] so that no single failure outweighs the
# rest. After Adkins et al. 2024.


def grid_means(grid):
    """(tasks, rates): each cell's mean score."""
    return np.array([[np.mean(cell) for cell in task] for task in grid])


def split_halves(grid):
    """Two grids, of every other run."""
    return [[[cell[start::2] for cell in task] for task in grid] for start in (0, 1)]


def worst_rates(grid):
    """Score at the worst rate of each task, mean over tasks, chosen on one half of the runs and scored on the other,
    swapped and averaged, as a minimum over noisy means would count against the noisier arm."""
    first, second = map(grid_means, split_halves(grid))
    pairs = ((first, second), (second, first))
    return float(np.mean([np.take_along_axis(b, a.argmin(1)[:, None], axis=1).mean() for a, b in pairs]))


def best_rates(grid):
    """(score at the best rate of each task, at the best rate for all), means over tasks.

    Rates are chosen on one half of the runs and scored on the other, swapped and averaged: a maximum over noisy means
    would flatter the noisier arm. Takes two runs a cell.
    """
    first, second = map(grid_means, split_halves(grid))
    scores = []
    for chosen, scored in ((first, second), (second, first)):
        own = np.take_along_axis(scored, chosen.argmax(1)[:, None], axis=1).mean()
        scores.append((own, scored[:, chosen.mean(0).argmax()].mean()))
    return np.mean(scores, axis=0)


def one_for_all(grid):
    """What one rate for all tasks loses against the best for each."""
    own, common = best_rates(grid)
    return float(own - common)


def plateau(grid, rates, share=0.9):
    """Mean over tasks of the decades of the rate over which the mean score, linear in its logarithm between the
    grid's rates, is at least `share` of the task's best."""
    order, widths = np.argsort(rates), []
    x = np.log10(rates)[order]
    for means in grid_means(grid)[:, order]:
        fine = np.unique(np.concatenate([np.linspace(*ends, 201) for ends in zip(x[:-1], x[1:], strict=True)]))
        good = np.interp(fine, x, means) >= share * means.max() - 1e-12
        widths.append((np.diff(fine) * (good[:-1] & good[1:])).sum())
    return float(np.mean(widths))


SENSITIVITY = {
    "mean over the grid": lambda grid, rates: float(grid_means(grid).mean()),
    "best rate of each task": lambda grid, rates: float(best_rates(grid)[0]),
    "worst rate of each task": lambda grid, rates: worst_rates(grid),
    "lost by one rate for all tasks": lambda grid, rates: one_for_all(grid),
    "plateau, decades": plateau,
}


def resample_grid(grid, rng):
    """The grid with each cell's runs drawn anew, each half of `one_for_all` from its own runs."""
    drawn = []
    for task in grid:
        cells = [np.asarray(cell, dtype=float) for cell in task]
        new = [np.empty_like(cell) for cell in cells]
        for cell, copy in zip(cells, new, strict=True):
            for start in (0, 1):
                half = cell[start::2]
                copy[start::2] = half[rng.integers(len(half), size=len(half))] if len(half) else half
        drawn.append(new)
    return drawn


def compare_sensitivity(base, treated, rates, rng, resamples=1000, level=0.95):
    """Rows: each measure of SENSITIVITY of two arms' grids, and the difference treated - base with its interval.

    Of the mean over the grid that of `stratified_mean` of each seed's mean over the rates, as a seed's runs need not be
    independent of each other, seeds paired by their order; of the others the bootstrap's percentiles, seeds drawn
    within each task and rate, which at few seeds are too narrow; NaN where a cell has fewer than four runs. The plateau
    has no interval: noise makes dips in it and raises the best, so that it is the narrower the noisier an arm is. An
    arm that learns nowhere is as bad at every rate: read plateaus beside the best rate.
    """
    few = min(len(cell) for grid in (base, treated) for task in grid for cell in task) < 4
    draws = [(resample_grid(base, rng), resample_grid(treated, rng)) for _ in range(0 if few else resamples)]
    for name, measure in SENSITIVITY.items():
        own, other = measure(treated, rates), measure(base, rates)
        if few or measure is plateau:
            low = high = math.nan
        elif name == "mean over the grid":
            pairs = [(np.mean(b, axis=0), np.mean(t, axis=0)) for b, t in zip(base, treated, strict=True)]
            low, high = stratified_mean([t - b for b, t in pairs], rng, level)[1:]
        else:
            differences = [measure(t, rates) - measure(b, rates) for b, t in draws]
            low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
        yield {"measure": name, "base": other, "treated": own, "difference": own - other, "low": low, "high": high}
