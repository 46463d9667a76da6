"""Statistics and plots of a sweep: what the runs below a folder show, and how sure that is.

    python benchmark/report.py results/sweep

Reads the runs that `benchmark.sh` or the scripts left below the folder (run.json and progress.csv) and writes beside
them report.md, CSV files with every number, and PNG plots. The arm called `baseline` is what every other arm is
compared with. docs/benchmark.md explains each number.
"""

import importlib
import json
import math
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import matplotlib
import numpy as np
import pandas as pd
import tyro
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

POINTS = 100  # every curve is read at so many equally spaced steps, the last one at the end of the budget
LAST = POINTS // 10  # points that "final" averages
SMOOTH = POINTS // 20  # points that "steps to threshold" averages
SPREAD_FLOOR = 0.3
VERDICT_SEEDS = 5  # fewer than so many have no verdict: the bootstrap of the aggregates would claim too much
REFERENCE_EPISODES = 100
REFERENCE_STEPS = 1_000_000  # a random policy whose episodes take longer than these in all has no reference
SETUP = {"run_dir", "seed", "exp_name", "torch_threads", "track", "wandb_project_name", "wandb_entity", "capture_video"}
SHARED = (
    "total_timesteps",
    "env_kwargs",
    "max_episode_steps",
)  # the same for all arms, the last two for all algorithms too
METRICS = {"final": 1, "best": 1, "auc": 1, "steps_to_threshold": -1, "drawdown": -1, "failed": -1}  # 1: more is better
COLLAPSE = {
    "alignment": "AC1 alignment (1)",
    "variability_quotient": "AC2 variability quotient (0)",
    "nc1": "AC2 NC1 (0)",
    "etf_error": "AC3 ETF error of the means (0)",
    "mean_weight_cosine": "AC3 cosine of means and weights (1)",
}
PANELS = ("alignment", "variability_quotient", "etf_error")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the modules of environments/
# Okabe and Ito's colours, told apart by colour-blind readers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass
class Args:
    folder: Annotated[Path, tyro.conf.Positional]
    """folder with runs anywhere below it; the report is written there"""
    resamples: int = 5000
    """bootstrap resamples"""
    seed: int = 0
    """seed of the bootstrap and of the random policy"""


def fail(message):
    sys.exit(f"error: {message}")


# Reading


def read_json(path):
    """The object in a JSON file; empty if there is no such file. Ends in one line if it holds something else."""
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError):
        fail(f"{path} cannot be read; remove it or restore it")


