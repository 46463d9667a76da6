"""How often the intervals of intervals.py hold the truth at ten values: the tables in docs/benchmark.md.

    python studies/interval_coverage.py
    python studies/interval_coverage.py --tasks 4 --trials 500 --resamples 500

Prints markdown, for means of samples and for the aggregates of whole sweeps; takes about an hour.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
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
    samples: int = 5000
    """samples of each distribution"""
    trials: int = 2000
    """sweeps of each kind"""
    resamples: int = 1000
    """bootstrap resamples"""


SAMPLES = {
    "normal": (lambda rng: rng.normal(size=10), 0.0),
    "gamma, shape 4": (lambda rng: rng.gamma(4.0, size=10), 4.0),
    "exponential minus normal": (lambda rng: rng.exponential(size=10) - rng.normal(size=10), 1.0),
    "lognormal, sigma 0.5": (lambda rng: rng.lognormal(0, 0.5, size=10), np.exp(0.125)),
    "exponential": (lambda rng: rng.exponential(size=10), 1.0),
    "lognormal, sigma 1": (lambda rng: rng.lognormal(0, 1.0, size=10), np.exp(0.5)),
}


def percentile(x, rng):
    return np.quantile(x[rng.integers(len(x), size=(1000, len(x)))].mean(1), [0.025, 0.975])


METHODS = {
    "studentised bootstrap": lambda x, rng: intervals.mean_interval(x, rng, resamples=1000),
    "t": lambda x, rng: stats.ttest_1samp(x, 0).confidence_interval(0.95),
    "percentile bootstrap": percentile,
}


def of_means(trials=5000):
    print(f"| distribution | {' | '.join(METHODS)} |\n|{'---|' * (1 + len(METHODS))}")
    for name, (draw, truth) in SAMPLES.items():
        rng, held = np.random.default_rng(0), np.zeros(len(METHODS))
        for _ in range(trials):
            x = draw(rng)
            for i, method in enumerate(METHODS.values()):
                low, high = method(x, rng)
                held[i] += low <= truth <= high
        print(f"| {name} | {' | '.join(f'{100 * share:.1f} %' for share in held / trials)} |", flush=True)


def scores(skewed, shape, arm, rng):
    """Synthetic normalised scores (..., seeds, tasks); with arm = 1 somewhat better and less spread. Skewed: a lower
    tail."""
    tasks = shape[-1]
    mean, spread = np.linspace(0.35, 0.95, tasks + 2)[1:-1], np.linspace(0.25, 0.05, tasks + 2)[1:-1]
    noise = (4 - rng.gamma(4.0, size=shape)) / 2 if skewed else rng.normal(size=shape)
    return mean + 0.05 * arm + (1 - 0.3 * arm) * spread * noise


def of_aggregates(tasks, skewed, level=0.95, trials=500, resamples=1000, rng=None):
    """(ours, percentile bootstrap): for each of intervals.AGGREGATES how often the interval of its difference held the
    truth.

    The truth is the measure's expectation at ten seeds.
    """
    rng = rng or np.random.default_rng(0)
    big = [scores(skewed, (20000, 10, tasks), arm, rng) for arm in (0, 1)]
    held = np.zeros((2, len(intervals.AGGREGATES)))
    for i, (_, _, statistic, _, _, kind) in enumerate(intervals.AGGREGATES):
        truth = np.mean(statistic(big[1])) - np.mean(statistic(big[0]))
        for _ in range(trials):
            pair = [scores(skewed, (10, tasks), arm, rng) for arm in (0, 1)]
            _, low, high = intervals.aggregate_difference(statistic, kind, *pair, rng, resamples, level)
            held[0, i] += low <= truth <= high
            draws = [statistic(x) for x in intervals.resampled(pair, rng, resamples)]
            low, high = np.quantile(draws[1] - draws[0], [(1 - level) / 2, (1 + level) / 2])
            held[1, i] += low <= truth <= high
    return held / trials


def main():
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    check_numbers(args, tasks=(1, 1000), samples=(2, 10**7), trials=(2, 10**7), resamples=(50, 10**6))
    of_means(args.samples)
    names = [row[1] for row in intervals.AGGREGATES]
    print(f"\n| tasks, scores | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}")
    for tasks in args.tasks:
        for skewed in (False, True):
            ours, plain = of_aggregates(tasks, skewed, trials=args.trials, resamples=args.resamples)
            cells = [f"{100 * a:.1f} % ({100 * b:.1f} %)" for a, b in zip(ours, plain, strict=True)]
            print(f"| {tasks}, {'gamma' if skewed else 'normal'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
