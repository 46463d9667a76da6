"""A study written down in a file: tuning, choice of settings, report seeds, one report. `benchmark.sh --study` runs it.

    bash benchmark.sh --study benchmark/small.toml

Each [[part]] of the file names its tasks with their budgets, algorithms, arms, the grid that each arm is tuned over,
seeds for tuning and for the report, and its primary outcomes. A part without report seeds only tunes, one whose grid
has a single value needs no tuning. docs/benchmark.md explains.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

import report
import sweep as sweeps
from intervals import VERDICT_SEEDS, aggregate, compare_sensitivity, grid_means, holm, paired_tasks, stratified_mean
from reading import (
    PACKED,
    RETURN,
    check,
    is_text,
    on_grid,
    read_json,
    read_manifest,
    read_packed,
    read_references,
    write_packed,
)

ROOT = Path(__file__).resolve().parent.parent
SPEED = 8000  # steps a second and core, for the estimate of what a study costs
MARGIN = 0.05  # normalised differences within it count as none, unless the file has another
CHAIN = "ACPG_STUDY_GOES_ON"  # set in the SLURM job that waits for a stage's runs and submits the next
PRIMARY = {"final": "final return", "auc": "area under the curve", "grid": "mean over the grid, area under the curve"}


def fail(message):
    sys.exit(f"error: {message}")


# The file


@dataclass(frozen=True)
class Part:
    """One [[part]] of a study."""

    name: str
    tasks: dict  # environment: steps
    arms: list
    flag: str  # that is tuned
    values: list
    tuning: dict  # arm: seeds
    report: dict
    common: dict  # seeds at the one setting for all tasks
    grid: dict  # seeds of runs at all settings, for the sensitivity; arms without are not in it
    algos: list = field(default_factory=lambda: ["ppo"])
    extra: str = ""
    primary: list = field(default_factory=list)

    @property
    def names(self):
        return [arm.partition("=")[0] for arm in self.arms]

    @property
    def reports(self):
        """{stage: what its report is of}."""
        if len(self.values) == 1:
            return {"tuned": f"{self.flag} {self.values[0]}"}
        return {"tuned": "each task's own setting", "common": "one setting for all tasks"}


def seeds_of(text, where):
    """The seeds that "101-105" or "3" or a list of them mean."""
    if isinstance(text, list):
        return sorted({seed for one in text for seed in seeds_of(str(one), where)})
    match = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", str(text))
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < 2**32 or last - first >= 10**5:
        fail(f'{where}: {str(text)[:50]!r} are no seeds; write them as "101-105"')
    return list(range(first, last + 1))


def read_study(path):
    """(parts, primary outcomes as [(outcome, its parts)], thresholds, margin) of a study file; ends in one line that
    says where it is wrong."""
    try:
        import tomllib
    except ModuleNotFoundError:
        fail("--study needs Python 3.11 or later, which reads TOML")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # of text that is no UTF-8, no TOML, or a number too long
        fail(f"--study {path}: {' '.join(str(error).split())}")
    parts = content.get("part")
    if unknown := set(content) - {"part", "primary", "threshold", "margin"}:
        known = "a study has [[part]] and [[primary]] tables, [threshold] and margin"
        fail(f"--study {path}: {', '.join(sorted(unknown))}: unknown; {known}")
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        fail(f"--study {path} has no [[part]]")
    parts = [read_part(part, f"--study {path}, part {i}") for i, part in enumerate(parts, start=1)]
    if len({part.name for part in parts}) < len(parts):
        fail(f"--study {path} has two parts of one name")
    for tuned, other in itertools.permutations(parts, 2):
        tasks = sorted(set(tuned.tasks) & set(other.tasks)) if set(tuned.algos) & set(other.algos) else []
        seeds = seeds_of_stages(tuned, "tuning") & seeds_of_stages(other, "report", "common", "grid")
        if tasks and seeds:
            shown = ", ".join(map(str, sorted(seeds)))
            what = f"seeds {shown} of {tasks[0]} are for tuning in part {tuned.name} and for the report in {other.name}"
            fail(f"--study {path}: {what}; keep them apart")
    thresholds = content.get("threshold", {})
    if not isinstance(thresholds, dict) or not all(map(is_moderate, thresholds.values())):
        fail(f"--study {path}: [threshold] takes ENV = VALUE, a finite number")
    if not is_moderate(margin := content.get("margin", MARGIN)) or not 0 < margin <= 1:
        fail(f"--study {path}: margin must lie above 0 and at most at 1, got {margin!r}")
    if unknown := set(thresholds) - {env for part in parts for env in part.tasks}:
        fail(f"--study {path}: [threshold] has {', '.join(sorted(unknown))}, which is no part's task")
    outcomes = [(outcome, [part]) for part in parts for outcome in part.primary]
    named = {part.name: part for part in parts}
    tables = content.get("primary", [])
    for table in tables if isinstance(tables, list) else [tables]:
        wanted = table.get("parts") if isinstance(table, dict) and set(table) == {"outcome", "parts"} else None
        if not is_list_of_text(wanted) or not all(name in named for name in wanted):
            fail(f'--study {path}: [[primary]] takes outcome = "ARM MEASURE" and parts = [names of parts], each once')
        for name in wanted:
            check_outcome(table["outcome"], named[name], f"--study {path}, [[primary]], part {name}")
        outcomes.append((table["outcome"], [named[name] for name in wanted]))
    names = [(outcome, *sorted(part.name for part in own)) for outcome, own in outcomes]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        fail(f"--study {path}: primary {twice[0][0]!r} of {', '.join(twice[0][1:])} is named twice")
    return parts, outcomes, thresholds, margin


def seeds_of_stages(part, *stages):
    return set().union(*(seeds for stage in stages for seeds in getattr(part, stage).values()))


def is_moderate(value):
    """Whether it is a finite number that is not huge; an int may have any number of digits."""
    return type(value) in (int, float) and abs(value) < 1e300


def is_list_of_text(value):
    """Whether it is a list of one word or more, each once."""
    return isinstance(value, list) and bool(value) and all(map(is_text, value)) and len(set(value)) == len(value)


def check_outcome(outcome, part, where):
    """Ends in one line if the part's runs cannot say what the primary outcome asks."""
    arm, _, measure = str(outcome).partition(" ")
    if arm not in part.names or arm == "baseline" or measure not in PRIMARY or "baseline" not in part.names:
        fail(f"{where}: primary {outcome!r}; give ARM and {' or '.join(PRIMARY)}, beside a baseline")
    if measure != "grid" and not part.report:
        fail(f"{where}: primary {outcome!r} needs seeds of the report")
    if measure == "grid" and not {arm, "baseline"} <= set(part.grid):
        fail(f"{where}: primary {outcome!r} needs seeds of the grid for {arm} and baseline")
    seeds = part.grid if measure == "grid" else part.report
    if not set(seeds[arm]) & set(seeds["baseline"]):
        fail(f"{where}: primary {outcome!r}: {arm} and baseline have no seed in common")


