"""How often the intervals of benchmark/intervals.py hold the truth at ten values, or as many as verdicts begin with:
results/coverage.

    python studies/interval_coverage.py
    python studies/interval_coverage.py --seeds 5 --tasks 1 4 --trials 400
    python studies/interval_coverage.py --tasks 4 --trials 500 --resamples 500

For means of samples and for the measures of whole sweeps; takes about an hour.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
import intervals  # noqa: E402
from evaluate import check_numbers  # noqa: E402


@dataclass
class Args:
    tasks: list[int] = field(default_factory=lambda: [1, 4, 12])
    """numbers of tasks in the sweeps"""
    seeds: int = 10
    """seeds of a task"""
    samples: int = 5000
    """samples of each distribution"""
    trials: int = 2000
    """sweeps of each kind"""
    resamples: int = 1000
    """bootstrap resamples"""
    out: Path = ROOT / "results" / "coverage"
    """folder of coverage.md, or coverage_N.md for N seeds instead of ten"""


SAMPLES = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "gamma, shape 4": (lambda rng, n: rng.gamma(4.0, size=n), 4.0),
    "exponential minus normal": (lambda rng, n: rng.exponential(size=n) - rng.normal(size=n), 1.0),
    "lognormal, sigma 0.5": (lambda rng, n: rng.lognormal(0, 0.5, size=n), np.exp(0.125)),
    "exponential": (lambda rng, n: rng.exponential(size=n), 1.0),
    "lognormal, sigma 1": (lambda rng, n: rng.lognormal(0, 1.0, size=n), np.exp(0.5)),
}


def percentile(x, rng):
    return np.quantile(x[rng.integers(len(x), size=(1000, len(x)))].mean(1), [0.025, 0.975])


METHODS = {
    "studentised bootstrap": lambda x, rng: intervals.mean_interval(x, rng, resamples=1000),
    "t": lambda x, rng: stats.ttest_1samp(x, 0).confidence_interval(0.95),
    "percentile bootstrap": percentile,
}


def of_means(trials=5000, seeds=10):
    """Lines of a table: how often nominal 95 % intervals of a mean of so many values held it."""
    yield f"| distribution | {' | '.join(METHODS)} |"
    yield f"|{'---|' * (1 + len(METHODS))}"
    for name, (draw, truth) in SAMPLES.items():
        rng, held = np.random.default_rng(0), np.zeros(len(METHODS))
        for _ in range(trials):
            x = draw(rng, seeds)
            for i, method in enumerate(METHODS.values()):
                low, high = method(x, rng)
                held[i] += low <= truth <= high
        yield f"| {name} | {' | '.join(f'{100 * share:.1f} %' for share in held / trials)} |"


def scores(skewed, shape, arm, rng):
    """Synthetic normalised scores (..., seeds, tasks); with arm = 1 somewhat better and less spread. Skewed: a lower
    tail."""
    tasks = shape[-1]
    mean, spread = np.linspace(0.35, 0.95, tasks + 2)[1:-1], np.linspace(0.25, 0.05, tasks + 2)[1:-1]
    noise = (4 - rng.gamma(4.0, size=shape)) / 2 if skewed else rng.normal(size=shape)
    return mean + 0.05 * arm + (1 - 0.3 * arm) * spread * noise


def committed(folder):
    """Pairs of the tuned study, baseline and ACPG: normalised final returns (seeds, 2) of each task, tasks in order of
    their names."""
    files = sorted(folder.glob("*/reports/tuned/report/runs.csv"))
    if not files:
        sys.exit(f"error: {folder} has no reports; run bash benchmark.sh --study benchmark/tuned.toml")
    runs = pd.concat([pd.read_csv(file) for file in files])
    groups = runs[runs.arm.isin(["baseline", "acpg"])].groupby(["env", "algo"])
    tables = [group.pivot(index="seed", columns="arm", values="norm_final") for _, group in groups]
    return [table[["baseline", "acpg"]].dropna().to_numpy() for table in tables if table.shape[1] == 2]


def sweeps(kind, tasks, rng, seeds=10):
    """Draws the scores of a sweep, two lists of arrays (seeds,), one for each task: synthetic ones of arms that differ
    in mean and spread, or of `runs`, pairs of those that are committed. `unequal`: normal ones of five seeds of the
    first task, which varies the most, and twenty of the others."""
    if kind == "runs":
        populations = committed(ROOT / "results" / "tuned")[:tasks]

        def draw():
            chosen = [x[rng.integers(len(x), size=seeds)] for x in populations]
            return [x[:, 0] for x in chosen], [x[:, 1] for x in chosen]

        return draw
    if kind == "unequal":
        sizes = [5, *[20] * (tasks - 1)]

        def draw_unequal():
            arms = [scores(False, (20, tasks), arm, rng) for arm in (0, 1)]
            return [[x[:n, k] for k, n in enumerate(sizes)] for x in arms]

        return draw_unequal
    return lambda: [list(scores(kind == "gamma", (seeds, tasks), arm, rng).T) for arm in (0, 1)]


def of_aggregates(tasks, kind, level=0.95, trials=500, resamples=1000, rng=None, seeds=10):
    """For each measure of intervals.FAMILY, and each exploratory one, how often the interval of its difference held
    the truth: the measure's expectation at so many seeds."""
    rng = rng or np.random.default_rng(0)
    draw, measures = sweeps(kind, tasks, rng, seeds), [row[3] for row in (*intervals.FAMILY, *intervals.EXPLORATORY)]
    held = np.zeros(len(measures))
    for i, measure in enumerate(measures):
        truth = np.mean([intervals.aggregate(measure, *draw(), rng, 2)[0] for _ in range(3000)])
        for _ in range(trials):
            _, low, high = intervals.aggregate(measure, *draw(), rng, resamples, level)
            held[i] += low <= truth <= high
    return held / trials


