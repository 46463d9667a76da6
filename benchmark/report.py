"""Statistics and plots of a sweep: what the runs below a folder show, and how sure that is.

    python benchmark/report.py results/sweep

Reads the runs that `benchmark.sh` or the scripts left below the folder (run.json and progress.csv, or packed.csv.gz)
and writes beside them report.md, CSV files with every number, and PNG plots. The arm called `baseline` is what every
other arm is compared with. docs/benchmark.md explains each number.
"""

import importlib
import json
import math
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import gymnasium as gym
import numpy as np
import pandas as pd
import tyro
from scipy import stats

from intervals import (
    CLAIMS,
    EXPLORATORY,
    FAMILY,
    LAST,
    VERDICT_SEEDS,
    aggregate,
    compare_aggregates,
    cvar,
    failure_interval,
    flip_test,
    holm,
    matrix,
    mean_band,
    mean_interval,
    not_ahead,
    paired_tasks,
    summarise,
    superiority,
    survival,
    verdict,
    where_all_arms_ran,
)
from plots import (
    COLLAPSE,
    PANELS,
    colours_of,
    logged,
    plot_aggregate,
    plot_collapse,
    plot_curves,
    plot_profile,
    plot_verdicts,
    style,
)
from reading import (
    CLASSES,
    PACKED,
    POINTS,
    RETURN,
    Damaged,
    defined,
    has_diverged,
    on_grid,
    read_manifest,
    read_packed,
    read_record,
    read_references,
    read_result,
    same_run,
)

REFERENCE_EPISODES = 100, 10_000  # of the random policy: at least, and at most until its mean is known well enough:
REFERENCE_ERROR = 0.01  # standard error, as a share of the distance to the threshold
REFERENCE_STEPS = 1_000_000  # a random policy whose first episodes take longer than these in all has no reference
SETUP = {"run_dir", "resume", "seed", "exp_name", "torch_threads", "capture_video"}
SETUP |= {"track", "wandb_project_name", "wandb_entity"}
SHARED = ("total_timesteps", "env_kwargs", "max_episode_steps")  # alike in all arms, but the first, in all algorithms
TESTED = ("final", "auc")  # by Holm over tasks
METRICS = {"final": 1, "best": 1, "auc": 1, "steps_to_threshold": -1, "drawdown": -1, "failed": -1}  # 1: more is better
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    folder: Annotated[Path, tyro.conf.Positional]
    """folder with runs anywhere below it; the report is written there"""
    resamples: int = 20_000
    """bootstrap resamples"""
    margin: float = 0.05
    """normalised differences within it count as none"""
    threshold: list[str] = field(default_factory=list)
    """what counts as solved, as ENV=VALUE; for environments that have no threshold of their own, or another one"""
    seed: int = 0
    """seed of the bootstrap and of the random policy"""
    import_modules: bool = False
    """import the modules that the runs' environments name, to find thresholds and what a random policy gets"""


def fail(message):
    sys.exit(f"error: {message}")


# Reading


def find_runs(folder):
    """(finished runs, problems): all below the folder, and of the others by name what they lack.

    Ends in one line where a run that counts as finished is damaged: left out, it would bias what is said.
    """
    found, problems, damage = {}, {}, []
    for path in sorted(folder.rglob("run.json")):
        run = path.parent
        try:
            record = read_record(run)
        except Damaged as error:
            problems[run.name] = str(error)
            continue
        if record["status"] != "finished" and not has_diverged(record):
            problems[run.name] = record["status"]
            continue
        try:
            found[run] = read_result(run)
        except Damaged as error:
            damage.append(str(error))
    if damage:
        more = f" (and {len(damage) - 1} more)" if damage[1:] else ""
        fail(f"{damage[0]}{more}; run the sweep again, which makes it anew, or remove its folder")
    by_name = {run.name: run for run in found.values()}
    for path in sorted(folder.rglob(PACKED)):
        for name, run in read_packed(path).items():
            twin = by_name.get(name)
            if twin is None or not same_run(twin.record, run.record["args"], run.record["script_sha256"]):
                found[path, name] = run
                problems.pop(name, None)
    return list(found.values()), problems