def read_runs(folder):
    """(runs, curves, problems, settings): a table with one row per finished run, its curves by index, what is missing
    (a dict from the run's folder to why), and each arm's arguments.

    Ends in one line if there is nothing to read or if runs that are to be compared were made with different settings.
    """
    rows, curves, problems, settings, finished = [], [], {}, {}, set()
    for path in sorted(folder.rglob("run.json")):
        run = path.parent.name
        try:
            record = json.loads(path.read_text())
            args, status = record["args"], record["status"]
            algo, _, arm = args["exp_name"].partition("_")
            env_id, seed, steps = args["env_id"], args["seed"], args["total_timesteps"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            problems[run] = "run.json cannot be read"
            continue
        if status != "finished":
            problems[run] = status
            continue
        try:
            curve = pd.read_csv(path.parent / "progress.csv")
            returns = curve[["global_step", "charts/episodic_return"]].dropna()
        except (OSError, ValueError, KeyError):
            problems[run] = "progress.csv cannot be read"
            continue
        if returns.empty:
            problems[run] = "no episode ended"
            continue
        key = (env_id, algo, arm)
        own = {k: v for k, v in args.items() if k not in SETUP} | {"script_sha256": record.get("script_sha256")}
        refuse_mixture(folder, key, own, key, settings.setdefault(key, own), own.keys() | settings[key].keys())
        for other, theirs in settings.items():
            if other[0] == env_id:
                refuse_mixture(folder, other, theirs, key, own, SHARED[other[1] != algo :])
        if (*key, seed) in finished:
            fail(f"{folder} holds {env_id} {algo} {arm} seed {seed} twice; remove one")
        finished.add((*key, seed))
        rows.append(
            {"env": env_id, "algo": algo, "arm": arm, "seed": seed, "budget": steps, "wall_time": record["wall_time"]}
        )
        curves.append(curve)
    names = {run_name(*key) for key in finished}
    for run, planned in read_json(folder / "manifest.json").get("runs", {}).items():
        if run not in problems and run not in names:
            problems[run] = "no result" if planned["status"] == "finished" else planned["status"]
    if not rows:
        fail(
            f"{folder} holds no finished runs"
            + (f" ({len(problems)} unfinished)" if problems else "")
            + "; run benchmark.sh"
        )
    runs = pd.DataFrame(rows)
    for (env_id, algo), cell in runs.groupby(["env", "algo"]):
        for arm in cell.arm.unique():
            for seed in sorted(set(cell.seed) - set(cell.seed[cell.arm == arm])):
                problems.setdefault(run_name(env_id, algo, arm, seed), "no run")
    return runs, curves, problems, settings


def run_name(env_id, algo, arm, seed):
    """The name of a run's folder, as sweep.py gives it."""
    return re.sub(r"[^\w.=-]+", "_", f"{env_id}__{algo}_{arm}__{seed}")


def refuse_mixture(folder, one, settings, other, others, keys):
    if different := sorted(k for k in keys if settings.get(k) != others.get(k)):
        shown = ", ".join(f"{k} {settings.get(k)!r} and {others.get(k)!r}" for k in different[:3])
        names = " and ".join(dict.fromkeys(" ".join(key) for key in (one, other)))
        fail(f"{folder} mixes runs of {names} made with different settings ({shown}); keep one kind")


def on_grid(curve, tag, budget):
    """A tag's curve at POINTS equally spaced steps, by linear interpolation; NaN throughout if it has no value."""
    steps, values = (
        curve["global_step"].to_numpy(float),
        pd.to_numeric(curve.get(tag, pd.Series(dtype=float)), errors="coerce"),
    )
    values = values.to_numpy(float) if len(values) else np.full(len(steps), np.nan)
    known = np.isfinite(values)
    if not known.any():
        return np.full(POINTS, np.nan)
    return np.interp(np.linspace(budget / POINTS, budget, POINTS), steps[known], values[known])


def reward_threshold(env_id):
    """The environment's threshold, or None; an id such as module:MyEnv-v0 has its module imported first."""
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return gym.spec(name).reward_threshold
    except Exception as error:  # importing somebody's module can fail in any way
        why = " ".join(str(error).split())
        fail(f"the runs' environment {env_id} cannot be found ({why}); put its module on PYTHONPATH")


def random_return(args, seed, cache):
    """Mean return of the uniform random policy, over REFERENCE_EPISODES seeded episodes; measured once per folder and
    seed.

    None if those take more than REFERENCE_STEPS steps.
    """
    key = " ".join(str(args[k]) for k in ("env_id", "env_kwargs", "max_episode_steps"))
    if cache.get(key, {}).get("seed") != seed:
        env = gym.make(args["env_id"], max_episode_steps=args["max_episode_steps"], **json.loads(args["env_kwargs"]))
        env.action_space.seed(seed)
        totals, steps = [], 0
        while len(totals) < REFERENCE_EPISODES and steps < REFERENCE_STEPS:
            env.reset(seed=seed if not totals else None)
            total, over = 0.0, False
            while not over and steps < REFERENCE_STEPS:
                _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
                total, over, steps = total + float(reward), terminated or truncated, steps + 1
            totals.append(total)
        env.close()
        mean, error = (float(np.mean(totals)), float(stats.sem(totals))) if steps < REFERENCE_STEPS else (None, None)
        cache[key] = {"mean": mean, "standard_error": error, "episodes": len(totals), "seed": seed}
    return cache[key]["mean"]


# Statistics


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


# Plots


def style():
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False})


def mean_band(curves):
    """(mean, low, high) of the finite ones of `curves` (n, points): pointwise 95 % t interval, NaN from fewer than
    two."""
    curves = curves[np.isfinite(curves).all(1)]
    mean = curves.mean(0) if len(curves) else np.full(POINTS, math.nan)
    half = stats.t.ppf(0.975, len(curves) - 1) * stats.sem(curves) if len(curves) > 1 else np.full(POINTS, math.nan)
    return mean, mean - half, mean + half


