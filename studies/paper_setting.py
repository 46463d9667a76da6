"""The paper's own setting, so far as it is known, beside its figures: REINFORCE, PPO and TRPO, baseline and ACPG.

    python studies/paper_setting.py                           # all parts, some core-hours, to results/paper_setting
    python studies/paper_setting.py --parts reinforce-1e-3    # one part
    python studies/paper_setting.py --report-only             # tables and figures of what has been run

Resumable: a stop loses the runs in flight. Finished runs are packed; a run's epochs stand in its part's epochs.csv.
results/paper_setting/README.md has the protocol, what the sources leave open, and the outcome.
"""

import csv
import math
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from evaluate import check_numbers  # noqa: E402
from intervals import improvement, mean_interval  # noqa: E402
from reading import PACKED, RETURN, STEP, Damaged, finished_record, read_packed, read_run  # noqa: E402
from sweep import CORES, digest  # noqa: E402

# The frame directly on ReLU features, which start as there
PAPER = "paper=acpg:--feature-constraint=relu --feature-gain=1.4142135"
START = "start=baseline:--head-gain=1.4142135"  # the same gain on every layer, the last one too
COLLECT = 8  # episodes to an update of REINFORCE
EPOCH = {"reinforce": 40_000, "ppo": 10_000, "trpo": 10_000}  # steps
# Of one kind with all arms: the source's hyperparameters in the scripts' flags
FLAGS = {
    "reinforce": f"--gamma .95 --num-envs {COLLECT} --update-epochs 2 --minibatch-size 64 --ent-coef 0"
    " --max-grad-norm 1e9 --diagnostics-interval 100",
    "ppo": "--num-envs 10 --num-steps 100 --clip-coef .1 --log-interval 10 --diagnostics-interval 50",
    "trpo": "--num-envs 10 --num-steps 100 --num-minibatches 4 --ent-coef .01 --log-interval 10"
    " --diagnostics-interval 50",
}


@dataclass(frozen=True)
class Part:
    algo: str
    rate: str
    epochs: int
    seeds: int
    envs: tuple = ("CartPole-v1", "LunarLander-v3")
    arms: tuple = ("baseline=baseline:--head-gain=0.01", PAPER, "acpg")  # PPO's gain was that
    flags: str = ""

    @property
    def control(self):
        """The name of the arm that the others are compared with."""
        return self.arms[0].partition("=")[0]

    @property
    def extra(self):
        return f"{FLAGS[self.algo]} {self.flags} --activation relu --learning-rate {self.rate}".replace("  ", " ")


CARTPOLES = {"envs": ("CartPole-v0", "CartPole-v1"), "arms": (START, PAPER, "acpg")}
BATCH = "--norm-returns --no-running-baseline"
PARTS = {
    "reinforce-1e-3": Part("reinforce", "1e-3", 10, 20, **CARTPOLES),
    "reinforce-1e-4": Part("reinforce", "1e-4", 30, 20, **CARTPOLES),
    "ppo-8e-5": Part("ppo", "8e-5", 20, 10),
    "ppo-2.5e-4": Part("ppo", "2.5e-4", 20, 10),
    "ppo-8e-4": Part("ppo", "8e-4", 20, 10),
    "trpo": Part("trpo", "1e-3", 20, 10),
    "batch-1e-3": Part("reinforce", "1e-3", 10, 5, flags=BATCH, **CARTPOLES),
    "batch-1e-4": Part("reinforce", "1e-4", 30, 5, flags=BATCH, **CARTPOLES),
    "reinforce-1e-5": Part("reinforce", "1e-5", 100, 5, **CARTPOLES),
}
GROUPS = {  # parts that differ in the learning rate alone
    "REINFORCE": [name for name in PARTS if name.startswith("reinforce")],
    "PPO": [name for name in PARTS if name.startswith("ppo")],
    "TRPO": ["trpo"],
    "REINFORCE, returns standardised within a batch": [name for name in PARTS if name.startswith("batch")],
}
LEVEL = 0.975  # of the primary comparisons, of which there are two
THRESHOLDS = {"CartPole-v0": 195, "CartPole-v1": 475, "LunarLander-v3": 200}
REPORTED = {"REINFORCE": "REINFORCE on CartPole, MLP, best of three rates: stop 33 -> 20, best 500 and 500"}