def read_runs(folder):
    """(runs, curves, problems, settings): a table with one row per finished run, its curves by index, what is missing
    (a dict from the run's name to why), and each arm's arguments.

    Ends in one line if there is nothing to read or if runs that are to be compared were made with different settings.
    """
    rows, curves, settings, finished = [], [], {}, set()
    found, problems = find_runs(folder)
    ended = {
        (run.record["args"]["env_id"], run.record["args"]["exp_name"].partition("_")[0])
        for run in found
        if np.isfinite(run.curves[RETURN]).any()
    }
    for run in found:
        args = run.record["args"]
        algo, _, arm = args["exp_name"].partition("_")
        env_id, seed = args["env_id"], args["seed"]
        endless = not run.diverged and not np.isfinite(run.curves[RETURN]).any()
        if endless and (env_id, algo) not in ended:  # nothing is known of any run there
            problems[run.name] = "no episode ended, in any run of the task"
            continue
        key = (env_id, algo, arm)
        own = {k: v for k, v in args.items() if k not in SETUP} | {"script_sha256": run.record["script_sha256"]}
        refuse_mixture(folder, key, own, key, settings.setdefault(key, own), own.keys() | settings[key].keys())
        for other, theirs in settings.items():
            if other[0] == env_id:
                refuse_mixture(folder, other, theirs, key, own, SHARED[other[1] != algo :])
        if (*key, seed) in finished:
            fail(f"{folder} holds {env_id} {algo} {arm} seed {seed} twice; remove one")
        finished.add((*key, seed))
        row = {"name": run.name, "env": env_id, "algo": algo, "arm": arm, "seed": seed}
        row |= {"budget": args["total_timesteps"]}
        rows.append(row | {"wall_time": run.record["wall_time"], "diverged": run.diverged, "endless": endless})
        curves.append(defined(run.curves))
    names = {run.name for run in found}
    known = read_manifest(folder).get("runs", {})
    for name, planned in known.items():
        if name not in names:
            problems.setdefault(name, "no result" if planned["status"] == "finished" else planned["status"])
    if not rows:
        unfinished = f" ({len(problems)} unfinished)" if problems else ""
        fail(f"{folder} holds no finished runs{unfinished}; run benchmark.sh")
    runs = pd.DataFrame(rows)
    planned = names <= set(known)  # then a seed that an arm was never to have is not missing
    for (env_id, algo), cell in runs.groupby(["env", "algo"]):
        for arm in () if planned else cell.arm.unique():
            for seed in sorted(set(cell.seed) - set(cell.seed[cell.arm == arm])):
                problems.setdefault(f"{env_id}__{algo}_{arm}__{seed}", "no run")
    return runs, curves, problems, settings


def refuse_mixture(folder, one, settings, other, others, keys):
    if different := sorted(k for k in keys if settings.get(k) != others.get(k)):
        shown = ", ".join(f"{k} {settings.get(k)!r} and {others.get(k)!r}" for k in different[:3])
        names = " and ".join(dict.fromkeys(" ".join(key) for key in (one, other)))
        fail(f"{folder} mixes runs of {names} made with different settings ({shown}); keep one kind")


def references(settings, args, cache):
    """({environment: threshold or None}, {environment: the random policy's return or None}, {environment: its entry in
    `cache`}), from `cache` where it has them, to which new ones are added. Ends in one line where that takes a module
    that may not be imported."""
    thresholds, randoms, entries = {}, {}, {}
    given = read_thresholds(args.threshold, {env_id for env_id, _, _ in settings})
    for (env_id, _, _), own in settings.items():
        if env_id in thresholds:
            continue
        key = " ".join(str(own[k]) for k in ("env_id", "env_kwargs", "max_episode_steps"))
        module, _, name = env_id.rpartition(":")
        entry = cache.get(key, {})
        other = env_id in given and entry.get("threshold") != given[env_id]
        if entry.get("seed") != args.seed or "threshold" not in entry or other:
            if module and not args.import_modules:
                fail(f"{env_id}: no reference in references.json; --import-modules imports {module} to measure it")
            try:
                if module:
                    importlib.import_module(module)
                threshold = given.get(env_id, gym.spec(name).reward_threshold)
                if entry.get("seed") != args.seed or other:
                    entry = NOT_MEASURED if threshold is None else random_return(own, args.seed, threshold)
                cache[key] = entry | {"seed": args.seed, "threshold": threshold}
            except Exception as error:  # importing and playing somebody's environment can fail in any way
                why = " ".join(str(error).split())
                fail(f"the runs' environment {env_id} cannot be used ({why}); put its module on PYTHONPATH")
        thresholds[env_id], randoms[env_id], entries[env_id] = cache[key]["threshold"], cache[key]["mean"], cache[key]
    return thresholds, randoms, entries


NOT_MEASURED = {"mean": None, "standard_error": None, "episodes": 0}


def read_thresholds(words, known):
    """{environment: threshold} of --threshold; ends in one line where a word is none, or of no environment here."""
    result = {}
    for word in words:
        env_id, _, value = word.rpartition("=")
        try:
            result[env_id] = float(value)
        except ValueError:
            fail(f"--threshold {word}: give ENV=VALUE, such as LunarLander-v3=200")
        if env_id not in known or not abs(result[env_id]) < 1e300:
            fail(f"--threshold {word}: a finite, not huge number for one of {', '.join(sorted(known))}")
    return result