def of_measures(args):
    """Lines of a table: how often the intervals of the report's measures held their expectation."""
    names = [row[1] for row in (*intervals.FAMILY, *intervals.EXPLORATORY)]
    yield f"| tasks, scores, level | {' | '.join(names)} |"
    yield f"|{'---|' * (1 + len(names))}"
    for tasks in args.tasks:
        for kind in ("normal", "gamma", "runs", *["unequal"] * (tasks > 1 and args.seeds == 10)):
            for level in (0.95, 1 - 0.05 / len(intervals.FAMILY)):
                held = of_aggregates(tasks, kind, level, args.trials, args.resamples, seeds=args.seeds)
                what = f"{tasks}, {kind}, {100 * level:.4g} %"
                yield f"| {what} | {' | '.join(f'{100 * share:.1f} %' for share in held)} |"


def main():
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    check_numbers(args, tasks=(1, 1000), seeds=(4, 1000), samples=(2, 10**7), trials=(2, 10**7), resamples=(50, 10**6))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: --out {args.out} cannot be written: {error.strerror}; choose another")
    lines = [
        f"# How often the intervals hold the truth at {args.seeds} seeds",
        "",
        f"Written by `python studies/interval_coverage.py --seeds {args.seeds} "
        f"--tasks {' '.join(map(str, args.tasks))} --trials {args.trials}`, of {args.samples} samples and "
        f"{args.trials} sweeps a row. Unequal, if there: five seeds of one task, twenty of the others.",
        f"The mean of {args.seeds} values, nominal 95 %:",
        "",
    ]
    for part in (of_means(args.samples, args.seeds), ["", "Measures of the report:", ""], of_measures(args)):
        for line in part:
            print(line, flush=True)
            lines.append(line)
    name = "coverage.md" if args.seeds == 10 else f"coverage_{args.seeds}.md"
    (args.out / name).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