def read_part(table, where):
    needed = {"name": str, "tasks": dict, "arms": list, "grid": dict, "seeds": dict}
    known = needed | {"algos": list, "extra": str, "primary": list}
    for key in needed:
        if key not in table:
            fail(f"{where} lacks {key}")
    for key, value in table.items():
        if key not in known or not isinstance(value, known[key]):
            fail(f"{where}: {key} is unknown or of the wrong kind; a part has {', '.join(known)}")
    if not re.fullmatch(r"[\w-]+", table["name"]):
        fail(f"{where}: name {table['name'][:50]!r} may have letters, digits and dashes")
    if not table["tasks"] or not all(type(steps) is int and steps > 0 for steps in table["tasks"].values()):
        fail(f'{where}: tasks takes "ENV" = steps')
    algos = table.get("algos", ["ppo"])
    if not is_list_of_text(algos) or not all(algo in sweeps.ALGOS for algo in algos):
        fail(f"{where}: algos {algos}; choose from {', '.join(sweeps.ALGOS)}, each once")
    grid = table["grid"]
    if set(grid) != {"flag", "values"} or not isinstance(grid["values"], list) or not grid["values"]:
        fail(f'{where}: grid takes flag = "--learning-rate" and values = [...]')
    if len({as_number(value) for value in map(str, grid["values"])}) < len(grid["values"]):
        fail(f"{where}: grid has a value twice")
    if not is_list_of_text(table["arms"]):
        fail(f"{where}: arms takes a list of text, such as 'acpg' or 'random=acpg:--action-layer=random'")
    arms, seeds = list(sweeps.read_arms(table["arms"])), table["seeds"]
    if "others" in arms:
        fail(f"{where}: an arm cannot be called others, which in seeds means the rest")
    must = {"tuning"} if len(grid["values"]) > 1 else {"report"}
    if wrong := set(seeds) - {"tuning", "report", "common", "grid"} or must - set(seeds):
        kinds = "tuning and report, and common and grid if wanted"
        fail(f"{where}: seeds takes {kinds}, not or without {', '.join(sorted(wrong))}")
    found = {}
    for kind, given in seeds.items():
        given = given if isinstance(given, dict) else dict.fromkeys(arms, given)
        if unknown := set(given) - {*arms, "others"}:
            fail(f"{where}: seeds of {', '.join(sorted(unknown))}, which are no arms")
        found[kind] = {arm: given.get(arm, given.get("others")) for arm in arms}
        found[kind] = {arm: seeds_of(x, f"{where}: {kind}") for arm, x in found[kind].items() if x is not None}
        if not all(found[kind].values()):
            fail(f"{where}: {kind} has no seeds")
    given = [found[kind] for kind in ("tuning", "report") if kind in found]
    if missing := [arm for arm in arms if any(arm not in seeds for seeds in given)]:
        fail(f"{where}: seeds has none for {', '.join(missing)}")
    used = [set().union(*found.get(kind, {}).values()) for kind in ("tuning", "report", "common", "grid")]
    if twice := used[0] & set().union(*used[1:]):
        fail(f"{where}: seeds {', '.join(map(str, sorted(twice)))} are for tuning and for the report; keep them apart")
    if "grid" in seeds and "report" not in seeds:
        fail(f"{where}: seeds of the grid need seeds of the report")
    if "common" in seeds and len(grid["values"]) == 1:
        fail(f"{where}: seeds has common, the setting of all tasks, which a grid of one value has anyway")
    rest = {key: table[key] for key in ("algos", "extra", "primary") if key in table}
    values = [str(value) for value in grid["values"]]
    own = {kind: found.get(kind, {}) for kind in ("tuning", "report", "grid")}
    own["common"] = own["report"] | found.get("common", {})
    part = Part(table["name"], table["tasks"], table["arms"], grid["flag"], values, **own, **rest)
    for outcome in part.primary:
        check_outcome(outcome, part, where)
    return part