def random_return(args, seed, threshold):
    """Mean return of the uniform random policy with its standard error, over REFERENCE_EPISODES seeded episodes, more
    until the error is below REFERENCE_ERROR, eight times as many if all returns are alike; None if the first ones take
    more than REFERENCE_STEPS steps."""
    env = gym.make(args["env_id"], max_episode_steps=args["max_episode_steps"], **json.loads(args["env_kwargs"]))
    env.action_space.seed(seed)
    totals, steps, (least, most) = [], 0, REFERENCE_EPISODES
    look = least
    while len(totals) < most and steps < REFERENCE_STEPS:
        env.reset(seed=seed if not totals else None)
        total, over = 0.0, False
        while not over and steps < REFERENCE_STEPS:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, over, steps = total + float(reward), terminated or truncated, steps + 1
        if over:
            totals.append(total)
        if len(totals) == look:  # rarely: looked at after each one, it would stop where rare returns have not come yet
            known = stats.sem(totals) <= REFERENCE_ERROR * abs(threshold - np.mean(totals))
            if known and (np.ptp(totals) or look >= 8 * least):
                break
            look *= 2
    env.close()
    if len(totals) < least:
        return NOT_MEASURED
    return {"mean": float(np.mean(totals)), "standard_error": float(stats.sem(totals)), "episodes": len(totals)}


# What the runs say


def score(runs, returns, thresholds, randoms):
    """(runs, returns, the same normalised): the run table with the measures of each run's curve, as they are and
    normalised, and the curves (runs, POINTS).

    A run that failed, as its loss was not finite or none of its episodes ended, has the random policy's return
    throughout, normalised 0; others have it before their first episode. One without an episode in the last tenth is
    `stale`: no measure of it is known but the steps to the threshold, if it came there.
    """
    random, failed = runs.env.map(randoms).astype(float), runs.diverged | runs.endless
    runs["stale"] = np.isnan(returns[:, -LAST:]).all(1) & ~failed
    returns = np.stack([filled(curve, start) for curve, start in zip(returns, random, strict=True)])
    summary = [summarise(r, b, thresholds[e]) for r, b, e in zip(returns, runs.budget, runs.env, strict=True)]
    runs = pd.concat([runs, pd.DataFrame(summary)], axis=1)
    span = runs.env.map(lambda env: thresholds[env] - randoms[env] if usable(env, thresholds, randoms) else math.nan)
    for column in ("final", "best", "auc"):  # the method failed there: no more than random
        runs.loc[failed, column] = random[failed]
    runs.loc[runs.stale, ["final", "best", "auc", "drawdown"]] = math.nan
    returns = np.where(failed.to_numpy()[:, None], random.to_numpy()[:, None], returns)
    runs["random"], normalised = random, (returns - random.to_numpy()[:, None]) / span.to_numpy()[:, None]
    runs["norm_final"], runs["norm_auc"] = (runs.final - random) / span, (runs.auc - random) / span
    runs["norm_steps"] = runs.steps_to_threshold / runs.budget
    runs["failed"] = np.where(runs.norm_final.notna(), runs.norm_final < 0.5, math.nan)
    return runs, returns, normalised


def filled(curve, start):
    """A return's curve with `start`, or if that is unknown its first value, before that, and its last after that."""
    known = np.flatnonzero(np.isfinite(curve))
    if not len(known):
        return curve
    curve = curve.copy()
    curve[: known[0]] = start if math.isfinite(start) else curve[known[0]]
    curve[known[-1] :] = curve[known[-1]]
    return curve


def usable(env, thresholds, randoms):
    """Whether scores can be normalised: the random policy is known and stays below the threshold."""
    return None not in (thresholds[env], randoms[env]) and thresholds[env] > randoms[env]


def compare_cells(runs, arms, rng, resamples):
    """(cells, differences): each arm's measures on each task, and their seed-paired differences from the baseline."""
    cells, differences = [], []
    for (env, algo), group in runs.groupby(["env", "algo"], sort=False):
        base = group[group.arm == "baseline"].set_index("seed")
        for arm in (arm for arm in arms if arm in set(group.arm)):
            rows = group[group.arm == arm]
            low, high = mean_interval(rows.final, rng, resamples=resamples)
            means = {m: rows[m].mean(skipna=False) for m in METRICS}  # of all runs or of none
            cell = {"env": env, "algo": algo, "arm": arm, "seeds": len(rows), "final": means["final"]}
            cell |= {"final_low": low, "final_high": high} | means
            cell |= {"final_median": rows.final.median(skipna=False), "final_sd": rows.final.std(ddof=1, skipna=False)}
            known = rows.final.notna().all()
            cell |= {"cvar25": cvar(rows.final.to_numpy()) if known else math.nan, "reached": rows.reached.mean()}
            cells.append(cell | {"failure_rate": rows.failed.mean(skipna=False)})
            if arm != "baseline" and not base.empty:
                own = {"env": env, "algo": algo, "arm": arm}
                differences += [own | d for d in compare_pairs(base, rows.set_index("seed"), rng, resamples)]
    columns = ["env", "algo", "arm", "metric"]  # a file without rows has a header at least
    return pd.DataFrame(cells), pd.DataFrame(differences, columns=None if differences else columns)


