"""The pictures of a report. Each function writes one file, some with the numbers behind it."""

import math

import matplotlib
import numpy as np
import pandas as pd
from PIL import Image

from intervals import interval_of, iqm, matrix, mean_band, where_all_arms_ran
from reading import CLASSES, POINTS, on_grid

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLLAPSE = {
    "alignment": "AC1 alignment (1)",
    "variability_quotient": "AC2 variability quotient (0)",
    "nc1": "AC2 NC1 (0)",
    "etf_error": "AC3 ETF error of the means (0)",
    "mean_weight_cosine": "AC3 cosine of means and weights (1)",
}
PANELS = ("alignment", "variability_quotient", "etf_error")
# Okabe and Ito's colours, told apart by colour-blind readers too: one for each arm in all pictures of the repository
COLOURS = {"baseline": "#0072B2", "acpg": "#D55E00", "learned": "#009E73", "random": "#CC79A7", "scaled": "#E69F00"}
COLOURS["normalised"] = "#56B4E9"


def colours_of(arms):
    """A colour for each arm: its own where it has one, for others, by name, those that are left, from black on."""
    free = ("#000000", "#999999", "#8B5A2B", "#332288", "#882255", "#F0E442", "#117733")
    others = sorted(arm for arm in arms if arm not in COLOURS)
    colours = COLOURS | {arm: free[i % len(free)] for i, arm in enumerate(others)}
    return {arm: colours[arm] for arm in arms}


def short(env):
    """The environment's id without its module."""
    return env.rpartition(":")[2]


def style():
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False})


def band(axes, x, curves, colour, label, **options):
    """Mean of `curves` (n, points) with its pointwise 95 % t interval, where there are any."""
    mean, low, high = mean_band(curves)
    if np.isfinite(mean).any():
        axes.plot(x, mean, color=colour, label=label, **options)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def save(figure, path):
    """Write the figure as PNG, with one legend of everything that carries a label in any of its axes. In 256 colours,
    as figures are committed by the dozen: nobody sees a difference, and it takes a third of the bytes."""
    labelled = {}
    for axes in figure.axes:
        labelled |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    columns = int(figure.get_figwidth() // (0.9 + 0.1 * max(map(len, labelled), default=0)))
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=max(1, columns))
    figure.savefig(path)
    plt.close(figure)
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


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
            axes.set_title(f"{short(env)}, {algo}")
            axes.set_ylabel("episodic return" if j == 0 else "")
            axes.set_xlabel("thousand environment steps" if i == len(algos) - 1 else "")
    save(figure, path)


def logged(curves, index, tag, at):
    """The value in each run's first measurement (at = 0) or its last (-1); runs that have none there are left out."""
    values = []
    for k in index:
        measured = np.flatnonzero(np.isfinite(curves[k].get(CLASSES, curves[k].get(tag, np.empty(0)))))
        value = curves[k][tag][measured[at]] if tag in curves[k] and len(measured) else math.nan
        values += [float(value)] if math.isfinite(value) else []
    return values


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
        grid[i][0].set_ylabel(f"{short(env)}\nepisodic return")
        shown = cell.index[(cell.env == env) & cell.arm.isin(arms)]
        classes = logged(curves, shown, CLASSES, -1)
        for axes, metric in zip(grid[i][1:], PANELS, strict=True):
            axes.set_ylabel(COLLAPSE[metric])
            if metric == "etf_error":
                axes.set_ylim(-0.05, max(1.05, axes.get_ylim()[1]))
                if classes and max(classes) == 2:
                    axes.text(0.5, 0.5, "void: two actions", ha="center", transform=axes.transAxes)
        for axes in grid[i]:
            axes.set_xlim(grid[i][0].get_xlim())
            axes.set_xlabel("thousand environment steps" if i == len(envs) - 1 else "")
    save(figure, path)


def plot_verdicts(rows, margin, colours, path):
    """The comparisons that the verdicts draw on, with their corrected intervals; right of none the arm is better."""
    size = (9, 1.6 + 0.3 * len(rows))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for y, row in enumerate(rows):  # the probability of improvement as its distance from one half
        none = 0.5 if "probability" in row["measure"] else 0.0
        low, middle, high = (row[key] - none for key in ("low", "estimate", "high"))
        label = f"{row['arm']} ({row['tasks']} tasks)"
        axes.plot([low, high], [y, y], color=colours[row["arm"]], linewidth=5, alpha=0.45, solid_capstyle="butt")
        axes.plot(middle, y, "o", color=colours[row["arm"]], label=label)
    axes.axvline(0, color="black", linewidth=1)
    axes.axvspan(-margin, margin, color="grey", alpha=0.15, linewidth=0)
    names = [f"{row['arm']}, {row['claim']}: {row['measure']}" for row in rows]
    axes.set_yticks(range(len(rows)), [name.replace("of improvement", "of improvement - .5") for name in names])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    level = f"{100 * rows[0]['level']:.4g} % interval"
    axes.set_xlabel(
        f"\N{LEFTWARDS ARROW} baseline better    arm better \N{RIGHTWARDS ARROW}\n{level}s; grey counts as none"
    )
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
            cell = where_all_arms_ran(scores[scores.algo == algo])
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