def as_number(text):
    """The number that a text is, so that 1e-3 is 0.001, or the text."""
    try:
        return float(text)
    except ValueError:
        return text


def check_thresholds(parts, outcomes, thresholds, where):
    """Ends in one line if a task is to be scored and has no threshold, before anything runs for it."""
    import gymnasium as gym

    scored = {part.name for _, own in outcomes for part in own} | {part.name for part in parts if part.tuning}
    for part in (part for part in parts if part.name in scored):
        for env in part.tasks:
            if env not in thresholds and gym.spec(env.rpartition(":")[2]).reward_threshold is None:
                fail(f"{where}, part {part.name}: {env} has no reward threshold of its own; give one in [threshold]")


# Its runs


def jobs_of(part, args, stage, settings, seeds):
    """The jobs of a stage: `settings` gives the values at which an arm runs a task, as {(env, algo, arm): [value]}."""
    jobs, suffixed = [], stage in ("tuning", "grid")
    for (env, algo, name), values in settings.items():
        given = next(arm for arm in part.arms if arm.partition("=")[0] == name)
        for value in values:
            own = dataclasses.replace(args, algos=[algo], envs=[env], seeds=seeds[name], num_seeds=None, study=None)
            own.total_timesteps, own.out = part.tasks[env], args.out / part.name / stage
            own.arms, own.extra = [given], f"{part.extra} {part.flag}={value}".strip()
            if suffixed:  # its value is part of the arm's name
                base, _, flags = given.partition("=")[2].partition(":") if "=" in given else (given, "", "")
                own.arms, own.extra = [f"{name}.{value}={base}:{flags} {part.flag}={value}"], part.extra
            jobs += sweeps.plan(own)
    return sorted(jobs, key=lambda job: job.args["seed"])  # an unfinished stage is balanced


def cells_of(part, arms=None):
    return [(env, algo, arm) for env in part.tasks for algo in part.algos for arm in arms or part.names]


def run(part, args, stage, jobs):
    """Run what is missing of a stage. Returns the jobs that failed."""
    folder = args.out / part.name / stage
    folder.mkdir(parents=True, exist_ok=True)
    packed = read_packed(folder / PACKED)
    sweeps.refuse_other_settings(folder, jobs, packed)
    sweeps.write_manifest(folder, jobs, packed)
    if all(job.record(packed) is not None for job in jobs):
        return []
    own = dataclasses.replace(args, out=folder)
    print(f"part {part.name}, {stage}", flush=True)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    failed = sweeps.sweep(own, jobs, packed)
    for number, handler in handlers.items():  # there is more to do, which a signal is to end
        signal.signal(number, handler)
    sweeps.write_manifest(folder, jobs, packed)
    return failed


def references_of(folder, thresholds):
    """references.json of a folder without the thresholds that the file gave once and gives no more."""
    cache = read_references(folder)
    for key, entry in cache.items():
        if key.partition(" ")[0] not in thresholds:
            entry.pop("threshold", None)
    return cache