def compare_pairs(base, treated, rng, resamples):
    """The differences treated - base of two tables of runs by seed, in each measure that all common seeds have."""
    common = sorted(set(base.index) & set(treated.index))
    base, treated = not_ahead(base.loc[common], treated.loc[common], ["final", "best", "auc"])
    for metric, sign in METRICS.items():
        b, t = (table.loc[common, metric].to_numpy(float) for table in (base, treated))
        d = t - b
        if not len(d) or not np.isfinite(d).all():
            continue
        if metric == "failed":
            low, high = failure_interval(d)
        elif metric == "steps_to_threshold" and not (treated.reached[common].any() or base.reached[common].any()):
            low, high = math.nan, math.nan  # all are censored: that they are equal says nothing
        else:
            low, high = mean_interval(d, rng, resamples=resamples)
        p = superiority(sign * b, sign * t) if np.isfinite(low) or len(d) < 2 else (math.nan,) * 3
        row = {"metric": metric, "seeds": len(d), "difference": d.mean(), "low": low, "high": high}
        row |= dict(zip(("p_improvement", "p_low", "p_high"), p, strict=True))
        yield row | ({"p_value": flip_test(d, rng)} if metric in TESTED else {})
    if len(common) > 1:
        pair = [[x.loc[common, "final"].to_numpy(float)] for x in (base, treated)]
        if not np.isfinite(pair).all():
            return
        d, low, high = aggregate("cvar", *pair, rng, resamples)
        yield {"metric": "cvar25", "seeds": len(common), "difference": d, "low": low, "high": high}


def correct(differences):
    """Add Holm's adjusted p values: the family is an arm's tests, those of TESTED in each of its tasks."""
    differences["p_holm"] = math.nan
    if "p_value" in differences:
        for _, group in differences[differences.p_value.notna()].groupby("arm"):
            differences.loc[group.index, "p_holm"] = holm(group.p_value)


def compact_curves(runs, curves, returns):
    """Of each arm on each task the mean curves over seeds, with the pointwise intervals of the plots."""
    tags, frames = [RETURN, *(f"{prefix}/{m}" for m in PANELS for prefix in ("collapse", "collapse_null"))], []
    for (env, algo, arm), group in runs.groupby(["env", "algo", "arm"], sort=False):
        budget = group.budget.iloc[0]
        for tag in tags:
            read = [returns[k] if tag == RETURN else on_grid(curves[k], tag, budget) for k in group.index]
            mean, low, high = mean_band(np.stack(read))
            frame = {"env": env, "algo": algo, "arm": arm, "tag": tag}
            frame |= {"step": np.linspace(1 / POINTS, 1, POINTS) * budget, "mean": mean, "low": low, "high": high}
            frames.append(pd.DataFrame(frame))
    return pd.concat(frames)


def compare_collapse(runs, curves, rng, resamples):
    """Of each arm on each task the collapse metrics: untrained, trained with its interval, trained with null labels.

    Trained is the last measurement; runs in which a metric is undefined there, as all are with one greedy action and
    `etf_error` with two, and those that diverged are left out and counted: `defined` of `seeds`, and likewise
    `untrained_defined` and `null_defined`. `void`: all that are left out have two actions.
    """
    rows = []
    for (env, algo, arm), group in runs.groupby(["env", "algo", "arm"], sort=False):
        two = [classes == 2 for classes in logged(curves, group.index, CLASSES, -1)]
        for metric in COLLAPSE:
            row = {"env": env, "algo": algo, "arm": arm, "metric": metric, "seeds": len(group)}
            for name, prefix, at in (
                ("untrained", "collapse", 0),
                ("trained", "collapse", -1),
                ("null", "collapse_null", -1),
            ):
                values = logged(curves, group.index, f"{prefix}/{metric}", at)
                row[name] = np.mean(values) if values else math.nan
                row["defined" if name == "trained" else f"{name}_defined"] = len(values)
                if name == "trained":
                    row["low"], row["high"] = mean_interval(values, rng, resamples=resamples)
            row["void"] = metric == "etf_error" and not row["defined"] and len(two) == len(group) and all(two)
            rows.append(row)
    return pd.DataFrame(rows)


