"""How often the intervals of report.py hold the truth at ten values: the table in docs/benchmark.md.

python tests/interval_coverage.py
"""

import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import report  # noqa: E402

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
    "studentised bootstrap": lambda x, rng: report.mean_interval(x, rng, resamples=1000),
    "t": lambda x, rng: stats.ttest_1samp(x, 0).confidence_interval(0.95),
    "percentile bootstrap": percentile,
}


def main(trials=5000):
    print(f"| distribution | {' | '.join(METHODS)} |\n|{'---|' * (1 + len(METHODS))}")
    for name, (draw, truth) in SAMPLES.items():
        rng, held = np.random.default_rng(0), np.zeros(len(METHODS))
        for _ in range(trials):
            x = draw(rng)
            for i, method in enumerate(METHODS.values()):
                low, high = method(x, rng)
                held[i] += low <= truth <= high
        print(f"| {name} | {' | '.join(f'{100 * share:.1f} %' for share in held / trials)} |", flush=True)


if __name__ == "__main__":
    main()