@dataclass
class Args:
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    """which runs"""
    seeds: list[int] | None = None
    """their seeds; default: the part's own, from 1 on"""
    jobs: int = CORES
    """runs at a time"""
    out: Path = ROOT / "results" / "paper_setting"
    """folder of everything"""
    report_only: bool = False
    """run nothing"""


def fail(message):
    sys.exit(f"error: {message}")


# Runs and their epochs


def epochs_of(curves, algo):
    """(mean, last) of each whole epoch of a run: the mean return of its episodes, and that of its last ten.

    An epoch ends with the first update at which its steps reach EPOCH. Of REINFORCE, whose entries are of COLLECT
    episodes each, only the steps of these episodes count, and the last ten are the last entry's and, for what is
    missing, its forerunner's mean. Of the others, which log an epoch as one entry, the epoch's mean stands for both.
    """
    known = np.isfinite(curves[RETURN])
    returns, steps = curves[RETURN][known], np.diff(curves[STEP][known], prepend=0)
    if algo == "reinforce":
        steps = COLLECT * curves["charts/episodic_length"][known]
    rows, begin, taken = [], 0, 0.0
    for i, step in enumerate(steps):
        taken += step
        if taken >= EPOCH[algo]:
            mean = last = returns[begin : i + 1].mean()
            if algo == "reinforce":
                last = (COLLECT * returns[i] + (10 - COLLECT) * returns[max(i - 1, 0)]) / 10
            rows.append((mean, last))
            begin, taken = i + 1, 0.0
    return rows


def read_epochs(folder):
    """{run's name: (mean, last) of its epochs} of a part's epochs.csv."""
    table = defaultdict(list)
    if (path := folder / "epochs.csv").exists():
        with open(path) as file:
            for row in csv.DictReader(file):
                table[row["run"]].append((float(row["mean"]), float(row["last"])))
    return dict(table)


def run(name, args):
    """Run what is missing of a part, then write its epochs.csv and pack it. Returns the sweep's exit status."""
    part, folder = PARTS[name], args.out / name
    for packed in read_packed(folder / PACKED).values():
        base = "baseline" if packed.record["args"]["exp_name"].endswith(("baseline", "start")) else "acpg"
        if packed.record["script_sha256"] != digest(f"{part.algo}_{base}.py"):
            fail(f"--out {args.out} holds runs of another version of the scripts; read them with --report-only")
    seeds = args.seeds or range(1, part.seeds + 1)
    command = ["--algos", part.algo, "--envs", *part.envs, "--arms", *part.arms, "--seeds", *map(str, seeds)]
    command += ["--total-timesteps", str(part.epochs * EPOCH[part.algo]), f"--extra={part.extra}"]
    command += ["--jobs", str(args.jobs), f"--out={folder}", "--runs-only"]
    status = 1
    try:
        status = subprocess.run(
            [sys.executable, str(ROOT / "benchmark" / "sweep.py"), *command], check=False
        ).returncode
    except KeyboardInterrupt:  # the sweep hears it too, and ends by itself
        status = 130
    done = [path for path in sorted((folder / "runs").glob("*")) if finished_record(path)]
    if done:
        table = read_epochs(folder) | {path.name: epochs_of(read_run(path).curves, part.algo) for path in done}
        lines = ["run,epoch,mean,last"]
        for run_name, rows in sorted(table.items()):
            lines += [f"{run_name},{i},{mean:.6g},{last:.6g}" for i, (mean, last) in enumerate(rows, start=1)]
        (folder / "epochs.csv.tmp").write_text("\n".join(lines) + "\n")
        (folder / "epochs.csv.tmp").replace(folder / "epochs.csv")
        pack = [sys.executable, str(ROOT / "benchmark" / "pack.py"), str(folder), "--remove"]
        status = subprocess.run(pack, check=False).returncode or status
    return status