def judge(scores, arms, lost, rng, args):
    """(family, verdicts, exploratory, left_out): each arm against the baseline, what that says, everything beside it,
    and by arm the tasks with too few pairs. `lost` has the seeds of missing runs, as of `lost_seeds`."""
    others = arms[1:] if arms[0] == "baseline" else []
    scored = scores[scores.norm_final.notna()]
    compared = [
        arm for arm in others if any(len(base) > 1 for base, _ in paired_tasks(scored, arm, "baseline").values())
    ]
    level = 1 - 0.05 / (len(FAMILY) * max(1, len(compared)))
    family, verdicts, exploratory = [], [], []
    left_out = {}
    stale = scores[scores.stale]
    for arm in others:
        rows = compare_aggregates(scored, arm, rng, args.resamples, level=level)
        exploratory += compare_aggregates(scored, arm, rng, args.resamples, family=EXPLORATORY)
        family += rows
        pairs, had, planned = paired_tasks(scored, arm, "baseline"), pairs_of(scores, arm), pairs_of(scores, arm, lost)
        unknown = stale.arm.isin(["baseline", arm]).sum()
        if aside := [" ".join(key) for key in planned if key not in pairs and planned[key]]:
            left_out[arm] = aside
        few = [key for key in planned if len(had.get(key, ())) < VERDICT_SEEDS <= len(planned[key])]
        final = next((row for row in rows if row["measure"].startswith("final return, mean")), None)
        learns = any((treated.norm_final >= 0.5).any() for _, treated in pairs.values())
        fewest = min((len(base) for base, _ in pairs.values()), default=0)
        for claim in CLAIMS:
            if few:  # on a task that the arm may lose
                what = f"none: missing runs leave fewer than {VERDICT_SEEDS} pairs on {len(few)} tasks"
            elif unknown:  # it may be the arm's failures that are
                what = f"none: no episode ended in the last tenth of {unknown} runs"
            elif not pairs:
                what = "none: no scored task in common"
            elif fewest < VERDICT_SEEDS:
                what = f"none: fewer than {VERDICT_SEEDS} seeds"
            else:
                what = verdict(claim, [row for row in rows if row["claim"] == claim], final, args.margin, learns)
            verdicts.append((arm, claim, what, len(pairs), seeds_of(final) if final else str(fewest)))
    for control in arms if "acpg" in arms else []:
        if control not in ("baseline", "acpg"):
            exploratory += compare_aggregates(scored, "acpg", rng, args.resamples, against=control)
    return family, verdicts, exploratory, left_out


def lost_seeds(runs, problems):
    """{(env, algo, arm): seeds} of the runs that are missing, as their names say; none of environments without scores.
    An environment of which no run is there goes by what its runs' names have for it."""
    lost, envs, unscored = {}, {}, set(runs.env) - set(runs.env[runs.norm_final.notna()])
    for row in runs.itertuples():
        envs[row.name.removesuffix(f"__{quoted(f'{row.algo}_{row.arm}')}__{row.seed}")] = row.env
    arms = {quoted(f"{algo}_{arm}"): (algo, arm) for algo in runs.algo.unique() for arm in runs.arm.unique()}
    for name in problems:
        start, _, seed = name.rpartition("__")
        known = [word for word in arms if start.endswith(f"__{word}")]
        env, word = (start.removesuffix(f"__{known[0]}"), known[0]) if known else start.rpartition("__")[::2]
        algo, arm = arms.get(word, (*word.split("_", 1), "")[:2])
        if seed.isdecimal() and (env := envs.get(env, env)) not in unscored:
            lost.setdefault((env, algo, arm), set()).add(int(seed))
    return lost


def quoted(text):
    """As the scripts write what they name a run after."""
    return quote(text, safe="=").replace("%", "=")


def pairs_of(scores, arm, lost=None):
    """{(env, algo): the seeds that the baseline and an arm both have}, and if `lost` is given would have with the runs
    that are missing, of all tasks that either has."""
    own = scores[scores.arm.isin(["baseline", arm])]
    had = {key: set(group.seed) for key, group in own.groupby(["env", "algo", "arm"])}
    seeds = lambda key, name: had.get((*key, name), set()) | (lost or {}).get((*key, name), set())  # noqa: E731
    tasks = {key[:2]: None for key in (*had, *(lost or {})) if key[2] in ("baseline", arm)}
    return {key: seeds(key, "baseline") & seeds(key, arm) for key in sorted(tasks)}


def seeds_of(row):
    fewest, most = row["fewest_seeds"], row["most_seeds"]
    return str(most) if fewest == most else f"{fewest} to {most}"


def smallest_p(pairs):
    """The least p that `flip_test` can give for so many pairs, which have at least one."""
    return max(2 * 0.5**pairs, 1 / 20001)


def interquartile(scores):
    """The IQM's trimming: the share of each task's runs that it averages, of each algorithm's arms in the figure, and
    of both arms of a difference over all tasks."""
    text = lambda tasks, array: ", ".join(  # noqa: E731
        f"{task} {share:.0%}" for task, share in zip(tasks, survival(array), strict=True)
    )
    for algo, cell in scores.groupby("algo"):
        for arm, group in where_all_arms_ran(cell).groupby("arm"):
            for column in ("auc", "final"):
                yield algo, arm, column, text(sorted(group.env.unique()), matrix(group, f"norm_{column}"))
    for arm in (arm for arm in scores.arm.unique() if arm != "baseline"):
        pairs = paired_tasks(scores, arm, "baseline")
        for column in ("auc", "final") if pairs else ():
            for name, tables in zip(("baseline", arm), zip(*pairs.values(), strict=True), strict=True):
                least = min(map(len, tables))
                array = np.stack([table[f"norm_{column}"].to_numpy()[:least] for table in tables], axis=-1)
                yield "all", f"{name}, of {arm} and baseline", column, text(map(" ".join, pairs), array)


# Text


def number(x, digits=3):
    if x is None or (isinstance(x, float) and math.isnan(x)):
        return "-"
    text = f"{x:.{digits}g}"
    return text if abs(float(text)) < 1000 or not math.isfinite(x) else f"{x:,.0f}"


