"""What the tuned study says beyond its own report: docs/study.md's comparisons, shifts, and the figure of the README.

    bash benchmark.sh --study benchmark/tuned.toml    # the study itself: 25 to 30 core-hours, to results/tuned
    python studies/tuned.py                           # tables and a figure, beside it

primary.csv: the primary outcomes; tasks.csv: ACPG against its baseline on each task; common.csv: the same, each arm at
one setting for all tasks of a part; comparisons.csv: docs/study.md's questions; shift.csv: how far apart the curves of
score against rate lie; collapse.csv: collapse beside reward; rates.png. Reads the runs of results/tuned, packed or not,
as far as there are any. What was asked after the results had been seen: studies/tuned_checks.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
import report  # noqa: E402
import study  # noqa: E402
from intervals import aggregate, compare_sensitivity, flip_test, holm, paired_tasks  # noqa: E402
from plots import colours_of, plt, save, style  # noqa: E402
from ppo_baseline import run_name  # noqa: E402
from reading import Damaged  # noqa: E402

PPO = ("tasks", "pendulum51")
# What is told apart by which comparison: (question, arm, against, parts)
COMPARISONS = [
    ("all of it", "acpg", "baseline", (*PPO, "minatar")),
    ("all of it, tasks held out from the default's choice", "acpg", "baseline", (*PPO, "minatar")),
    ("all of it, without the games, asked afterwards", "acpg", "baseline", PPO),
    ("fixing", "acpg", "learned", PPO),
    ("fixing, with the scale learned", "scaled", "normalised", PPO),
    ("geometry", "acpg", "random", PPO),
    ("scale", "scaled", "acpg", PPO),
    ("start", "learned", "baseline", PPO),
    ("A2C", "acpg", "baseline", ("a2c",)),
    ("REINFORCE", "acpg", "baseline", ("reinforce",)),
    ("TRPO", "acpg", "baseline", ("trpo",)),
    ("geometry in 64 dimensions, LunarLander", "etf-64", "random-64", ("geometry-lunarlander",)),
    ("geometry in 64 dimensions, LunarLander25", "etf-64", "random-64", ("geometry-lunarlander25",)),
    ("geometry in 64 dimensions, Pendulum51", "etf-64", "random-64", ("geometry-pendulum51",)),
    ("geometry in K - 1 = 3 dimensions, LunarLander", "etf-3", "random-3", ("geometry-lunarlander",)),
    ("geometry in 24 dimensions, LunarLander25", "etf-24", "random-24", ("geometry-lunarlander25",)),
    ("geometry in 50 dimensions, Pendulum51", "etf-50", "random-50", ("geometry-pendulum51",)),
    ("64 dimensions against K - 1, LunarLander", "etf-64", "etf-3", ("geometry-lunarlander",)),
    ("64 dimensions against K - 1, LunarLander25", "etf-64", "etf-24", ("geometry-lunarlander25",)),
    ("64 dimensions against K - 1, Pendulum51", "etf-64", "etf-50", ("geometry-pendulum51",)),
    ("scale .1 against 1", "scale-.1", "default", ("scale",)),
    ("scale .5 against 1", "scale-.5", "default", ("scale",)),
    ("scale 2 against 1", "scale-2", "default", ("scale",)),
    ("scale 10 against 1", "scale-10", "default", ("scale",)),
    ("start of the features, gain .1 against sqrt 2", "default", "gain-1.41", ("scale",)),
]
ONE_SETTING = ("tasks", "minatar")  # the parts of PPO that have one setting for several tasks
MARGIN = 0.05  # differences within it count as none
HIGH = 2  # of the grid's rates are its high ones
CHOICE = ("CartPole-v1", "Acrobot-v1", "LunarLander-v3")  # on which the default was chosen
SHIFTS = np.arange(-20, 21) / 20  # decades


@dataclass
class Args:
    out: Path = ROOT / "results" / "tuned"
    """folder of the study"""


def fail(message):
    sys.exit(f"error: {message}")


# Comparisons


def primary_rows(outcomes, scores, settings):
    """Rows of primary.csv, as the study itself has them; none, and a line that says so, while runs are lacking."""
    needed = {
        (part.name, stage): lacking(part, stage, scores[part.name])
        for outcome, parts in outcomes
        for part in parts
        for stage in ["grid" if outcome.endswith(" grid") else "tuned"]
    }
    if missing := sum(map(len, needed.values())):
        print(f"left out, as {missing} of their runs are lacking: the primary outcomes")
        return []
    chosen = {name: (own, {}) for name, own in settings.items()}
    return study.primary_rows(outcomes, lambda part, stage: scores[part.name][stage], chosen, MARGIN)


def compare(question, arm, against, parts, scores, settings):
    """Rows of comparisons.csv: mean differences over tasks in area and final return, and the decrease of the failure
    rate; none, and a line that says so, if one of the parts has not been run."""
    tables = [scores[part.name] for part in parts if part.name in scores]
    if len(tables) < len(parts):
        print(f"left out, as not all of its parts have been run: {question}, {arm} against {against}")
        return
    table = pd.concat(tables)
    if "held out" in question:
        table = table[~table.env.isin(CHOICE)]
    pairs = paired_tasks(table[table.norm_final.notna()], arm, against)
    if not pairs:
        return
    own = {"question": question, "arm": arm, "against": against, "tasks": len(pairs)}
    own |= {"seeds": min(len(base) for base, _ in pairs.values())}
    envs = [env for env, _ in pairs]
    own["one_edge"] = sum(study.one_edge(part, settings[part.name], arm, against, envs) for part in parts)
    for measure, column, kind in (
        ("auc", "norm_auc", "mean"),
        ("final", "norm_final", "mean"),
        ("fewer failures", "norm_final", "failures"),
    ):
        base, treated = zip(*[[side[column].to_numpy(float) for side in pair] for pair in pairs.values()], strict=True)
        levels = [[(x < 0.5).mean() if kind == "failures" else x.mean() for x in arrays] for arrays in (treated, base)]
        row = own | {"measure": measure, "of_arm": np.mean(levels[0]), "of_against": np.mean(levels[1])}
        yield row | judged(aggregate(kind, base, treated, np.random.default_rng(0), 20_000))


def judged(interval):
    """{difference, low, high, lead} of (difference, low, high): `equivalent` within the margin, ahead or behind if the
    interval excludes 0, else `open`; leads, as their number is not corrected for."""
    row = dict(zip(("difference", "low", "high"), interval, strict=True))
    if max(abs(row["low"]), abs(row["high"])) < MARGIN:
        return row | {"lead": "equivalent"}
    return row | {"lead": "ahead" if row["low"] > 0 else "behind" if row["high"] < 0 else "open"}


def high_rates(parts, scores):
    """A row of comparisons.csv: `scaled` against `acpg` at the grid's highest rates, on the tuning seeds, where both
    run all of them. A seed's mean over the rates is its score."""
    parts = [part for part in parts if part.name in PPO and "tuning" in scores[part.name]]
    pairs = [study.grids_of(scores[part.name]["tuning"], part, ["acpg", "scaled"]) for part in parts]
    if len(parts) < len(PPO) or None in pairs:
        return
    against, arm = ([np.mean(task[-HIGH:], axis=0) for pair in pairs for task in pair[side]] for side in (0, 1))
    row = {"question": f"scale, at the {HIGH} highest rates, tuning seeds", "arm": "scaled", "against": "acpg"}
    row |= {"tasks": len(arm), "seeds": min(map(len, arm)), "one_edge": 0, "measure": "auc"}
    row |= {"of_arm": np.mean([x.mean() for x in arm]), "of_against": np.mean([x.mean() for x in against])}
    yield row | judged(aggregate("mean", against, arm, np.random.default_rng(0), 20_000))