def band(axes, x, curves, colour, label, **options):
    """Mean of `curves` (n, points) with its pointwise 95 % t interval."""
    mean, low, high = mean_band(curves)
    if np.isfinite(mean).all():
        axes.plot(x, mean, color=colour, label=label, **options)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def save(figure, path):
    """Write the figure with one legend of everything that carries a label in any of its axes."""
    labelled = {}
    for axes in figure.axes:
        labelled |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=int(figure.get_figwidth() // 2))
    figure.savefig(path)
    plt.close(figure)


def plot_curves(runs, returns, thresholds, colours, path):
    envs, algos = runs.env.unique(), runs.algo.unique()
    size = (1 + 3.2 * len(envs), 0.8 + 2.6 * len(algos))
    figure, grid = plt.subplots(len(algos), len(envs), figsize=size, squeeze=False, layout="constrained", sharex="col")
    for i, algo in enumerate(algos):
        for j, env in enumerate(envs):
            axes, cell = grid[i][j], runs[(runs.env == env) & (runs.algo == algo)]
            for arm in (arm for arm in colours if arm in set(cell.arm)):
                group = cell[cell.arm == arm]
                steps = np.linspace(1 / POINTS, 1, POINTS) * group.budget.iloc[0] / 1000
                band(axes, steps, returns[group.index], colours[arm], arm)
            if thresholds[env] is not None:
                axes.axhline(thresholds[env], color="grey", linestyle=":", linewidth=1, label="reward threshold")
            axes.set_title(f"{env}, {algo}")
            axes.set_ylabel("episodic return" if j == 0 else "")
            axes.set_xlabel("thousand environment steps" if i == len(algos) - 1 else "")
    save(figure, path)


def logged(curves, index, tag, at):
    """The value that each run logged first (at = 0) or last (-1) under a tag; runs without one are left out."""
    values = [curves[k].get(tag, pd.Series(dtype=float)).dropna() for k in index]
    return [float(v.iloc[at]) for v in values if len(v)]


def plot_collapse(runs, curves, returns, algo, colours, path):
    cell = runs[runs.algo == algo]
    envs, arms = (
        cell.env.unique(),
        [arm for arm in colours if arm in set(cell.arm)][:2],
    )  # the baseline and ACPG come first
    size = (13, 0.8 + 2.6 * len(envs))
    figure, grid = plt.subplots(len(envs), 1 + len(PANELS), figsize=size, squeeze=False, layout="constrained")
    for i, env in enumerate(envs):
        for arm in arms:
            group = cell[(cell.env == env) & (cell.arm == arm)]
            if group.empty:
                continue
            budget = group.budget.iloc[0]
            steps = np.linspace(1 / POINTS, 1, POINTS) * budget / 1000
            band(grid[i][0], steps, returns[group.index], colours[arm], arm)
            for axes, metric in zip(grid[i][1:], PANELS, strict=True):
                for prefix, label, options in (
                    ("collapse", arm, {}),
                    ("collapse_null", f"{arm}, labels permuted", {"linestyle": "--"}),
                ):
                    if prefix == "collapse_null" and metric == "variability_quotient":
                        continue  # hundreds: it would flatten the rest; the table has it
                    read = np.stack([on_grid(curves[k], f"{prefix}/{metric}", budget) for k in group.index])
                    band(axes, steps, read, colours[arm], label, **options)
                untrained = np.mean(logged(curves, group.index, f"collapse/{metric}", 0) or math.nan)
                axes.plot(
                    0, untrained, "D", color=colours[arm], fillstyle="none", label=f"{arm}, untrained", clip_on=False
                )
        grid[i][0].set_ylabel(f"{env}\nepisodic return")
        for axes, metric in zip(grid[i][1:], PANELS, strict=True):
            axes.set_ylabel(COLLAPSE[metric])
            if metric == "etf_error":  # which is 0 up to rounding where only two actions occur
                axes.set_ylim(-0.05, 1.05)
        for axes in grid[i]:
            axes.set_xlabel("thousand environment steps" if i == len(envs) - 1 else "")
    save(figure, path)


def plot_verdicts(rows, colours, path):
    """The aggregate differences from the baseline with their corrected intervals; right of zero the arm is better."""
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    size = (9, 1.3 + len(measures) * (0.25 + 0.22 * len(arms)))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for row in rows:
        y = measures.index(row["measure"]) + 0.6 * ((arms.index(row["arm"]) + 0.5) / len(arms) - 0.5)
        low, middle, high = ((1 if row["more_is_better"] else -1) * row[key] for key in ("low", "difference", "high"))
        label = f"{row['arm']} ({row['tasks']} tasks, {row['seeds']} seeds)"
        axes.plot([low, high], [y, y], color=colours[row["arm"]], linewidth=5, alpha=0.45, solid_capstyle="butt")
        axes.plot(middle, y, "o", color=colours[row["arm"]], label=label)
    axes.axvline(0, color="black", linewidth=1)
    claims = {row["measure"]: row["claim"] for row in rows}
    axes.set_yticks(range(len(measures)), [f"{claims[m]}: {m}" for m in measures])
    axes.set_ylim(len(measures) - 0.5, -0.5)
    axes.set_xlabel("\N{LEFTWARDS ARROW} baseline better    99.17 % interval    arm better \N{RIGHTWARDS ARROW}")
    save(figure, path)


def plot_aggregate(scores, colours, rng, resamples, path):
    """IQM of normalised final return and area under the curve, per algorithm and arm, with 95 % bootstrap intervals."""
    algos = list(scores.algo.unique())
    most = scores.groupby("algo").arm.nunique().max()
    size = (10, 1.2 + len(algos) * (0.3 + 0.25 * most))
    figure, grid = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    table = []
    for axes, (column, title) in zip(grid, (("final", "final return"), ("auc", "area under the curve")), strict=True):
        for i, algo in enumerate(algos):
            cell = scores[scores.algo == algo]
            cell = cell[cell.groupby("env").arm.transform("nunique") == cell.arm.nunique()]  # where all arms have been
            arms = [arm for arm in colours if arm in set(cell.arm)]
            for k, arm in enumerate(arms):
                array = matrix(cell[cell.arm == arm], f"norm_{column}")
                value, low, high = float(iqm(array)), math.nan, math.nan
                if len(array) > 1:
                    low, high = interval_of(iqm, array, rng, resamples)
                y = i + 0.7 * ((k + 0.5) / len(arms) - 0.5)
                axes.plot([low, high], [y, y], color=colours[arm], linewidth=5, alpha=0.45, solid_capstyle="butt")
                axes.plot(value, y, "o", color=colours[arm], label=arm)
                table.append({"algo": algo, "arm": arm, "measure": column, "iqm": value, "low": low, "high": high})
        axes.set_xlabel(f"IQM of normalised {title}\n(0 random policy, 1 threshold)")
        axes.set_yticks(range(len(algos)), algos)
        axes.set_ylim(len(algos) - 0.5, -0.5)
    save(figure, path)
    return pd.DataFrame(table)


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


def plot_profile(scores, efficiency, colours, rng, resamples, out):
    """Performance profile (share of runs above a score) and sample efficiency (IQM against the share of the budget)."""
    low = min(0.0, float(scores.norm_final.quantile(0.02)))
    taus, shares = np.linspace(low, max(1.2, scores.norm_final.max()), 200), np.linspace(1 / POINTS, 1, POINTS)
    resamples = min(resamples, 2000)
    plots = {
        "profile": (taus, "normalised final return τ (0 random policy, 1 threshold)", "share of runs above τ"),
        "efficiency": (shares, "share of the step budget", "IQM of normalised return"),
    }
    for name, (x, x_label, y_label) in plots.items():
        figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
        frames = []
        for arm, colour in colours.items():
            rows = scores[scores.arm == arm]
            if name == "profile":
                array = matrix(rows, "norm_final")
                statistics = [lambda x: (x[..., None] > taus).mean((-3, -2))]
                arrays = [array]
            else:
                groups = [efficiency[group.sort_values("seed").index] for _, group in rows.groupby(["env", "algo"])]
                array = np.stack([group[: min(map(len, groups))] for group in groups], axis=1)  # seeds, tasks, points
                statistics, arrays = [iqm] * POINTS, np.moveaxis(array, -1, 0)
            value = np.hstack([f(a) for f, a in zip(statistics, arrays, strict=True)])
            axes.plot(x, value, color=colour, label=arm)
            frame = pd.DataFrame({"arm": arm, "x": x, "value": value, "low": math.nan, "high": math.nan})
            if len(array) > 1:
                both = [interval_of(f, a, rng, resamples) for f, a in zip(statistics, arrays, strict=True)]
                frame["low"], frame["high"] = (np.hstack(side) for side in zip(*both, strict=True))
                if name == "profile":  # of shares
                    frame[["low", "high"]] = frame[["low", "high"]].clip(0, 1)
                axes.fill_between(x, frame.low, frame.high, color=colour, alpha=0.2, linewidth=0)
            frames.append(frame)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        save(figure, out / f"{name}.png")
        pd.concat(frames).to_csv(out / f"{name}.csv", index=False, float_format="%.5g")


# The report


def number(x, digits=3):
    if x is None or (isinstance(x, float) and math.isnan(x)):
        return "-"
    return f"{x:.{digits}g}" if abs(x) < 1000 else f"{x:,.0f}"


def table(rows, header):
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows]) + "\n"