def between(x, low, high):
    return f"{number(x)} [{number(low)}, {number(high)}]"


def table(rows, header):
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows]) + "\n"


def aggregate_table(rows):
    header = ("arm", "against", "claim", "measure, in favour of the arm", "tasks", "seeds", "estimate", "level")
    cells = [[row[key] for key in ("arm", "against", "claim", "measure", "tasks")] for row in rows]
    ends = [(seeds_of(r), between(r["estimate"], r["low"], r["high"]), f"{100 * r['level']:.4g} %") for r in rows]
    return table([(*c, *e) for c, e in zip(cells, ends, strict=True)], header)


def missing_section(problems):
    if not problems:
        return []
    what = "Their pairs are left out of every comparison, and they do not count as failures to learn"
    lines = [f"- {run.replace('__', ' ')}: {why}" for run, why in sorted(problems.items())]
    return [f"**Missing: {len(problems)} runs.** {what}.\n", "\n".join(lines) + "\n"]


def failed_section(runs):
    """What is said of runs that diverged, never ended an episode, or ended none in the last tenth."""
    text, score = [], "which score 0, as the method failed, or what the run they are paired with does if that is less"
    for column, what, then in (
        ("diverged", "Ended with a non-finite loss", score),
        ("endless", "Not one episode ended", score),
        (
            "stale",
            "No episode ended in the last tenth",
            "whose scores are not known; --max-episode-steps ends episodes",
        ),
    ):
        if not (found := runs[runs[column]]).empty:
            names = ", ".join(f"{r.env} {r.algo} {r.arm} {r.seed}" for r in found.itertuples())
            text.append(f"**{what}: {len(found)} runs**, {then}: {names}.\n")
    if unknown := sorted(set(runs.env[(runs.diverged | runs.endless) & runs.final.isna()])):
        text.append(
            f"What the random policy returns is not known, so that they have no return: {', '.join(unknown)}.\n"
        )
    return text


def notes_section(cells, thresholds, randoms):
    """What limits the comparisons: unequal or single seeds, tasks without scores, tasks that nobody learns."""
    text, counts = [], cells.seeds.unique()
    if len(counts) > 1:
        range_ = f"{min(counts)} to {max(counts)}"
        text.append(f"The cells have unequal numbers of seeds ({range_}); pairs use the common ones.\n")
    if min(counts) < 2:
        text.append("A cell with a single seed has no interval.\n")
    if without := [env for env in thresholds if thresholds[env] is None]:
        text.append(f"No reward threshold, hence in no aggregate and without steps to it: {', '.join(without)}.\n")
    reached = [e for e in thresholds if thresholds[e] is not None and not usable(e, thresholds, randoms)]
    if reached:
        why = f"the random policy reaches the threshold, or does not end its episodes in {REFERENCE_STEPS:,} steps"
        text.append(f"In no aggregate, since {why}: {', '.join(reached)}.\n")
    base = cells[cells.arm == "baseline"]
    if never := [f"{c.env} {c.algo}" for c in base.itertuples() if c.reached == 0]:
        text.append(f"No seed of the baseline reached the reward threshold within the budget: {', '.join(never)}.\n")
    if never := [f"{c.env} {c.algo}" for c in base.itertuples() if c.failure_rate == 1]:
        why = "(every seed ends nearer to the random policy)"
        text.append(f"**Never learned** by the baseline {why}: {', '.join(never)}.\n")
    return text


def verdict_section(family, verdicts, exploratory, left_out, margin):
    text = ["## Verdicts\n"]
    if verdicts:
        arms = list(dict.fromkeys(row["arm"] for row in family)) or ["no arm"]
        text.append(
            f"Drawn from {len(family)} comparisons, {len(FAMILY)} measures of {', '.join(arms)} against the baseline, "
            "whose intervals are corrected for this family (Bonferroni). A task is a pair of environment and "
            "algorithm; all weigh the same. Normalised: 0 is the random policy, 1 the threshold. Differences within "
            f"{margin:g} count as none.\n"
        )
        text.append(
            table(
                [(a, c, f"**{v}**", t, s) for a, c, v, t, s in verdicts], ("arm", "claim", "verdict", "tasks", "seeds")
            )
        )
        for arm, tasks in left_out.items():
            text.append(f"{arm}: fewer than {VERDICT_SEEDS} pairs, and so left out: {', '.join(tasks)}.\n")
        text += ["![verdicts](report/verdicts.png)\n", aggregate_table(family)] if family else []
    else:
        text.append("None: it takes a baseline, another arm, and an environment with a reward threshold.\n")
    if exploratory:
        what = "Each at its own level, not corrected together; no verdict rests on them."
        text += [
            f"### Exploratory: other measures, and ACPG against the controls\n\n{what}\n",
            aggregate_table(exploratory),
        ]
    return text