# Single tasks


def task_rows(parts, tuned, settings):
    """Rows of tasks.csv: ACPG minus its baseline in area and final return on each task, at the settings chosen; p of
    the sign-flip test, and Holm's over the tasks and measures of a method."""
    rows = []
    for part in parts:
        if part.name not in tuned or not {"baseline", "acpg"} <= set(part.names):
            continue
        scores, edges = tuned[part.name], study.edges(part)
        for (env, algo), pair in paired_tasks(scores[scores.norm_final.notna()], "acpg", "baseline").items():
            chosen = [settings[part.name][env, algo, arm] for arm in ("baseline", "acpg")]
            own = {"algo": algo, "env": env, "seeds": len(pair[0]), "flag": part.flag}
            own |= dict(zip(("baseline_at", "acpg_at"), chosen, strict=True))
            own |= {f"{arm}_edge": at in edges for arm, at in zip(("baseline", "acpg"), chosen, strict=True)}
            own |= {
                f"{arm}_reached": int(side.reached.sum()) for arm, side in zip(("baseline", "acpg"), pair, strict=True)
            }
            for measure in ("auc", "final"):
                base, treated = (side[f"norm_{measure}"].to_numpy(float) for side in pair)
                difference, low, high = aggregate("mean", [base], [treated], np.random.default_rng(0), 20_000)
                row = own | {"measure": measure, "baseline": base.mean(), "acpg": treated.mean()}
                row |= {"difference": difference, "low": low, "high": high}
                rows.append(row | {"p": flip_test(treated - base, np.random.default_rng(0))})
    for algo in {row["algo"] for row in rows}:
        own = [row for row in rows if row["algo"] == algo]
        for row, adjusted in zip(own, holm([row["p"] for row in own]), strict=True):
            row["p_holm"] = adjusted
    return rows