def aggregate_table(rows):
    measure = "measure (normalised: 0 random policy, 1 threshold)"
    header = ("arm", "against", "claim", measure, "better if", "of the latter", "of the arm", "difference, 99.17 %")
    words = [[row[key] for key in ("arm", "against", "claim", "measure")] for row in rows]
    words = [[*w, "more" if row["more_is_better"] else "less"] for w, row in zip(words, rows, strict=True)]
    numbers = [[number(row[key]) for key in ("of_against", "of_arm")] for row in rows]
    last = [f"{number(row['difference'])} [{number(row['low'])}, {number(row['high'])}]" for row in rows]
    return table([(*w, *n, d) for w, n, d in zip(words, numbers, last, strict=True)], header)


def main():
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    folder, rng = args.folder, np.random.default_rng(args.seed)
    if not folder.is_dir():
        fail(f"{folder} is no folder; give the one that benchmark.sh wrote to")
    if args.resamples < 2000:
        fail(f"--resamples must be at least 2000, got {args.resamples}")
    warnings.filterwarnings("ignore", message="Precision loss occurred")
    runs, curves, problems, settings = read_runs(folder)
    out = folder / "report"
    try:
        out.mkdir(exist_ok=True)
        (folder / "report.md").touch()
    except OSError as error:
        fail(f"{folder} cannot be written: {error.strerror}")
    style()
    arms = sorted(runs.arm.unique(), key=lambda arm: (arm != "baseline", arm != "acpg", arm))
    others = [arm for arm in arms if arm not in ("baseline", "acpg")]
    colours = {"baseline": COLOURS[0], "acpg": COLOURS[1]} | {arm: COLOURS[2 + i % 5] for i, arm in enumerate(others)}
    colours = {arm: colours[arm] for arm in arms}
    envs = list(runs.env.unique())
    cache_path = folder / "references.json"
    cache, thresholds, randoms = read_json(cache_path), {}, {}
    for (env, _, _), own in settings.items():
        if env not in thresholds:
            thresholds[env] = reward_threshold(env)
            randoms[env] = None if thresholds[env] is None else random_return(own, args.seed, cache)
    usable = [env for env in envs if randoms[env] is not None and thresholds[env] > randoms[env]]
    cache_path.write_text(json.dumps(cache, indent=1) + "\n")

    # Each run
    returns = np.stack(
        [on_grid(curve, "charts/episodic_return", b) for curve, b in zip(curves, runs.budget, strict=True)]
    )
    summary = [summarise(r, b, thresholds[e]) for r, b, e in zip(returns, runs.budget, runs.env, strict=True)]
    runs = pd.concat([runs, pd.DataFrame(summary)], axis=1)
    span = runs.env.map(lambda env: thresholds[env] - randoms[env] if env in usable else math.nan)
    random = runs.env.map(randoms).astype(float)
    runs["norm_final"], runs["norm_auc"] = (runs.final - random) / span, (runs.auc - random) / span
    runs["norm_steps"] = runs.steps_to_threshold / runs.budget
    runs["failed"] = np.where(span.notna(), runs.norm_final < 0.5, math.nan)
    runs.to_csv(out / "runs.csv", index=False, float_format="%.6g")

    # Each cell, and its seed-paired differences
    cells, differences = [], []
    for (env, algo), group in runs.groupby(["env", "algo"], sort=False):
        base = group[group.arm == "baseline"].set_index("seed")
        for arm in (arm for arm in arms if arm in set(group.arm)):
            rows = group[group.arm == arm]
            low, high = mean_interval(rows.final, rng, resamples=args.resamples)
            cell = {"env": env, "algo": algo, "arm": arm, "seeds": len(rows), "final": rows.final.mean()}
            cell |= {"final_low": low, "final_high": high} | {m: rows[m].mean() for m in list(METRICS)[1:]}
            cell |= {
                "final_median": rows.final.median(),
                "final_sd": rows.final.std(ddof=1),
                "cvar25": cvar(rows.final.to_numpy()),
            }
            cells.append(cell | {"reached": rows.reached.mean(), "failure_rate": rows.failed.mean()})
            if arm == "baseline" or base.empty:
                continue
            treated = rows.set_index("seed")
            common = sorted(set(base.index) & set(treated.index))
            for metric, sign in METRICS.items():
                d = (treated.loc[common, metric] - base.loc[common, metric]).to_numpy(float)
                if not len(d) or not np.isfinite(d).all():
                    continue
                if metric == "failed":
                    low, high = failure_interval(d)
                elif metric == "steps_to_threshold" and not (
                    treated.reached[common].any() or base.reached[common].any()
                ):
                    low, high = math.nan, math.nan  # all are censored: that they are equal says nothing
                else:
                    low, high = mean_interval(d, rng, resamples=args.resamples)
                p, p_low, p_high = improvement(sign * d) if np.isfinite(low) or len(d) < 2 else (math.nan,) * 3
                row = {"env": env, "algo": algo, "arm": arm, "metric": metric, "seeds": len(d), "difference": d.mean()}
                differences.append(
                    row | {"low": low, "high": high, "p_improvement": p, "p_low": p_low, "p_high": p_high}
                )
            pair = [x.loc[common, "final"].to_numpy()[:, None] for x in (base, treated)]
            if len(common) > 1:
                worst = lambda x: cvar(x[..., 0])  # noqa: E731
                d, low, high = aggregate_difference(worst, "task", *pair, rng, args.resamples, 0.95)
                row = {"env": env, "algo": algo, "arm": arm, "metric": "cvar25", "seeds": len(common), "difference": d}
                differences.append(row | {"low": low, "high": high})
    columns = ["env", "algo", "arm", "metric"]  # a file without rows has a header at least
    cells, differences = pd.DataFrame(cells), pd.DataFrame(differences, columns=None if differences else columns)
    cells.to_csv(out / "cells.csv", index=False, float_format="%.6g")
    differences.to_csv(out / "differences.csv", index=False, float_format="%.6g")

    # Curves, compact: mean over seeds with the pointwise interval of the plots
    compact = []
    tags = ["charts/episodic_return"] + [
        f"{prefix}/{metric}" for metric in PANELS for prefix in ("collapse", "collapse_null")
    ]
    for (env, algo, arm), group in runs.groupby(["env", "algo", "arm"], sort=False):
        budget = group.budget.iloc[0]
        steps = np.linspace(1 / POINTS, 1, POINTS) * budget
        for tag in tags:
            read = np.stack([on_grid(curves[k], tag, budget) for k in group.index])
            mean, low, high = mean_band(read)
            frame = {
                "env": env,
                "algo": algo,
                "arm": arm,
                "tag": tag,
                "step": steps,
                "mean": mean,
                "low": low,
                "high": high,
            }
            compact.append(pd.DataFrame(frame))
    pd.concat(compact).to_csv(out / "curves.csv", index=False, float_format="%.5g")

    # Collapse
    collapse = []
    for (env, algo, arm), group in runs.groupby(["env", "algo", "arm"], sort=False):
        for metric in COLLAPSE:
            read = {}
            for name, tag, at in (
                ("untrained", "collapse", 0),
                ("trained", "collapse", -1),
                ("null", "collapse_null", -1),
            ):
                values = logged(curves, group.index, f"{tag}/{metric}", at)
                read[name] = np.mean(values) if values else math.nan
                if name == "trained":
                    read["low"], read["high"] = mean_interval(values, rng, resamples=args.resamples)
            collapse.append({"env": env, "algo": algo, "arm": arm, "metric": metric} | read)
    collapse = pd.DataFrame(collapse)
    collapse.to_csv(out / "collapse.csv", index=False, float_format="%.6g")

    # Across environments
    scores = runs[runs.norm_final.notna()]
    aggregates, verdicts, controls = [], [], []
    if not scores.empty:
        for arm in arms[1:] if arms[0] == "baseline" else []:
            rows, tasks, seeds = compare_aggregates(scores, arm, rng, args.resamples)
            aggregates += rows
            for claim in ("faster", "better", "more robust"):
                part = [row for row in rows if row["claim"] == claim]
                verdicts.append(
                    (
                        arm,
                        claim,
                        verdict(claim, part) if part and seeds >= VERDICT_SEEDS else "too few seeds",
                        tasks,
                        seeds,
                    )
                )
        if "acpg" in arms:
            for control in others:
                controls += compare_aggregates(scores, "acpg", rng, args.resamples, against=control)[0]
        if aggregates:
            plot_verdicts(aggregates, colours, out / "verdicts.png")
        efficiency = (returns - random.to_numpy()[:, None]) / span.to_numpy()[:, None]
        table_iqm = plot_aggregate(scores, colours, rng, args.resamples, out / "aggregate.png")
        table_iqm.to_csv(out / "iqm.csv", index=False, float_format="%.6g")
        tasks = scores.groupby("arm")[["env", "algo"]].apply(lambda x: len(x.drop_duplicates()))
        everywhere = {arm: colour for arm, colour in colours.items() if tasks.get(arm) == tasks.max()}
        plot_profile(scores, efficiency, everywhere, rng, args.resamples, out)
    columns = ["arm", "against", "claim", "measure"]
    frame = pd.DataFrame(aggregates + controls, columns=None if aggregates or controls else columns)
    frame.to_csv(out / "aggregates.csv", index=False, float_format="%.6g")
    pd.DataFrame(verdicts, columns=["arm", "claim", "verdict", "tasks", "seeds"]).to_csv(
        out / "verdicts.csv", index=False
    )
    plot_curves(runs, returns, thresholds, colours, out / "curves.png")
    for algo in runs.algo.unique():
        plot_collapse(runs, curves, returns, algo, colours, out / f"collapse_{algo}.png")

    # report.md
    text = [
        f"# Report\n\n{len(runs)} finished runs; environments: {', '.join(envs)}. Made by `python benchmark/report.py`;"
        " docs/benchmark.md explains every number. Differences are arm minus baseline, paired by seed. Intervals are of"
        " 95 % unless another level is given.\n"
    ]
    if problems:
        what = "Their pairs are left out of every comparison, and they do not count as failures to learn"
        text.append(f"**Missing: {len(problems)} runs.** {what}.\n")
        text.append("\n".join(f"- {run.replace('__', ' ')}: {why}" for run, why in sorted(problems.items())) + "\n")
    counts = cells.seeds.unique()
    if len(counts) > 1:
        text.append(
            f"The cells have unequal numbers of seeds ({min(counts)} to {max(counts)}); pairs use the common ones.\n"
        )
    if min(counts) < 2:
        text.append("A cell with a single seed has no interval.\n")
    if without := [env for env in envs if thresholds[env] is None]:
        text.append(f"No reward threshold, hence in no aggregate and without steps to it: {', '.join(without)}.\n")
    if without := [env for env in envs if thresholds[env] is not None and env not in usable]:
        why = f"the random policy reaches the threshold, or does not end its episodes in {REFERENCE_STEPS:,} steps"
        text.append(f"In no aggregate, since {why}: {', '.join(without)}.\n")
    base = cells[cells.arm == "baseline"]
    if never := [f"{c.env} {c.algo}" for c in base.itertuples() if c.reached == 0]:
        text.append(f"No seed of the baseline reached the reward threshold within the budget: {', '.join(never)}.\n")
    if never := [f"{c.env} {c.algo}" for c in base.itertuples() if c.failure_rate == 1]:
        text.append(
            f"**Never learned** by the baseline (every seed ends nearer to the random policy): {', '.join(never)}.\n"
        )
    text.append("## Verdicts\n")
    if verdicts:
        text.append(
            "Each claim from the intervals of the aggregate table, of 99.17 %: Bonferroni's correction of 95 % for "
            f"the six comparisons of an arm. With fewer than {VERDICT_SEEDS} seeds there is none; tasks with fewer are "
            "left out where others have more. All tasks count as many pairs as the one with the fewest.\n"
        )
        header = ("arm", "claim", "verdict", "tasks (environment x algorithm)", "seeds")
        text.append(table([(a, c, f"**{v}**", t, s) for a, c, v, t, s in verdicts], header))
        if aggregates:
            text.append("![verdicts](report/verdicts.png)\n")
            text.append(aggregate_table(aggregates))
    else:
        text.append("None: it takes a baseline, another arm, and an environment with a reward threshold.\n")
    if controls:
        what = "On the tasks that both have, in the same way, corrected for six comparisons each; no verdicts."
        text.append(f"### ACPG against the controls\n\n{what}\n")
        text.append(aggregate_table(controls))
    if not scores.empty:
        text.append("### Across environments\n")
        if left_out := sorted(set(scores.arm) - set(everywhere)):
            text.append(f"Arms without runs on every task are left out of the last two plots: {', '.join(left_out)}.\n")
        text.append(
            "![IQM](report/aggregate.png)\n\n![profile](report/profile.png)\n\n![efficiency](report/efficiency.png)\n"
        )
    text.append("## Learning\n\n![learning curves](report/curves.png)\n")
    rows = [
        (
            c.env,
            c.algo,
            c.arm,
            c.seeds,
            f"{number(c.final)} [{number(c.final_low)}, {number(c.final_high)}]",
            number(c.final_median),
        )
        + tuple(map(number, (c.best, c.auc, c.steps_to_threshold, c.reached, c.failure_rate, c.cvar25, c.drawdown)))
        for c in cells.itertuples()
    ]
    header = (
        "environment",
        "algorithm",
        "arm",
        "seeds",
        "final return",
        "median",
        "best",
        "area",
        "steps to threshold",
    )
    text.append(table(rows, (*header, "reached it", "failure rate", "CVaR 25 %", "drawdown")))
    if len(differences):
        text.append("### Differences from the baseline\n")
        rows = [
            (d.env, d.algo, d.arm, d.metric, d.seeds, f"{number(d.difference)} [{number(d.low)}, {number(d.high)}]")
            + (
                f"{number(d.p_improvement)} [{number(d.p_low)}, {number(d.p_high)}]"
                if d.p_improvement == d.p_improvement
                else "-",
            )
            for d in differences.itertuples()
        ]
        header = (
            "environment",
            "algorithm",
            "arm",
            "measure",
            "pairs",
            "difference, 95 %",
            "probability of improvement, 95 %",
        )
        text.append(table(rows, header))
    text.append("## Collapse\n\nGreedy labels. With two actions the ETF error is 0 whatever happens.\n")
    text += [f"![collapse, {algo}](report/collapse_{algo}.png)\n" for algo in runs.algo.unique()]
    rows = [
        (
            c.env,
            c.algo,
            c.arm,
            COLLAPSE[c.metric],
            number(c.untrained),
            f"{number(c.trained)} [{number(c.low)}, {number(c.high)}]",
        )
        + (number(c.null),)
        for c in collapse.itertuples()
    ]
    header = (
        "environment",
        "algorithm",
        "arm",
        "metric (at collapse)",
        "untrained",
        "trained",
        "trained, labels permuted",
    )
    text.append(table(rows, header))
    text.append("## References\n")
    rows = [(env, number(randoms[env]), number(thresholds[env])) for env in envs]
    text.append(table(rows, ("environment", f"random policy, {REFERENCE_EPISODES} episodes", "reward threshold")))
    (folder / "report.md").write_text("\n".join(text))
    for arm, claim, what, tasks, seeds in verdicts:
        print(f"{arm} {claim}: {what} ({tasks} tasks, {seeds} seeds)")
    print(f"{len(runs)} runs, {len(problems)} missing; report in {folder / 'report.md'}")


if __name__ == "__main__":
    main()