def scores_of(folder, thresholds, names=None, keep=True):
    """The run table of a stage's folder with normalised scores; arms as they are called there. Areas are clipped to
    [0, 1] and final returns from below at 0, so that a run that diverged, which has 0, is ahead of none.

    `names`: those of the runs that the file asks for, of which others may have been left by an earlier one. `keep`:
    whether references that had to be measured are written down.
    """
    runs, curves, _, settings = report.read_runs(folder)
    cache = references_of(folder, thresholds)
    words = [f"{env}={value}" for env, value in thresholds.items() if env in set(runs.env)]
    own = SimpleNamespace(threshold=words, seed=0, import_modules=True)
    known, randoms, _ = report.references(settings, own, cache)
    if keep:
        (folder / "references.json").write_text(json.dumps(cache, indent=1) + "\n")
    returns = np.stack([on_grid(curve, RETURN, b) for curve, b in zip(curves, runs.budget, strict=True)])
    scores = report.score(runs, returns, known, randoms)[0]
    scores = scores if names is None else scores[scores.name.isin(names)]
    return scores.assign(norm_auc=scores.norm_auc.clip(0, 1), norm_final=scores.norm_final.clip(lower=0))


def grids_of(scores, part, arms):
    """Each arm's grid for intervals.compare_sensitivity: areas by task and value, of the seeds that all values have on
    a task in all of `arms`, in their order, so that runs are paired; None if a task has no such seed."""
    grids = [[] for _ in arms]
    for env in part.tasks:
        for algo in part.algos:
            own = scores[(scores.env == env) & (scores.algo == algo)].set_index("seed").norm_auc
            names = scores.arm[(scores.env == env) & (scores.algo == algo)].to_numpy()
            cells = [[own[names == f"{arm}.{value}"] for value in part.values] for arm in arms]
            seeds = sorted(set.intersection(*(set(cell.index) for row in cells for cell in row)))
            if not seeds:
                return None
            for grid, row in zip(grids, cells, strict=True):
                grid.append([cell.loc[seeds].to_numpy() for cell in row])
    return grids


def grid_rows(part, arms, scores):
    """Rows of grid.csv: at each task and value the seeds of an arm, their mean area, and how many failed."""
    for env, algo, arm in cells_of(part, arms):
        for value in part.values:
            own = scores[(scores.env == env) & (scores.algo == algo) & (scores.arm == f"{arm}.{value}")]
            row = {"env": env, "algo": algo, "arm": arm, "value": value, "seeds": len(own), "area": own.norm_auc.mean()}
            yield row | {"failed": (own.norm_final < 0.5).sum()}


def choose(scores, part):
    """({(env, algo, arm): value}, the same with one value for all of an arm's tasks): the best mean area over the
    tuning seeds, the first of equals. Raises ValueError, with what to do, if a cell has no runs or no scores."""
    own, common = {}, {}
    for arm in part.names:
        grids = grids_of(scores, part, [arm])
        if grids is None or not all(np.isfinite(cell).all() for task in grids[0] for cell in task):
            unknown = ", ".join(scores.name[scores.norm_auc.isna() & scores.arm.str.startswith(f"{arm}.")][:3])
            why = f"no score is known of {unknown}: " if unknown else ""
            what = "episodes must end, which --max-episode-steps in extra sees to, and a task needs a [threshold]"
            raise ValueError(f"part {part.name}: the tuning of {arm} lacks runs or scores ({why}{what})")
        means = grid_means(grids[0])
        tasks = [(env, algo, arm) for env in part.tasks for algo in part.algos]
        own |= {task: part.values[row.argmax()] for task, row in zip(tasks, means, strict=True)}
        common |= dict.fromkeys(tasks, part.values[means.mean(0).argmax()])
    return own, common


def edges(part):
    """The smallest and the largest value of the grid, if they are numbers."""
    try:
        values = sorted(part.values, key=float)
    except ValueError:
        return []
    return [values[0], values[-1]] if values[1:] else []


def one_edge(part, own, arm, against="baseline", envs=None):
    """On how many tasks, all or `envs`, of the settings of two arms one is at the edge of the grid, the other not."""
    ends = edges(part)
    tasks = [(env, algo) for env in part.tasks for algo in part.algos if envs is None or env in envs]
    return sum((own[*task, arm] in ends) != (own[*task, against] in ends) for task in tasks)


# The report