# Shifts


def shift_of(base, treated, rates):
    """(shift, residual): how many decades of learning rate lie between two curves of score, and what is left.

    `base` and `treated` are mean scores (n,) at `rates` (n,), taken as piecewise linear in log10 rate. The shift s is
    the one in SHIFTS for which treated(x) - base(x + s) varies least at those rates of either curve that fall within
    the other; it is positive if `treated` does at a rate what `base` does at a larger one. The residual is the mean of
    the differences there. Their variance, not their squares: a level that differs would else read as a shift.
    """
    x = np.log10(rates)
    best = (np.inf, 0.0, np.nan)
    for s in sorted(SHIFTS, key=abs):  # the smallest of equals
        own, other = (x + s >= x[0]) & (x + s <= x[-1]), (x - s >= x[0]) & (x - s <= x[-1])
        differences = np.concatenate(
            [treated[own] - np.interp(x[own] + s, x, base), np.interp(x[other] - s, x, treated) - base[other]]
        )
        if len(differences) and (cost := np.var(differences)) < best[0] - 1e-12:
            best = (cost, s, differences.mean())
    return best[1:]


def shift_rows(task, base, treated, rates, rng, resamples=1000):
    """Rows of shift.csv for one task, whose grids are lists of each rate's scores (seeds,); intervals are percentiles
    of the bootstrap, seeds drawn within each rate. A shift whose interval comes to the end of SHIFTS is not
    identified, and neither is what is left after it."""
    mean = lambda grid: np.array([cell.mean() for cell in grid])  # noqa: E731
    draw = lambda grid: mean([rng.choice(cell, len(cell)) for cell in grid])  # noqa: E731
    estimates = shift_of(mean(base), mean(treated), rates)
    draws = np.array([shift_of(draw(base), draw(treated), rates) for _ in range(resamples)])
    ends = np.quantile(draws, (0.025, 0.975), axis=0)
    identified = bool(np.abs([estimates[0], *ends[:, 0]]).max() < SHIFTS.max() - 0.05 - 1e-9)
    for name, estimate, low, high in zip(("shift, decades", "left after it"), estimates, *ends, strict=True):
        yield {"task": task, "measure": name, "estimate": estimate, "low": low, "high": high, "identified": identified}
    for row in compare_sensitivity([base], [treated], rates, rng):
        if row["measure"] in ("best rate of each task", "plateau, decades"):
            values = {"estimate": row["difference"], "low": row["low"], "high": row["high"]}
            yield {"task": task, "measure": row["measure"], **values, "identified": True}


# Reading


def names_of(part, stage):
    """Names of the runs of a stage that the study's file asks for. Unlike the study's own plan it needs none of their
    environments."""
    seeds = {"tuning": part.tuning, "tuned": part.report, "common": part.common, "grid": part.grid}[stage]
    suffixes = [f".{value}" for value in part.values] if stage in ("tuning", "grid") else [""]
    return {
        run_name(env, f"{algo}_{arm}{suffix}", seed)
        for env, algo, arm in study.cells_of(part)
        for suffix in suffixes
        for seed in seeds.get(arm, [])  # a stage may leave arms out
    }