def load(name, out):
    """{(env, arm): {seed: run}} of a part's packed runs, each with its epochs, all of an environment's equally many."""
    part, folder, cells = PARTS[name], out / name, defaultdict(dict)
    table = read_epochs(folder)
    for run_name, packed in read_packed(folder / PACKED).items():
        own = packed.record["args"]
        if run_name not in table:
            raise Damaged(folder / "epochs.csv", f"lacks {run_name}")
        arm = own["exp_name"].partition("_")[2]
        cells[own["env_id"], arm][own["seed"]] = Result(packed, table[run_name], THRESHOLDS[own["env_id"]])
    for env_id in part.envs:
        group = [result for (env, _), results in cells.items() if env == env_id for result in results.values()]
        for result in group:
            result.cut(min(len(other.epochs) for other in group))
    return {key: cells[key] for env in part.envs for arm in arms_of(part) if (key := (env, arm)) in cells}


def arms_of(part):
    return [arm.partition("=")[0] for arm in part.arms]


@dataclass
class Result:
    """A run: what it was, the (mean, last) of its epochs, and what counts as solved."""

    packed: object
    epochs: list
    threshold: float

    def cut(self, count):
        """Keep the first epochs: runs that drop fewer steps have more."""
        self.epochs = self.epochs[:count]

    @property
    def stop(self):
        """The first epoch whose last ten episodes reach the threshold, infinity if none does."""
        return next((i for i, (_, last) in enumerate(self.epochs, start=1) if last >= self.threshold), math.inf)

    @property
    def best(self):
        return max(mean for mean, _ in self.epochs)

    @property
    def final(self):
        return self.epochs[-1][0]

    def collapse(self, tag):
        """A tag of the trained network, NaN where it is undefined, as with one greedy action alone."""
        return self.packed.curves[tag][-1] if tag in self.packed.curves else math.nan


# Tables


def median_stop(results):
    """The median stop of some runs, infinity if half of them never did."""
    return statistics.median_low([result.stop for result in results.values()])


def with_interval(values, level=0.95):
    low, high = mean_interval(values, np.random.default_rng(0), level)
    return f"{np.mean(values):.1f} [{low:.1f}, {high:.1f}]"


def cells_of(results, control, level=0.95):
    """The table's cells for the runs of one arm, and, unless it is the control, against the control's."""
    stops = [result.stop for result in results.values()]
    median = median_stop(results)
    cells = [f"{'never' if math.isinf(median) else median} ({sum(map(math.isfinite, stops))} of {len(stops)})"]
    cells += [with_interval([getattr(result, what) for result in results.values()]) for what in ("best", "final")]
    common = sorted(results.keys() & control.keys())
    if results is control or len(common) < 2:
        return [*cells, "", ""]
    pairs = [(control[seed], results[seed]) for seed in common]
    earlier = np.array([float(np.sign(min(a.stop, 1e9) - min(b.stop, 1e9))) for a, b in pairs])
    cells.append("{:.2f} [{:.2f}, {:.2f}]".format(*improvement(earlier, level)))
    return [*cells, with_interval([b.final - a.final for a, b in pairs], level)]


def best_rate(parts, key):
    """The part in which an arm stops soonest on the median seed; of equals the one that is best at its best."""
    order = lambda name: (median_stop(parts[name][key]), -np.mean([r.best for r in parts[name][key].values()]))  # noqa: E731
    return min((name for name in parts if key in parts[name]), key=order)