def publish(part, args, own, common, jobs):
    """Write reports/tuned and reports/common of a part, each with its runs in a packed table, a list of those that were
    planned, and their reports; only the first where the grid has one value. `jobs` has those of each stage."""
    names = {stage: {job.path.name for job in own} for stage, own in jobs.items()}
    found = {stage: report.find_runs(args.out / part.name / stage)[0] for stage in jobs}
    found = {stage: [run for run in runs if run.name in names[stage]] for stage, runs in found.items()}
    known = {stage: read_manifest(args.out / part.name / stage).get("runs", {}) for stage in jobs}
    known = {stage: {job.path.name: known[stage][job.path.name] for job in jobs[stage]} for stage in jobs}

    def is_shared(given):
        key = (given["env_id"], *given["exp_name"].split("_", 1))
        return own[key] == common[key] and given["seed"] in part.common[key[2]]

    found["common"] += [run for run in found["tuned"] if is_shared(run.record["args"])]
    shared = [job.path.name for job in jobs["tuned"] if is_shared(job.args)]
    known["common"] |= {name: known["tuned"][name] for name in shared}
    for stage in part.reports:
        folder = args.out / part.name / "reports" / stage
        folder.mkdir(parents=True, exist_ok=True)
        write_packed(folder / PACKED, found[stage])
        if cache := references_of(folder, args.thresholds):
            (folder / "references.json").write_text(json.dumps(cache, indent=1) + "\n")
        (folder / "manifest.json").write_text(json.dumps({"runs": known[stage]}, indent=1) + "\n")
        words = [f"{env}={value}" for env, value in args.thresholds.items() if env in part.tasks]
        command = [sys.executable, str(ROOT / "benchmark" / "report.py"), str(folder), "--import-modules"]
        command += [f"--margin={args.margin}"]
        if subprocess.run([*command, *(["--threshold", *words] if words else [])], check=False).returncode:
            fail(f"the report of {folder} failed, as it says above")


def p_value(tasks, resamples=20_000):
    """Two-sided p of "the mean over tasks is zero": one minus the largest level whose interval excludes it."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        _, a, b = stratified_mean(tasks, np.random.default_rng(0), middle, resamples)
        low, high = (middle, high) if a > 0 or b < 0 else (low, middle)
    return max(1 - low, 2 / resamples)  # the least that so many resamples can tell


def paired_cells(part, read, arm, measure):
    """[(baseline's scores, the arm's)] by task, of the same seeds, that a primary outcome compares; in `grid` each
    seed's mean over the values. Empty if there are none, or in the grid on one of the tasks. `read(part, stage)`: the
    run table of a stage."""
    scores = read(part, "grid" if measure == "grid" else "tuned")
    if measure == "grid":
        if (grids := grids_of(scores, part, ["baseline", arm])) is None:
            return []
        if not all(np.isfinite(cells).all() for grid in grids for task in grid for cells in task):
            return []
        # a seed's runs at several values need not be independent: their mean is one score
        return [tuple(np.mean(cells, axis=0) for cells in pair) for pair in zip(*grids, strict=True)]
    if scores.stale[scores.arm.isin(["baseline", arm])].any():  # whose scores nobody knows
        return []
    tables = paired_tasks(scores[scores.norm_final.notna()], arm, "baseline").values()
    return [tuple(table[f"norm_{measure}"].to_numpy(float) for table in pair) for pair in tables]


def primary_rows(outcomes, read, chosen, margin=MARGIN):
    """A dict for each primary outcome: its name, the mean over tasks with the intervals at 95 % and at the level
    corrected for their number, p, Holm's p, the verdict, and `one_edge`, on how many tasks the setting of one of the
    arms is at the grid's edge and the other's is not."""
    rows = []
    for outcome, parts in outcomes:
        arm, _, measure = outcome.partition(" ")
        pairs = [pair for part in parts for pair in paired_cells(part, read, arm, measure)]
        name = f"{arm}, {PRIMARY[measure]}, {' + '.join(part.name for part in parts)}"
        row = {"outcome": name, "tasks": len(pairs), "seeds": min((len(b) for b, _ in pairs), default=0)}
        row["of_tasks"] = sum(len(part.tasks) * len(part.algos) for part in parts)
        row["one_edge"] = 0 if measure == "grid" else sum(one_edge(part, chosen[part.name][0], arm) for part in parts)
        row |= {"p": p_value([t - b for b, t in pairs]) if pairs else 1.0}
        for label, level in (("", 0.95), ("corrected_", 1 - 0.05 / len(outcomes))):
            arms = zip(*pairs, strict=True) if pairs else ((), ())
            estimate = aggregate("mean", *arms, np.random.default_rng(0), 20_000, level)
            row |= dict(zip(("difference", f"{label}low", f"{label}high"), estimate, strict=True))
        rows.append(row)
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
        row["verdict"] = primary_verdict(row, margin)
    return rows


def primary_verdict(row, margin=MARGIN):
    """Equivalent if the corrected interval lies within the margin, ahead or behind if Holm's p is below .05."""
    if row["tasks"] < row["of_tasks"]:
        return f"none: runs of {row['tasks']} of {row['of_tasks']} tasks"
    if row["seeds"] < VERDICT_SEEDS:
        return f"none: fewer than {VERDICT_SEEDS} seeds"
    if max(abs(row["corrected_low"]), abs(row["corrected_high"])) < margin:
        return "equivalent"
    if row["p_holm"] < 0.05:
        return "ahead" if row["difference"] > 0 else "behind"
    return "not decided"