def lacking(part, stage, found):
    """Names of the runs of a stage that the study's file asks for and `found`, {stage: run table}, has not."""
    return names_of(part, stage) - (set(found[stage].name) if stage in found else set())


def read_part(part, out, thresholds):
    """{stage: run table} of a part, as far as it has been run: of those runs that the study's file asks for."""
    found = {}
    for stage in ("tuning", "tuned", "common", "grid"):
        folder, names = out / part.name / stage, names_of(part, stage)
        runs = report.find_runs(folder)[0] if folder.is_dir() else []
        if any(run.name in names for run in runs):
            found[stage] = study.scores_of(folder, thresholds, names, keep=False)
    return found


def read_all(out):
    """(parts, outcomes, {part: {stage: run table}}, {part: {cell: its own setting}}, {part: {cell: the one for all
    tasks}}) of the tuned study in a folder; settings of those parts that have runs of the report."""
    parts, outcomes, thresholds, _ = study.read_study(ROOT / "benchmark" / "tuned.toml")
    try:
        scores = {part.name: read_part(part, out, thresholds) for part in parts}
    except Damaged as error:
        fail(f"{error}; remove or restore it")
    if not any(scores.values()):
        fail(f"--out {out} holds no runs; run bash benchmark.sh --study benchmark/tuned.toml")
    settings, common = {}, {}
    for part in parts:
        if "tuned" in scores[part.name]:
            settings[part.name] = dict.fromkeys(study.cells_of(part), part.values[0] if len(part.values) == 1 else "")
            if "tuning" in scores[part.name]:
                settings[part.name], common[part.name] = study.choose(scores[part.name]["tuning"], part)
    return parts, outcomes, scores, settings, common


def common_of(part, found, own, common):
    """The run table of a part at one setting for all of its tasks: the runs made for it and, where a task's own setting
    is the same, those of the report; None if some are lacking or there is but one task."""
    if len(part.tasks) == 1 or len(part.values) == 1 or "tuned" not in found:
        return None
    at = [key for key in own if own[key] == common[key]]
    shared = [
        (env, algo, arm) in at and seed in part.common[arm]
        for env, algo, arm, seed in found["tuned"][["env", "algo", "arm", "seed"]].itertuples(index=False)
    ]
    table = pd.concat([found["tuned"][shared], *([found["common"]] if "common" in found else [])])
    return table if set(table.name) == names_of(part, "common") else None


COLLAPSED = {"alignment": (1, 0.99), "variability_quotient": (-1, 0.01), "etf_error": (-1, 0.05)}  # (sign, bound)


def collapse_rows(part, out, scores):
    """Rows of collapse.csv. Does more collapse at the end go with more final return? Spearman's rank correlation over
    an arm's runs on a task, and the partial one at equal area, where the metric is defined in at least eight runs.
    `met`: in how many runs it meets the bound of docs/action_collapse.md, and `all three`; of two actions, whose ETF
    error says nothing, the other two."""
    runs, curves, *_ = report.read_runs(out / part.name / "tuned")
    for metric in COLLAPSED:
        runs[metric] = [curve.get(f"collapse/{metric}", np.array([np.nan]))[-1] for curve in curves]
    table = runs.merge(scores[["env", "algo", "arm", "seed", "final", "auc"]], on=["env", "algo", "arm", "seed"])
    met = pd.DataFrame({metric: sign * table[metric] >= sign * bound for metric, (sign, bound) in COLLAPSED.items()})
    met["all three"] = met.alignment & met.variability_quotient & (met.etf_error | table.etf_error.isna())
    for (env, algo, arm), group in table.groupby(["env", "algo", "arm"], sort=False):
        own = {"part": part.name, "env": env, "algo": algo, "arm": arm}
        for metric in COLLAPSED:
            known = group[group[metric].notna()]
            row = own | {"metric": metric, "runs": len(known), "met": int(met.loc[known.index, metric].sum())}
            ranks = np.array([stats.rankdata(known[column]) for column in (metric, "final", "auc")])
            if len(known) >= 8 and np.ptp(ranks, axis=1).all():  # else all runs are alike in one of them
                r = np.corrcoef(ranks)
                rest = np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
                row |= {"correlation": r[0, 1]}
                if rest > 1e-6:  # else the one's ranks are those of the area
                    row["at_equal_area"] = (r[0, 1] - r[0, 2] * r[1, 2]) / rest
            yield row
        yield own | {"metric": "all three", "runs": len(group), "met": int(met.loc[group.index, "all three"].sum())}