def tables(title, parts):
    """Markdown of one algorithm: each rate, the best rate of each arm, and collapse. `parts`: what `load` returns."""
    first = PARTS[next(iter(parts))]
    lines = [f"## {title}", "", "| environment | learning rate | epochs | arm | stop: median (reached it)"]
    lines[-1] += f" | best | final | P(earlier than {first.control}) | final, difference to {first.control} |"
    lines.append("|---" * 9 + "|")
    for env in first.envs:
        for name, cells in parts.items():
            for arm in arms_of(first):
                if (results := cells.get((env, arm))) and (control := cells.get((env, first.control))):
                    count = len(next(iter(results.values())).epochs)
                    row = [env, PARTS[name].rate, str(count), arm, *cells_of(results, control)]
                    lines.append(f"| {' | '.join(row)} |")
        if len(parts) > 1:
            for arm in arms_of(first):
                if any((env, arm) in cells for cells in parts.values()):
                    name, against = best_rate(parts, (env, arm)), best_rate(parts, (env, first.control))
                    control, results = parts[against][env, first.control], parts[name][env, arm]
                    row = [env, f"**best: {PARTS[name].rate}**", "", arm, *cells_of(results, control, LEVEL)]
                    lines.append(f"| {' | '.join(row)} |")
    if title in REPORTED:
        lines += ["", f"The paper, second-hand: {REPORTED[title]}."]
    lines += ["", "| environment | learning rate | arm | AC1 alignment | null | AC2 variability quotient | null "]
    lines[-1] += "| runs with two classes or more |"
    lines.append("|---" * 8 + "|")
    for env in first.envs:
        for name, cells in parts.items():
            for arm in arms_of(first):
                if results := cells.get((env, arm)):
                    row = [env, PARTS[name].rate, arm]
                    for metric in ("alignment", "variability_quotient"):
                        for group in ("collapse", "collapse_null"):
                            values = np.array([r.collapse(f"{group}/{metric}") for r in results.values()])
                            row.append(f"{np.nanmedian(values):.3g}" if np.isfinite(values).any() else "undefined")
                    classes = [r.collapse("collapse/classes_present") for r in results.values()]
                    row.append(f"{sum(count >= 2 for count in classes)} of {len(classes)}")
                    lines.append(f"| {' | '.join(row)} |")
    return lines


def draw(parts, path):
    """The epochs' mean returns: a row an environment, a column a learning rate, a colour an arm."""
    from plots import band, colours_of, plt, save, style

    first = PARTS[next(iter(parts))]
    style()
    colours = colours_of(arms_of(first))
    size = (1 + 3.2 * len(parts), 0.8 + 2.6 * len(first.envs))
    figure, grid = plt.subplots(len(first.envs), len(parts), figsize=size, squeeze=False, layout="constrained")
    for column, (name, cells) in enumerate(parts.items()):
        for axes, env in zip(grid[:, column], first.envs, strict=True):
            for arm in arms_of(first):
                if len(results := cells.get((env, arm), {})) > 1:
                    curves = np.array([[mean for mean, _ in result.epochs] for result in results.values()])
                    band(axes, np.arange(1, curves.shape[1] + 1), curves, colours[arm], arm)
            axes.axhline(THRESHOLDS[env], color="grey", linestyle=":")
            axes.set(title=f"{env}, {PARTS[name].rate}", xlabel="epoch", ylabel="mean return")
    save(figure, path)


def report(out):
    """Write report.md and the figures of what has been run."""
    lines = ["# The paper's setting: tables", "", "Written by `python studies/paper_setting.py --report-only`;"]
    lines[-1] += " README.md beside this file says what they mean."
    commits, figures = set(), {}
    for title, names in GROUPS.items():
        if parts := {name: cells for name in names if (cells := load(name, out))}:
            figure = f"{title.partition(',')[0].lower()}{'_batch' * title.count(',')}.png"
            lines += ["", *tables(title, parts), "", f"![mean return by epoch]({figure})"]
            figures[figure] = parts
            runs = [r for cells in parts.values() for results in cells.values() for r in results.values()]
            commits |= {r.packed.record["versions"].get("git_commit") or "unknown" for r in runs}
    if not figures:
        fail(f"--out {out} holds no finished run; drop --report-only")
    lines += ["", f"Commits of the scripts: {', '.join(sorted(commits))}."]
    (out / "report.md").write_text("\n".join(lines) + "\n")
    for figure, parts in figures.items():
        draw(parts, out / figure)
    print(f"written to {out}")


def main():
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    if unknown := set(args.parts) - set(PARTS):
        fail(f"--parts {', '.join(sorted(unknown))}: unknown; choose from {', '.join(PARTS)}")
    if not args.parts:
        fail("--parts needs at least one value")
    check_numbers(args, seeds=(0, 2**32 - 1), jobs=(1, 10**4))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name in [] if args.report_only else args.parts:
            if status := run(name, args):
                sys.exit(status)
        report(args.out)
    except Damaged as error:
        fail(f"{error}; remove or restore it")
    except OSError as error:
        fail(f"--out {args.out} cannot be written: {error}")


if __name__ == "__main__":
    main()
