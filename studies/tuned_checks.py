"""What was asked of the tuned study after its first results had been seen: how far its answers rest on one task, on one
close choice of a rate, on one end of the grid. Descriptive, nothing of it is in the protocol of docs/study.md.

    python studies/tuned_checks.py    # after studies/tuned.py, into the same folder; two minutes or so

by_task.csv: the study's comparisons on each task, and their mean over the others; choice.csv: by how much each setting
was the best, and how often it would be of other seeds; rates.csv: ACPG minus its baseline at each rate, and how many
runs of each arm failed there; shift_without.csv: the shifts without the highest rate.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark"), str(ROOT / "studies")]
import study  # noqa: E402
import tuned  # noqa: E402
from intervals import aggregate, paired_tasks  # noqa: E402
from tuned import Args  # noqa: E402


def mean_over(pairs, resamples):
    """Difference and 95 % interval of the mean over tasks of paired scores."""
    against, arm = zip(*pairs, strict=True)
    found = aggregate("mean", against, arm, np.random.default_rng(0), resamples)
    return dict(zip(("difference", "low", "high"), found, strict=True))


def by_task(question, arm, against, tables, resamples=20_000):
    """Rows of by_task.csv: arm minus against on each task and, as `rest`, over all others, in area and final return."""
    scores = pd.concat(tables)
    pairs = paired_tasks(scores[scores.norm_final.notna()], arm, against)
    for measure in ("auc", "final"):
        both = {task: [side[f"norm_{measure}"].to_numpy(float) for side in pair] for task, pair in pairs.items()}
        for task, pair in both.items():
            row = {"question": question, "arm": arm, "against": against, "env": task[0], "algo": task[1]}
            row |= {"measure": measure, "seeds": len(pair[0])} | mean_over([pair], resamples)
            if len(both) > 1:
                rest = mean_over([other for key, other in both.items() if key != task], resamples)
                row |= {f"rest_{key}": value for key, value in rest.items()}
            yield row


def choices(part, scores, rng, resamples=10_000):
    """Rows of choice.csv for the tuning's run table of a part: each cell's setting, the mean area there and at the
    second best, and in how many resamples of the tuning's seeds either would be chosen."""
    for arm in part.names:
        (tasks,) = study.grids_of(scores, part, [arm])
        cells = [(env, algo) for env in part.tasks for algo in part.algos]
        for (env, algo), grid in zip(cells, tasks, strict=True):
            areas = np.stack(grid)  # (settings, seeds)
            means = areas.mean(1)
            best = means.argmax()
            second = np.where(np.arange(len(means)) == best, -np.inf, means).argmax()
            drawn = areas[:, rng.integers(areas.shape[1], size=(resamples, areas.shape[1]))].mean(-1).argmax(0)
            row = {"part": part.name, "env": env, "algo": algo, "arm": arm, "seeds": areas.shape[1]}
            for name, k in (("chosen", best), ("second", second)):
                row |= {name: part.values[k], f"{name}_area": means[k], f"{name}_share": (drawn == k).mean()}
            yield row


def at_each_rate(part, scores, resamples=20_000):
    """Rows of rates.csv for run tables of tuning and grid: at each setting ACPG minus baseline in area, and of each arm
    the failed runs."""
    for env in part.tasks:
        for algo in part.algos:
            for value in part.values:
                row = {"part": part.name, "env": env, "algo": algo, "value": value}
                own = scores[(scores.env == env) & (scores.algo == algo)]
                known = own[own.norm_final.notna()]
                ((_, pair),) = paired_tasks(known, f"acpg.{value}", f"baseline.{value}").items()
                row |= {"seeds": len(pair[0])}
                row |= mean_over([[side.norm_auc.to_numpy(float) for side in pair]], resamples)
                for arm in part.names:
                    cell = known[known.arm == f"{arm}.{value}"]
                    row |= {f"{arm}_area": cell.norm_auc.mean(), f"{arm}_runs": len(cell)}
                    row |= {f"{arm}_failed": int((cell.norm_final < 0.5).sum())}
                yield row


def main():
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    parts, _, scores, *_ = tuned.read_all(args.out)
    rows = []
    for question, arm, against, names in tuned.COMPARISONS:
        tables = [scores[name]["tuned"] for name in names if "tuned" in scores[name]]
        if len(tables) == len(names) and "held out" not in question:
            rows += by_task(question, arm, against, tables)
    tuned.save_rows(args.out / "by_task.csv", rows)
    rng = np.random.default_rng(0)
    rows = [
        row
        for part in parts
        if "tuning" in scores[part.name] and not tuned.lacking(part, "tuning", scores[part.name])
        for row in choices(part, scores[part.name]["tuning"], rng)
    ]
    tuned.save_rows(args.out / "choice.csv", rows)
    rows, shifts, rng = [], [], np.random.default_rng(0)  # anew: the same, however many parts have been run
    for part in (part for part in parts if part.name in tuned.PPO):
        found = scores[part.name]
        if any(tuned.lacking(part, stage, found) for stage in ("tuning", "grid")):
            print(f"left out, as runs of its tuning or grid are lacking: the rates of {part.name}")
            continue
        rows += at_each_rate(part, pd.concat([found["tuning"], found["grid"]]))
        rates = np.array([float(value) for value in part.values])
        base, treated = study.grids_of(found["grid"], part, ["baseline", "acpg"])
        for k, env in enumerate(part.tasks):
            shifts += list(tuned.shift_rows(env, base[k][:-1], treated[k][:-1], rates[:-1], rng))[:2]
    tuned.save_rows(args.out / "rates.csv", rows)
    tuned.save_rows(args.out / "shift_without.csv", shifts)
    print(f"tables in {args.out}")


if __name__ == "__main__":
    main()