def sensitivity_lines(part, args):
    """Markdown: each arm's mean score at each value, what the arms' sensitivities are, and the figure."""
    stages = {arm: "grid" if arm in part.grid else "tuning" for arm in part.names}
    read = {
        stage: scores_of(args.out / part.name / stage, args.thresholds, args.planned[part.name, stage])
        for stage in set(stages.values())
    }
    found = {arm: grids_of(read[stage], part, [arm]) for arm, stage in stages.items()}
    grids = {arm: grid[0] for arm, grid in found.items() if grid is not None}
    plot_grid(part, grids, args.out / part.name / "grid.png")
    cells = [row for arm in grids for row in grid_rows(part, [arm], read[stages[arm]])]
    pd.DataFrame(cells).to_csv(args.out / part.name / "grid.csv", index=False, float_format="%.6g")
    lines = ["Mean area, clipped to [0, 1]; of arms without seeds of the grid on those of the tuning.", ""]
    rows = []
    for arm, grid in grids.items():
        tasks = [(env, algo) for env in part.tasks for algo in part.algos]
        for (env, algo), cells in zip(tasks, grid, strict=True):
            rows.append((env, algo, arm, stages[arm], *(f"{cell.mean():.3f}" for cell in cells)))
    lines += [
        report.table(rows, ("environment", "algorithm", "arm", "seeds of the", *part.values)),
        f"![grid]({part.name}/grid.png)",
        "",
    ]
    try:
        rates = [float(value) for value in part.values]
    except ValueError:
        rates = []
    if len(rates) > 1 and "baseline" in grids and min(rates) > 0:
        rows = []
        for arm in grids:
            if arm == "baseline" or stages[arm] != stages["baseline"]:
                continue
            pair = grids_of(read[stages[arm]], part, ["baseline", arm])
            if pair is None or min(len(task[0]) for task in pair[0]) < 2:
                continue
            for row in compare_sensitivity(*pair, rates, np.random.default_rng(0)):
                values = [report.number(row[key]) for key in ("base", "treated")]
                difference = report.between(*(row[key] for key in ("difference", "low", "high")))
                rows.append((arm, row["measure"], *values, difference))
        lines += [report.table(rows, ("arm", "sensitivity", "baseline", "arm", "difference, 95 %"))]
    return lines


def plot_grid(part, grids, path):
    """Mean score against the tuned value: a panel a task, a colour an arm, 95 % t intervals over seeds."""
    from scipy import stats

    from plots import colours_of, plt, save, style

    style()
    tasks, colours = [(env, algo) for env in part.tasks for algo in part.algos], colours_of(list(grids))
    figure, grid = plt.subplots(1, len(tasks), figsize=(1 + 3.2 * len(tasks), 3.4), squeeze=False, layout="constrained")
    for k, (axes, (env, algo)) in enumerate(zip(grid[0], tasks, strict=True)):
        for j, (arm, cells) in enumerate(grids.items()):
            aside = 0.06 * (j - (len(grids) - 1) / 2)  # so that no interval hides another
            x, means = np.arange(len(part.values)) + aside, [cell.mean() for cell in cells[k]]
            axes.plot(x, means, "o-", color=colours[arm], label=arm)
            for i, cell in enumerate(cells[k]):
                if len(cell) > 1 and np.ptp(cell):
                    half = stats.t.ppf(0.975, len(cell) - 1) * stats.sem(cell)
                    ends = np.clip([means[i] - half, means[i] + half], 0, 1)  # as areas are
                    axes.plot([x[i], x[i]], ends, color=colours[arm], alpha=0.5, linewidth=2)
        axes.set_xticks(range(len(part.values)), part.values)
        axes.set(title=f"{env}, {algo}", xlabel=part.flag.strip("-").replace("-", " "))
    grid[0][0].set_ylabel("normalised area")
    save(figure, path)


def commit_of(path):
    """The last commit of a file, with "changed since" where the file differs from it; "uncommitted" without one."""
    git = ["git", "-C", str(path.parent)]
    with contextlib.suppress(OSError):  # there may be no git
        log = [*git, "log", "-1", "--format=%H", "--", path.name]
        commit = subprocess.run(log, capture_output=True, text=True, check=False).stdout.strip()
        clean = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", path.name], capture_output=True, check=False)
        if commit:
            return commit + ("" if clean.returncode == 0 else ", changed since")
    return "uncommitted"