def wins_section(differences):
    """Single tasks on which an arm differs beyond chance, wins and losses in one table."""
    if "p_value" not in differences or differences.p_value.isna().all():
        return []
    text, tested = ["### Single tasks: wins and losses\n"], differences[differences.p_value.notna()]
    for arm, group in tested.groupby("arm", sort=False):
        found, rows = group[group.p_holm <= 0.05].sort_values("p_holm"), []
        for d in found.itertuples():
            side = "win" if d.difference > 0 else "loss"
            rows.append((d.env, d.algo, d.metric, side, between(d.difference, d.low, d.high), number(d.p_holm)))
        wins = int((found.difference > 0).sum())
        smallest = number(min(1, smallest_p(group.seeds.max()) * len(group)))
        text.append(
            f"{arm}: {wins} wins and {len(found) - wins} losses in {len(group)} tests of final return and area "
            "(sign-flip tests, Holm-corrected together at .05; the smallest p that so many seeds allow is "
            f"{smallest}).\n"
        )
        if rows:
            text.append(table(rows, ("environment", "algorithm", "measure", "", "difference, 95 %", "p, Holm")))
    return text


def across_section(scores, everywhere):
    if scores.empty:
        return []
    text = ["### Exploratory: across environments\n"]
    header = ("algorithm", "arm", "measure", "share of each environment's runs in the IQM")
    text += [
        "The IQM averages the middle half of all runs, and so may leave out tasks:\n",
        table(interquartile(scores), header),
    ]
    if left_out := sorted(set(scores.arm) - set(everywhere)):
        text.append(f"Arms without runs on every task are left out of the last two plots: {', '.join(left_out)}.\n")
    pictures = {"IQM": "aggregate", "profile": "profile", "efficiency": "efficiency"}
    return [*text, "\n\n".join(f"![{name}](report/{file}.png)" for name, file in pictures.items()) + "\n"]


def learning_section(cells, differences):
    text = ["## Learning\n\nDescriptive: no verdict rests on it.\n\n![learning curves](report/curves.png)\n"]
    columns = ("best", "auc", "steps_to_threshold", "reached", "failure_rate", "cvar25", "drawdown")
    rows = [
        (c.env, c.algo, c.arm, c.seeds, between(c.final, c.final_low, c.final_high), number(c.final_median))
        + tuple(number(getattr(c, column)) for column in columns)
        for c in cells.itertuples()
    ]
    header = ("environment", "algorithm", "arm", "seeds", "final return", "median", "best", "area")
    header += ("steps to threshold", "reached it", "failure rate", "CVaR 25 %", "drawdown")
    text.append(table(rows, header))
    if not len(differences):
        return text
    rows = [
        (d.env, d.algo, d.arm, d.metric, d.seeds, between(d.difference, d.low, d.high))
        + ("-" if math.isnan(d.p_improvement) else between(d.p_improvement, d.p_low, d.p_high),)
        for d in differences.itertuples()
    ]
    header = ("environment", "algorithm", "arm", "measure", "pairs", "difference, 95 %")
    what = "### Exploratory: differences from the baseline\n\nAs measured, not corrected for their number.\n"
    return [*text, what, table(rows, (*header, "probability of improvement, 95 %"))]


def collapse_section(collapse, algos):
    text = [
        "## Collapse\n\nGreedy labels. Trained: the last measurement. A value is the mean of the runs in which the "
        "metric is defined: there are two greedy actions or more, for the ETF error three.\n"
    ]
    text += [f"![collapse, {algo}](report/collapse_{algo}.png)\n" for algo in algos]
    rows = []
    for c in collapse.itertuples():
        trained = between(c.trained, c.low, c.high) if c.defined else "void: two actions" if c.void else "undefined"
        row = [c.env, c.algo, c.arm, COLLAPSE[c.metric], number(c.untrained), f"{c.untrained_defined} of {c.seeds}"]
        row += [trained, f"{c.defined} of {c.seeds}", number(c.null), f"{c.null_defined} of {c.seeds}"]
        rows.append(row)
    header = ("environment", "algorithm", "arm", "metric (at collapse)", "untrained", "runs", "trained", "runs")
    return [*text, table(rows, (*header, "trained, labels permuted", "runs"))]


def reference_section(thresholds, randoms, entries):
    rows = [
        (env, number(randoms[env]), number(entries[env]["standard_error"]), entries[env]["episodes"])
        for env in thresholds
    ]
    rows = [(*row, number(thresholds[row[0]])) for row in rows]
    header = ("environment", "random policy", "standard error", "episodes", "reward threshold")
    return ["## References\n", table(rows, header)]


def write(folder, args, runs, curves, problems, settings):
    """Everything of the report, into report.md and report/, at its end or not at all. Returns the verdicts."""
    cache = read_references(folder)
    thresholds, randoms, entries = references(settings, args, cache)
    (folder / "references.json").write_text(json.dumps(cache, indent=1) + "\n")
    with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as unfinished:
        verdicts, text = compute(Path(unfinished), args, runs, curves, problems, thresholds, randoms)
        (folder / "report").mkdir(exist_ok=True)
        for path in Path(unfinished).iterdir():
            path.replace(folder / "report" / path.name)
    (folder / "report.md").write_text("\n".join(text + reference_section(thresholds, randoms, entries)))
    return verdicts