# Figures


def all_cells(found, part):
    """{environment: {arm: scores at each rate}} over the seeds of tuning and grid."""
    scores = pd.concat([found[stage] for stage in ("tuning", "grid") if stage in found])
    grids = {arm: study.grids_of(scores, part, [arm]) for arm in part.names}
    return {
        env: {arm: grid[0][k] for arm, grid in grids.items() if grid is not None} for k, env in enumerate(part.tasks)
    }


def plot_rates(grids, rates, path):
    """Score against learning rate: a panel a task, a colour an arm; of ACPG and baseline with 95 % t intervals."""
    style()
    tasks = list(grids)
    colours = colours_of(list(dict.fromkeys(arm for cells in grids.values() for arm in cells)))
    figure, axes = plt.subplots(2, 3, figsize=(11.4, 6), layout="constrained", sharey=True)
    for axis, task in zip(axes.flat, tasks, strict=False):
        for arm, cells in grids[task].items():
            means = np.array([cell.mean() for cell in cells])
            main = arm in ("baseline", "acpg")
            axis.plot(rates, means, "o-" if main else "--", color=colours[arm], label=arm, markersize=4)
            if not main:
                continue
            half = [stats.t.ppf(0.975, len(c) - 1) * stats.sem(c) if len(c) > 1 else 0.0 for c in cells]
            low, high = np.clip([means - half, means + half], 0, 1)  # as areas are
            axis.fill_between(rates, low, high, color=colours[arm], alpha=0.2, linewidth=0)
        axis.set(xscale="log", title=task.rpartition(":")[2], xlabel="learning rate")
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    figure.supylabel("normalised area under the curve")
    save(figure, path)


def save_rows(path, rows):
    if rows:
        pd.DataFrame(rows).to_csv(path, index=False, float_format="%.6g")


def main():
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    parts, outcomes, scores, settings, common = read_all(args.out)
    tuned = {name: found["tuned"] for name, found in scores.items() if "tuned" in found}
    commons = {
        part.name: table
        for part in parts
        if part.name in common
        and (table := common_of(part, scores[part.name], settings[part.name], common[part.name])) is not None
    }
    save_rows(args.out / "primary.csv", primary_rows(outcomes, scores, settings))
    save_rows(args.out / "tasks.csv", task_rows(parts, tuned, settings))
    save_rows(args.out / "common.csv", task_rows(parts, commons, common))
    named = {part.name: part for part in parts}
    rows = [
        row
        for *question, names in COMPARISONS
        for row in compare(*question, [named[name] for name in names], tuned, settings)
    ]
    several = [named[name] for name in ONE_SETTING]
    rows += compare("all of it, one setting for all tasks", "acpg", "baseline", several, commons, common)
    save_rows(args.out / "comparisons.csv", [*rows, *high_rates(parts, scores)])
    collapse = [collapse_rows(part, args.out, tuned[part.name]) for part in parts if part.name in tuned]
    save_rows(args.out / "collapse.csv", [row for rows in collapse for row in rows])
    grids, rows, rng = {}, [], np.random.default_rng(0)
    for part in parts:
        found = scores[part.name]
        if part.name not in PPO or not {"tuning", "grid"} & found.keys():
            continue
        rates = np.array([float(value) for value in part.values])
        grids |= all_cells(found, part)
        if "grid" not in found:
            continue
        if missing := lacking(part, "grid", found):  # fewer seeds than planned are those that happened to be first
            print(f"{args.out / part.name / 'grid'} lacks {len(missing)} of its runs: no shifts")
            continue
        both = study.grids_of(found["grid"], part, ["baseline", "acpg"])
        for k, env in enumerate(part.tasks):
            rows += shift_rows(env, both[0][k], both[1][k], rates, rng)
    save_rows(args.out / "shift.csv", rows)
    if any(grids.values()):
        plot_rates({env: cells for env, cells in grids.items() if cells}, rates, args.out / "rates.png")
    print(f"tables of {', '.join(tuned) or 'no report seeds yet'} in {args.out}")


if __name__ == "__main__":
    main()