def write_report(path, parts, outcomes, args, chosen, failed):
    """report.md of the study: what was run and what failed, which settings were chosen, primary outcomes, sensitivity,
    links."""
    begun, commits = args.begun, set()
    for part, stage in args.planned:
        known = read_manifest(args.out / part / stage).get("runs", {})
        commits |= {str(run["git_commit"]) for run in known.values() if run.get("git_commit")}
    now = commit_of(path)
    now = f"commit {now}" if now == begun["commit"] else f"commit {begun['commit']} at the start, {now} now"
    lines = [
        f"# Study {path.stem}",
        "",
        f"Study file: {now}. Scripts: commits {', '.join(sorted(commits)) or 'unknown'}.",
        "",
    ]
    if args.sha256 != begun["sha256"]:
        lines += ["**The study file was changed after the first run.**", ""]
    settings = [
        {"part": name, "env": env, "algo": algo, "arm": arm, "value": value, "common": chosen[name][1][env, algo, arm]}
        for name, (own, _) in chosen.items()
        for (env, algo, arm), value in own.items()
    ]
    pd.DataFrame(settings).to_csv(args.out / "chosen.csv", index=False)
    if failed:
        lines += [f"**Missing, as they failed: {', '.join(map(sweeps.describe, failed))}.**", ""]
    read = lambda part, stage: scores_of(  # noqa: E731
        args.out / part.name / stage, args.thresholds, args.planned[part.name, stage]
    )
    rows = primary_rows(outcomes, read, chosen, args.margin)
    lines += ["## Primary outcomes", ""]
    if rows:
        pd.DataFrame(rows).to_csv(args.out / "primary.csv", index=False, float_format="%.6g")
        body = [
            (
                row["outcome"],
                report.between(row["difference"], row["low"], row["high"]),
                report.between(row["difference"], row["corrected_low"], row["corrected_high"]),
                *(report.number(row[key]) for key in ("p", "p_holm")),
                f"{row['one_edge']} of {row['tasks']}",
                row["verdict"],
            )
            for row in rows
        ]
        header = ("arm minus baseline, parts", "mean over tasks, 95 %", f"{100 - 5 / len(rows):.4g} %", "p")
        lines += [
            f"Ahead or behind if p after Holm is below .05, equivalent within {args.margin} at the corrected level."
        ]
        lines += ["Everything else is secondary or exploratory.", ""]
        lines += [report.table(body, (*header, f"p, Holm over {len(rows)}", "one setting at an edge", "verdict"))]
    else:
        lines += ["None is named.", ""]
    for part in parts:
        own, common = chosen[part.name]
        lines += [f"## Part {part.name}", ""]
        if part.tuning:
            body = [(*k, value + " *edge*" * (value in edges(part)), common[k]) for k, value in own.items()]
            header = ("environment", "algorithm", "arm", "for the task", "for all tasks")
            lines += [f"Chosen {part.flag} on the tuning seeds, by mean normalised area; beyond an *edge* of the grid"]
            lines += ["there may be a better one:", ""]
            lines += [report.table(body, header), *sensitivity_lines(part, args)]
        if not part.report:
            continue
        links = [f"[{name}]({part.name}/reports/{stage}/report.md)" for stage, name in part.reports.items()]
        lines += [f"Reports: {', '.join(links)}.", ""]
    (args.out / "report.md").write_text("\n".join(lines))
    print(f"study {path.stem}: report in {args.out / 'report.md'}")


def plan_all(parts, args):
    """{(part's name, what): jobs} of all stages, as far as they are known before anything is chosen."""
    plans = {}
    for part in parts:
        if part.tuning:
            settings = dict.fromkeys(cells_of(part), part.values)
            plans[part.name, "tuning"] = jobs_of(part, args, "tuning", settings, part.tuning)
        if part.report:
            first = dict.fromkeys(cells_of(part), part.values[:1])
            plans[part.name, "report"] = jobs_of(part, args, "tuned", first, part.report)
        if part.grid:
            settings = dict.fromkeys(cells_of(part, list(part.grid)), part.values)
            plans[part.name, "grid"] = jobs_of(part, args, "grid", settings, part.grid)
    return plans


def say_cost(parts, args, plans):
    """What the study costs, in a line for each part's stages and one for all, those that are finished included."""
    total = 0
    for (name, what), jobs in plans.items():
        part = next(part for part in parts if part.name == name)
        more = 0
        if what == "report" and part.tuning:
            first = dict.fromkeys(cells_of(part), part.values[:1])
            more = sum(job.args["total_timesteps"] for job in jobs_of(part, args, "common", first, part.common))
        steps = sum(job.args["total_timesteps"] for job in jobs)
        total += steps + more
        cost = f"{len(jobs)} runs, {steps / 1e6:.3g} million steps, {steps / SPEED / 3600:.2g} core-hours or so"
        cost += f", and {more / SPEED / 3600:.2g} at most for one setting for all tasks" if more else ""
        print(f"part {name}, {what}: {cost}", file=sys.stderr)
    most = f"{total / SPEED / 3600:.2g} core-hours or so at most"
    print(f"in all: {most}, what is finished included", file=sys.stderr, flush=True)