def compute(out, args, runs, curves, problems, thresholds, randoms):
    """(verdicts, lines of report.md); CSVs and figures go to the folder `out`."""
    rng = np.random.default_rng(args.seed)
    style()
    arms = sorted(runs.arm.unique(), key=lambda arm: (arm != "baseline", arm != "acpg", arm))
    colours = colours_of(arms)
    returns = np.stack([on_grid(curve, RETURN, b) for curve, b in zip(curves, runs.budget, strict=True)])
    runs, returns, efficiency = score(runs, returns, thresholds, randoms)
    runs.to_csv(out / "runs.csv", index=False, float_format="%.6g")
    cells, differences = compare_cells(runs, arms, rng, args.resamples)
    correct(differences)
    cells.to_csv(out / "cells.csv", index=False, float_format="%.6g")
    differences.to_csv(out / "differences.csv", index=False, float_format="%.6g")
    gzip = {"method": "gzip", "mtime": 0}  # the same curves give the same bytes
    compact_curves(runs, curves, returns).to_csv(
        out / "curves.csv.gz", index=False, float_format="%.5g", compression=gzip
    )
    collapse = compare_collapse(runs, curves, rng, args.resamples)
    collapse.to_csv(out / "collapse.csv", index=False, float_format="%.6g")
    scores, family, verdicts, exploratory, everywhere = runs[runs.norm_final.notna()], [], [], [], {}
    left_out = {}
    if not scores.empty:
        judged = runs[runs.norm_final.notna() | (runs.stale & runs.env.map(lambda e: usable(e, thresholds, randoms)))]
        family, verdicts, exploratory, left_out = judge(judged, arms, lost_seeds(runs, problems), rng, args)
        if family:
            plot_verdicts(family, args.margin, colours, out / "verdicts.png")
        table_iqm = plot_aggregate(scores, colours, rng, args.resamples, out / "aggregate.png")
        table_iqm.to_csv(out / "iqm.csv", index=False, float_format="%.6g")
        tasks = scores.groupby("arm")[["env", "algo"]].apply(lambda x: len(x.drop_duplicates()))
        everywhere = {arm: colour for arm, colour in colours.items() if tasks.get(arm) == tasks.max()}
        plot_profile(scores, efficiency, everywhere, rng, args.resamples, out)
    columns = ["arm", "against", "claim", "measure"]
    frame = pd.DataFrame(family + exploratory, columns=None if family or exploratory else columns)
    frame.to_csv(out / "aggregates.csv", index=False, float_format="%.6g")
    frame = pd.DataFrame(verdicts, columns=["arm", "claim", "verdict", "tasks", "seeds"])
    frame.to_csv(out / "verdicts.csv", index=False)
    plot_curves(runs, returns, thresholds, colours, out / "curves.png")
    for algo in runs.algo.unique():
        plot_collapse(runs, curves, returns, algo, colours, out / f"collapse_{algo}.png")
    text = [
        f"# Report\n\n{len(runs)} finished runs; environments: {', '.join(thresholds)}. Made by `python "
        "benchmark/report.py`; docs/benchmark.md explains every number. Differences are arm minus baseline, paired by "
        "seed. Intervals are of 95 % unless another level is given.\n"
    ]
    text += missing_section(problems) + failed_section(runs) + notes_section(cells, thresholds, randoms)
    text += verdict_section(family, verdicts, exploratory, left_out, args.margin) + wins_section(differences)
    text += across_section(scores, everywhere)
    text += learning_section(cells, differences) + collapse_section(collapse, runs.algo.unique())
    return verdicts, text


def main():
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    folder = args.folder
    if not folder.is_dir():
        fail(f"{folder} is no folder; give the one that benchmark.sh wrote to")
    if not 2000 <= args.resamples <= 10**7:
        fail(f"--resamples must lie between 2000 and 10000000, got {args.resamples}")
    if not 0 < args.margin <= 1:
        fail(f"--margin must lie above 0 and at most at 1, got {args.margin}")
    if not 0 <= args.seed < 2**32:
        fail(f"--seed must lie between 0 and {2**32 - 1}, got {args.seed}")
    warnings.filterwarnings("ignore", message="Precision loss occurred")
    sys.path.insert(1, str(ROOT))  # for environments.ideal_cliff:IdealCliffWalking-v0 and its like, if imported at all
    try:
        runs, curves, problems, settings = read_runs(folder)
        verdicts = write(folder, args, runs, curves, problems, settings)
    except Damaged as error:
        fail(f"{error}; remove or restore it")
    except OSError as error:
        fail(f"{folder} cannot be written: {error}")
    except KeyboardInterrupt:
        fail("stopped; an earlier report, if there is one, is as it was")
    for arm, claim, what, tasks, seeds in verdicts:
        print(f"{arm} {claim}: {what} ({tasks} tasks, {seeds} seeds)")
    print(f"{len(runs)} runs, {len(problems)} missing; report in {folder / 'report.md'}")


if __name__ == "__main__":
    main()