def begin(path, out, sha256):
    """What study.json says of the file that the study in `out` began with, written now if it begins. Ends in one line
    if the folder holds anything else."""
    record = out / "study.json"
    if not record.exists():
        if held := [name for name in ("report.md", "manifest.json", "report", "runs") if (out / name).exists()]:
            fail(f"--out {out} holds {held[0]}, which is of no study; choose another folder")
        begun = {"name": path.name, "sha256": sha256, "commit": commit_of(path)}
        temporary = record.with_name("study.json.tmp")
        temporary.write_text(json.dumps(begun) + "\n")
        temporary.replace(record)
    begun = read_json(record)
    check(record, begun, {"sha256": is_text, "commit": is_text})
    if begun.get("name", path.name) != path.name:
        fail(f"--out {out} holds the study {begun['name']}; choose another folder")
    return begun


def main(args):
    path = args.study = args.study.resolve()
    parts, outcomes, args.thresholds, args.margin = read_study(path)
    args.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    args.out = (args.out or ROOT / "results" / path.stem).resolve()
    try:
        plans = plan_all(parts, args)
    except SystemExit as end:  # which speaks of the options of a sweep
        fail(f"--study {path}: {str(end).removeprefix('error: ')}")
    check_thresholds(parts, outcomes, args.thresholds, f"--study {path}")
    say_cost(parts, args, plans)
    if not args.print:
        args.out.mkdir(parents=True, exist_ok=True)
        lock = open(args.out / "study.lock", "a")  # held until the end
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--out {args.out}: another study is writing there; wait for it or choose another folder")
        args.begun = begin(path, args.out, args.sha256)
    if args.slurm and CHAIN not in os.environ:  # by hand: what an earlier chain tried is tried anew
        for record in args.out.glob("*/*/slurm/commands.txt"):
            if ids := sweeps.submitted(record.parent.parent):
                fail(f"--out {args.out}: SLURM's jobs {ids} are at work on it; wait for them")
        for record in args.out.glob("*/*/slurm/commands.txt"):
            record.unlink()
    chosen, failed, broken, args.planned = {}, [], [], {}
    for part in parts:
        own = common = dict.fromkeys(cells_of(part), part.values[0])
        if part.tuning:
            if lost := stage(part, args, "tuning", plans[part.name, "tuning"]):
                failed += lost  # chosen without them, settings might change once they are there
                continue
            names = args.planned[part.name, "tuning"]
            folder = args.out / part.name / "tuning"
            try:
                own, common = choose(scores_of(folder, args.thresholds, names, keep=not args.print), part)
            except ValueError as error:
                broken.append(str(error))
                continue
        chosen[part.name] = own, common
        if not part.report:
            continue
        other = {key: [value] for key, value in common.items() if value != own[key]}
        jobs = {"tuned": jobs_of(part, args, "tuned", {k: [v] for k, v in own.items()}, part.report)}
        jobs["common"] = jobs_of(part, args, "common", other, part.common)
        for name, planned in (*jobs.items(), ("grid", plans.get((part.name, "grid"), []))):
            failed += stage(part, args, name, planned)
        if not args.print:
            publish(part, args, own, common, jobs)
    if args.print and not broken:
        print("nothing is left to run", file=sys.stderr)
        return
    if len(chosen) == len(parts):
        write_report(path, parts, outcomes, args, chosen, failed)
    if broken:
        print("\n".join(broken), file=sys.stderr)
        if not failed:
            fail(f"nothing was chosen in {len(broken)} parts, as said above, and no report of the study was written")
    if failed:
        lost = ", ".join(part.name for part in parts if part.name not in chosen)
        more = f"; nothing was chosen, and no report written, for {lost}" if lost else ""
        names = ", ".join(map(sweeps.describe, failed[:5]))
        fail(f"{len(failed)} runs failed: {names}; see the logs in {args.out}{more}")


def stage(part, args, name, jobs):
    """Run a stage, or with --print or --slurm only list or submit what is missing of it, and end. Returns the jobs that
    failed."""
    folder = args.out / part.name / name
    args.planned[part.name, name] = {job.path.name for job in jobs}
    packed = read_packed(folder / PACKED)
    missing = [job for job in jobs if job.record(packed) is None]
    if args.print:
        if missing:
            print("\n".join(sweeps.one_command(job) for job in missing))
            sys.exit(0)
        return []
    if missing and args.slurm:
        again = dataclasses.replace(args, print=False)
        commands = folder / "slurm" / "commands.txt"
        if commands.exists() and commands.read_text().splitlines() == [sweeps.one_command(job) for job in missing]:
            sweeps.write_manifest(folder, jobs, packed)
            return missing  # the array that this job waited for has not done them
        own = dataclasses.replace(args, out=folder, runs_only=True)
        own.out.mkdir(parents=True, exist_ok=True)
        then = ["env", f"{CHAIN}=1", sys.executable, str(ROOT / "benchmark" / "sweep.py"), *sweeps.as_flags(again)]
        sweeps.submit(own, missing, then)
        sys.exit(0)
    return run(part, args, name, jobs) if jobs else []
