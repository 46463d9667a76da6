"""Write the tables of README.md, docs/ and results/*/README.md from CSVs, or check that they are what these say.

python studies/tables.py            # writes them between their <!-- table NAME --> and <!-- end -->
python studies/tables.py --check    # changes nothing; says which differ, and fails if any does
"""

import csv
import re
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
DOCUMENTS = [
    "README.md",
    *(str(x.relative_to(ROOT)) for x in sorted((*ROOT.glob("docs/*.md"), *RESULTS.glob("*/README.md")))),
]


@dataclass
class Args:
    check: bool = False
    """only compare"""


def read(path):
    with open(RESULTS / path, newline="") as file:
        return list(csv.DictReader(file))


def short(x, digits=3):
    """A number as tables have it: three digits behind the point where it is below one, without the zero before."""
    x = float(x)
    text = f"{x:.{digits}f}" if abs(x) < 1 else f"{x:.{digits}g}"
    if abs(float(text)) >= 1000:
        return f"{x:,.0f}"
    return re.sub(r"^(-?)0\.", r"\1.", text)


def between(row):
    return f"{short(row['difference'])} [{short(row['low'])}, {short(row['high'])}]"


def table(header, rows):
    return [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


METRICS_OF_COLLAPSE = ("alignment", "variability_quotient", "etf_error")


def emergence():
    """What the ideal environment says, means over seeds."""

    def means(cell, layer, folder="", prefix=""):
        path = Path("emergence") / folder / "emergence.csv"
        rows = [row for row in read(path) if (row["cell"], row["layer"]) == (cell, layer)]
        return [
            f"{statistics.fmean(float(row[prefix + metric]) for row in rows):.3g}" for metric in METRICS_OF_COLLAPSE
        ]

    rows = [
        ["labels permuted", *means("ideal", "learned", prefix="null_")],
        ["the paper's conditions, learned layer", *means("ideal", "learned")],
        ["the same, fixed ETF", *means("ideal", "etf")],
        ["and equal gaps: all wrong actions equally bad, learned layer", *means("equal gaps", "learned")],
        ["the same, fixed ETF", *means("equal gaps", "etf")],
        ["the same at scale 3, learned layer", *means("equal gaps", "learned", "scale_3")],
        ["the same, fixed ETF", *means("equal gaps", "etf", "scale_3")],
    ]
    header = ["AC1: alignment (at least .99)", "AC2: variability (at most .01)", "AC3: ETF error (at most .05)"]
    return table(["", *header], rows)


TAKEN_AWAY = {
    "unbalanced actions": ("balanced optimal actions", "changes next to nothing"),
    "on-policy states": ("uniform distribution of states", "changes next to nothing"),
    "tied optima": ("unique optima (tied states are not measured)", "changes little"),
    "entropy bonus": (
        "no entropy bonus",
        "destroys AC3: the policy must stay random among wrong actions, by their gaps",
    ),
    "no norm bound": ("norm bound", "AC1, AC2 better, AC3 worse"),
    "weight decay instead": ("norm bound, weight decay instead", "AC1, AC2 much better"),
    "half explored": ("full exploration (every other state never visited)", "destroys everything, optimality included"),
    "sampled gradient": ("exact gradient (64 samples a step)", "noise breaks AC1 and AC2"),
}


def conditions():
    """The ideal environment's conditions one at a time, learned layer, means over seeds."""
    rows = [row for row in read("emergence/emergence.csv") if row["layer"] == "learned"]
    lines = []
    for cell, (name, remark) in ({"ideal": ("none: the ideal cell", "")} | TAKEN_AWAY).items():
        own = [row for row in rows if row["cell"] == cell]
        means = [short(statistics.fmean(float(row[metric]) for row in own)) for metric in METRICS_OF_COLLAPSE]
        optimal = statistics.fmean(float(row["optimal"]) for row in own)
        lines.append([name, *means, f"{100 * optimal:.0f} %", remark])
    return table(["taken away", "AC1", "AC2", "AC3", "greedy action optimal", ""], lines)


def permuted():
    """The least and the largest of the cells' means, of what the metrics read with permuted labels."""
    groups = {}
    for row in read("emergence/emergence.csv"):
        groups.setdefault((row["cell"], row["layer"]), []).append(row)
    cells = []
    for metric in METRICS_OF_COLLAPSE:
        means = [statistics.fmean(float(row[f"null_{metric}"]) for row in rows) for rows in groups.values()]
        cells.append(f"{short(min(means), 2)} to {short(max(means), 2)}")
    return table(["", "AC1", "AC2", "AC3"], [["labels permuted", *cells]])


def mean_error(values):
    """Mean and standard error over seeds, of those that are defined."""
    values = [float(value) for value in values if value]
    if len(values) < 2:
        return f"{values[0]:.3g}" if values else "undefined"
    return f"{statistics.fmean(values):.3g} +- {statistics.stdev(values) / len(values) ** 0.5:.2g}"


def by_arm(study):
    """{arm: its rows} of a study of studies/learning.py."""
    rows = read(f"learning/{study}.csv")
    return {arm: [row for row in rows if row["arm"] == arm] for arm in dict.fromkeys(row["arm"] for row in rows)}


def learning(study):
    """What each arm of a study learned."""
    lines = []
    for arm, rows in by_arm(study).items():
        finals = [float(row["final"]) for row in rows]
        each = " ".join(f"{final:.0f}" for final in finals)
        errors = (mean_error([row[key] for row in rows]) for key in ("final", "auc"))
        lines.append([arm, f"{statistics.median(finals):.1f}", each, *errors])
    header = ["arm", "final return, median", "each seed", "mean +- standard error", "area under the curve"]
    return table(header, lines)


METRICS = ("nc1", "variability_quotient", "alignment", "etf_error", "mean_weight_cosine")


def kinds(metric):
    """The columns of a metric: only the ETF error has the untrained network's, as it may start lower than it ends."""
    return ("trained", "untrained", "null") if metric == "etf_error" else ("trained", "null")


def collapse(study):
    """The metrics of each arm's trained networks beside their nulls."""
    lines = []
    for arm, rows in by_arm(study).items():
        line = [arm, mean_error([row["trained_classes_present"] for row in rows])]
        for metric in METRICS:
            for kind in kinds(metric):
                known = rows
                if metric == "etf_error":  # two means are always an ETF
                    when = "untrained" if kind == "untrained" else "trained"
                    known = [row for row in rows if row[f"{when}_classes_present"] != "2"]
                line.append(mean_error([row[f"{kind}_{metric}"] for row in known]) if known else "void")
        lines.append(line)
    names = {"untrained": "untrained", "null": "null"}
    header = [names.get(kind, f"`{metric}`") for metric in METRICS for kind in kinds(metric)]
    return table(["arm", "classes", *header], lines)


def default():
    """What the choice of the default gave: each setting's best area on each task, their mean, and its failed runs."""
    rows = read("default/default/grid.csv")
    tasks, lines = list(dict.fromkeys(row["env"] for row in rows)), []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        best = [max((row for row in own if row["env"] == env), key=lambda row: float(row["area"])) for env in tasks]
        cells = [f"{short(row['area'])} ({row['value']})" for row in best]
        score = statistics.fmean(float(row["area"]) for row in best)
        failed = sum(int(row["failed"]) for row in own)
        lines.append([f"`{arm}`", *cells, short(score, 4), f"{failed} of {sum(int(row['seeds']) for row in own)}"])
    return table(["setting", *tasks, "score", "failed, at any rate"], lines)


def longer_runs():
    """The headline of docs/learning.md: what the scripts learn in longer runs, and ACPG minus baseline, +- its standard
    error, in the final return and in the area under the curve."""
    names = {"baseline": "baseline: median final return, mean +- standard error", "ACPG": "ACPG"}
    lines = []
    for algo in ("ppo", "a2c", "reinforce", "trpo"):
        arms = by_arm(f"report-{algo}")
        for task in dict.fromkeys(arm.rpartition(", ")[0] for arm in arms):
            cells, differences = [], []
            for measure in ("final", "auc"):
                both = [[float(row[measure]) for row in arms[f"{task}, {arm}"]] for arm in names]
                if measure == "final":
                    cells += [f"{statistics.median(own):.1f}, {mean_error(map(str, own))}" for own in both]
                error = sum(statistics.variance(own) / len(own) for own in both) ** 0.5
                differences.append(f"{statistics.fmean(both[1]) - statistics.fmean(both[0]):+.3g} +- {error:.2g}")
            lines.append([f"{algo.upper()}, {task}", *cells, *differences])
    return table(["algorithm, task", *names.values(), "difference, final", "difference, area"], lines)


def parity():
    lines = []
    for row in read("parity/parity.csv"):
        x = {key: float(row[key]) for key in ("ours", "ours_sd", "sb3", "sb3_sd", "difference", "low", "high")}
        setting = f"{row['env']}, {int(row['steps']):,}, {row['learning_rate']}"
        numbers = [f"{x[name]:.1f} (sd {x[name + '_sd']:.1f})" for name in ("ours", "sb3")]
        difference = f"{x['difference']:+.1f} [{x['low']:+.1f}, {x['high']:+.1f}]"
        lines.append([row["comparison"], setting, row["seeds"], row["measure"], *numbers, difference, row["margin"]])
        lines[-1].append(row["verdict"])
    header = ["algorithm", "environment, steps, lr", "seeds", "measure", "ours", "SB3", "difference, 95 %", "margin"]
    return table([*header, "verdict"], lines)


def throughput():
    """Speeds of the scripts, as ratios to Stable-Baselines3's in the same round: median, least and largest."""
    columns = {"ppo": "PPO, CartPole", "a2c": "A2C, CartPole", "minatar": "PPO, MinAtar's Breakout"}
    lines = {}
    for name in columns:
        rounds = read(f"throughput/{name}.csv")
        for program in rounds[0].keys() - {"round", "SB3"}:
            ratios = [float(row[program]) / float(row["SB3"]) for row in rounds]
            cell = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            lines.setdefault("*" + program[program.index("_") :], {})[name] = cell
    order = sorted(lines, key=lambda program: ("--compile" in program, "acpg" in program))
    return table(["", *columns.values()], [[f"`{x}`", *(lines[x][name] for name in columns)] for x in order])


def tuned_primary():
    """The tuned study's primary outcomes."""
    lines = []
    for row in read("tuned/primary.csv"):
        corrected = f"[{short(row['corrected_low'])}, {short(row['corrected_high'])}]"
        what = row["outcome"].removeprefix("acpg, ").partition(", tasks")[0]
        p = short(row["p_holm"]) if float(row["p_holm"]) >= 0.001 else "below .001"
        lines.append([what, tasks_of(row), short(row["difference"]), corrected, p, row["verdict"]])
    header = ["ACPG minus baseline, PPO", "tasks", "mean", "98.33 % interval", "p, Holm over three", "ACPG is"]
    return table(header, lines)


NAMES = {"auc": "area", "final": "final return", "fewer failures": "failure rate, decrease"}


def tasks_of(row):
    """The number of tasks, and on how many of them one of two settings is at the edge of its grid."""
    return row["tasks"] + (f" (*edge* {row['one_edge']})" if int(row["one_edge"]) else "")


def task_name(env):
    return env.rpartition(":")[2].rpartition("-v")[0]


def tuned_tasks(algos, path="tuned/tasks.csv", bold=True):
    """ACPG against its baseline on each task, each at its own setting, in area and final return; bold, where p after
    Holm is at most .05."""
    lines, rows = [], [row for row in read(path) if row["algo"] in algos]
    for i in range(0, len(rows), 2):
        settings = [
            rows[i][f"{arm}_at"] + " *edge*" * (rows[i][f"{arm}_edge"] == "True") for arm in ("baseline", "acpg")
        ]
        what = [task_name(rows[i]["env"]), *settings, rows[i]["seeds"]]
        what = what if len(algos) == 1 else [rows[i]["algo"].upper(), *what]
        for row in rows[i : i + 2]:
            sure = bold and float(row["p_holm"]) <= 0.05
            what.append(f"{short(row['baseline'])}, {short(row['acpg'])}")
            what.append(f"**{between(row)}**" if sure else between(row))
        what.append(f"{rows[i]['baseline_reached']}, {rows[i]['acpg_reached']}")
        lines.append(what)
    header = ["task", "baseline's setting", "ACPG's", "seeds", "area: baseline, ACPG", "difference, 95 %"]
    header += ["final return: baseline, ACPG", "difference, 95 %", "reached the threshold: baseline, ACPG"]
    return table(header if len(algos) == 1 else ["algorithm", *header], lines)


def tuned_all():
    """ACPG against its baseline on every task of every method, wins and losses, without the settings."""
    lines, rows = [], read("tuned/tasks.csv")
    for i in range(0, len(rows), 2):
        line = [rows[i]["algo"].upper(), task_name(rows[i]["env"])]
        for row in rows[i : i + 2]:
            sure = "**" if float(row["p_holm"]) <= 0.05 else ""
            line += [f"{short(row['baseline'])}, {short(row['acpg'])}", f"{sure}{between(row)}{sure}"]
        lines.append([*line, rows[i]["seeds"]])
    header = ["", "task", "area: baseline, ACPG", "difference, 95 %", "final return: baseline, ACPG"]
    return table([*header, "difference, 95 %", "seeds"], lines)


SCALES = ("scale .", "scale 2", "scale 10", "start of")
ABLATIONS = ("geometry in", "64 dimensions", *SCALES)  # questions asked at one rate


def tuned_comparisons():
    """What is told apart by which comparison, each arm at its own rate."""
    lines, before = [], None
    for row in read("tuned/comparisons.csv"):
        if row["question"].startswith(ABLATIONS):
            continue
        question = "" if row["question"] == before else f"{row['question']}: `{row['arm']}` against `{row['against']}`"
        numbers = [short(row["of_against"]), short(row["of_arm"]), between(row)]
        lines.append([question, tasks_of(row), NAMES[row["measure"]], *numbers, row["lead"]])
        before = row["question"]
    return table(["question", "tasks", "measure", "against", "arm", "difference, 95 %", "the arm is"], lines)


def tuned_ablations():
    """Geometry, scale and start at one rate for all: a line a comparison."""
    lines = {}
    for row in read("tuned/comparisons.csv"):
        if row["question"].startswith(ABLATIONS) and row["measure"] in ("auc", "final"):
            line = lines.setdefault(row["question"], [row["question"], f"`{row['arm']}` against `{row['against']}`"])
            line += [f"{short(row['of_against'])}, {short(row['of_arm'])}", f"{between(row)}, {row['lead']}"]
    header = ["", "arm", "area: against, arm", "difference, 95 %", "final return: against, arm", "difference, 95 %"]
    return table(header, list(lines.values()))


def tuned_scales():
    """The scales and starts of the features on each task, against the default."""
    lines, tasks = {}, {}
    for row in read("tuned/by_task.csv"):
        if row["question"].startswith(SCALES):
            key = row["question"], row["measure"]
            lines.setdefault(key, {})[task_name(row["env"])] = between(row)
            tasks[task_name(row["env"])] = None
    rows = [
        [question, NAMES[measure], *(cells[task] for task in tasks)] for (question, measure), cells in lines.items()
    ]
    return table(["", "measure", *tasks], rows)


def tuned_shift():
    """How far apart the curves of score against rate lie, and what is left."""
    lines = {}
    for row in read("tuned/shift.csv"):
        text = short(row["estimate"], 2)
        text += f" [{short(row['low'], 2)}, {short(row['high'], 2)}]" if row["low"] else ""  # a plateau has none
        text += "" if row["identified"] == "True" else ", not identified"
        lines.setdefault(task_name(row["task"]), {})[row["measure"]] = text
    measures = {"shift, decades": "shift, decades", "left after it": "left after it"}
    measures["best rate of each task"] = "difference at each one's best rate"
    measures["plateau, decades"] = "difference of plateaus, decades"
    rows = [[task, *(row[measure] for measure in measures)] for task, row in lines.items()]
    return table(["task", *measures.values()], rows)


def tuned_shift_without():
    """The shifts without the highest rate."""
    lines = {}
    for row in read("tuned/shift_without.csv"):
        text = f"{short(row['estimate'], 2)} [{short(row['low'], 2)}, {short(row['high'], 2)}]"
        lines.setdefault(task_name(row["task"]), []).append(text + ", not identified" * (row["identified"] != "True"))
    header = ["task", "shift without the highest rate, decades", "left after it"]
    return table(header, [[task, *cells] for task, cells in lines.items()])


def tuned_by_task():
    """PPO's comparisons on each task, in area and final return."""
    pairs = [
        ("acpg", "learned"),
        ("scaled", "normalised"),
        ("acpg", "random"),
        ("scaled", "acpg"),
        ("learned", "baseline"),
    ]
    lines = {}
    for row in read("tuned/by_task.csv"):
        if (row["arm"], row["against"]) in pairs:
            key = task_name(row["env"]), row["measure"]
            lines.setdefault(key, {})[row["arm"], row["against"]] = between(row)
    rows = [[task, NAMES[measure], *(lines[task, measure][pair] for pair in pairs)] for task, measure in sorted(lines)]
    return table(["task", "measure", *(f"`{arm}` minus `{against}`" for arm, against in pairs)], rows)


def tuned_rest():
    """ACPG minus baseline with PPO over all tasks but one."""
    lines = {}
    for row in read("tuned/by_task.csv"):
        if row["question"] == "all of it":
            numbers = {key: row[f"rest_{key}"] for key in ("difference", "low", "high")}
            lines.setdefault(task_name(row["env"]), []).append(between(numbers))
    return table(["left out", "area", "final return"], [[task, *cells] for task, cells in lines.items()])


def tuned_choice():
    """How close the choice of each setting was, for PPO's baseline and ACPG."""
    lines = {}
    for row in read("tuned/choice.csv"):
        if row["algo"] == "ppo" and row["arm"] in ("baseline", "acpg"):
            cells = lines.setdefault(task_name(row["env"]), [])
            for kind in ("chosen", "second"):
                cells.append(f"{row[kind]}: {short(row[kind + '_area'])}, {100 * float(row[kind + '_share']):.0f} %")
    header = ["task", "baseline's: area, share of resamples", "second best", "ACPG's", "second best"]
    return table(header, [[task, *cells] for task, cells in lines.items()])


def tuned_rates():
    """ACPG minus baseline in area at each rate."""
    lines, rates = {}, {}
    for row in read("tuned/rates.csv"):
        lines.setdefault(task_name(row["env"]), []).append(between(row))
        rates[row["value"]] = None
    return table(["task", *rates], [[task, *cells] for task, cells in lines.items()])


def tuned_failures():
    """Runs of each arm that failed at the highest rate."""
    rows = read("tuned/rates.csv")
    rows = [row for row in rows if row["value"] == max((row["value"] for row in rows), key=float)]
    arms = [key.removesuffix("_failed") for key in rows[0] if key.endswith("_failed")]
    lines = [
        [task_name(row["env"]), *(f"{row[f'{arm}_failed']} of {row[f'{arm}_runs']}" for arm in arms)] for row in rows
    ]
    return table(["task", *(f"`{arm}`" for arm in arms)], lines)


MORE_COLLAPSE = {"alignment": ("AC1: alignment", 1), "variability_quotient": ("AC2: variability", -1)}
MORE_COLLAPSE |= {"etf_error": ("AC3: ETF error", -1), "all three": ("all three", None)}


def tuned_collapse():
    """Collapse beside reward: over the arms on their tasks, rank correlations of how far a run has collapsed with its
    final return."""
    lines, rows = [], read("tuned/collapse.csv")
    for metric, (name, sign) in MORE_COLLAPSE.items():
        own = [row for row in rows if row["metric"] == metric]
        line = [name, f"{sum(int(row['met']) for row in own):,} of {sum(int(row['runs']) for row in own):,}"]
        for column in [] if sign is None else ("correlation", "at_equal_area"):
            values = [sign * float(row[column]) for row in own if row[column]]
            quarters = statistics.quantiles(values, n=4, method="inclusive")
            line += [f"{sum(value > 0 for value in values)} of {len(values)}", short(quarters[1], 2)]
            line[-1] += f" [{short(quarters[0], 2)}, {short(quarters[2], 2)}]"
        lines.append([*line, *[""] * (6 - len(line))])
    header = ["", "runs that meet it", "more with more reward: arms on a task", "correlation, median [quartiles]"]
    return table([*header, "at equal area", "correlation, median [quartiles]"], lines)


NEARER = {metric: MORE_COLLAPSE[metric] for metric in METRICS_OF_COLLAPSE}
NEARER |= {"mean_weight_cosine": ("AC3: cosine of means and weights", 1)}


def tuned_nearer():
    """Whether ACPG's trained policies are nearer to collapse than the baseline's: medians over the tasks of all methods
    of the arms' means, on how many tasks ACPG's is the nearer one, and where the arms' 95 % intervals are apart."""
    rows = [
        row for path in sorted((RESULTS / "tuned").glob("*/reports/tuned/report/collapse.csv")) for row in read(path)
    ]
    lines = []
    for metric, (name, sign) in NEARER.items():
        tasks = {}
        for row in rows:
            if row["metric"] == metric and row["void"] == "False" and row["trained"]:
                values = sorted(sign * float(row[key]) for key in ("low", "high"))
                tasks.setdefault((row["algo"], row["env"]), {})[row["arm"]] = (float(row["trained"]), *values)
        pairs = [(arms["baseline"], arms["acpg"]) for arms in tasks.values() if {"baseline", "acpg"} <= arms.keys()]
        medians = [short(statistics.median(pair[k][0] for pair in pairs)) for k in (0, 1)]
        nearer = sum(sign * acpg[0] > sign * base[0] for base, acpg in pairs)
        apart = [sum(one[1] > other[2] for one, other in order) for order in ([p[::-1] for p in pairs], pairs)]
        lines.append([name, ", ".join(medians), f"{nearer} of {len(pairs)}", *map(str, apart)])
    header = ["", "median over tasks: baseline, ACPG", "ACPG is nearer to collapse", "beyond the intervals"]
    return table([*header, "baseline is, beyond them"], lines)


TABLES = {
    "emergence": emergence,
    "parity": parity,
    "default": default,
    "longer runs": longer_runs,
    "throughput": throughput,
    "conditions": conditions,
    "permuted": permuted,
}
TABLES |= {"tuned primary": tuned_primary, "tuned PPO": partial(tuned_tasks, ["ppo"])}
TABLES |= {"tuned tasks": tuned_all, "tuned ablations": tuned_ablations, "tuned scales": tuned_scales}
TABLES |= {"tuned others": partial(tuned_tasks, ["a2c", "reinforce", "trpo"])}
TABLES |= {"tuned common": partial(tuned_tasks, ["ppo", "a2c", "reinforce", "trpo"], "tuned/common.csv", bold=False)}
TABLES |= {"tuned comparisons": tuned_comparisons, "tuned shift": tuned_shift, "tuned collapse": tuned_collapse}
TABLES |= {"tuned shift without": tuned_shift_without, "tuned by task": tuned_by_task, "tuned rest": tuned_rest}
TABLES |= {"tuned choice": tuned_choice, "tuned rates": tuned_rates, "tuned failures": tuned_failures}
TABLES |= {"tuned nearer": tuned_nearer}
STUDIES = [f"report-{algo}" for algo in ("ppo", "a2c", "reinforce", "trpo")]
STUDIES += ["minatar", "large-actions", "tune-ppo", "tune-a2c", "tune-reinforce", "tune-minatar"]
TABLES |= {f"learning {study}": partial(learning, study) for study in STUDIES}
TABLES |= {f"collapse {study}": partial(collapse, study) for study in STUDIES}
PLACE = re.compile(r"<!-- table (.+?) -->\n(.*?)\n?<!-- end -->", re.DOTALL)


def fill(text):
    """The text with its tables as the CSVs have them. Raises LookupError for a name that is none of TABLES, or where a
    mark of a table is none."""

    def one(place):
        if place[1] not in TABLES:
            raise LookupError(f"a table {place[1]!r}; there are {', '.join(TABLES)}")
        return "\n".join([f"<!-- table {place[1]} -->", "", *TABLES[place[1]](), "", "<!-- end -->"])

    filled = PLACE.sub(one, text)
    if filled.count("<!--") != 2 * len(PLACE.findall(filled)):
        raise LookupError("a mark that is neither <!-- table NAME --> nor its <!-- end -->")
    return filled


def main():
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    different = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        try:
            filled = fill(text)
        except KeyError as error:
            sys.exit(f"error: a CSV for {name} lacks {error}; run its study again")
        except LookupError as error:
            sys.exit(f"error: {name} has {error}")
        except FileNotFoundError as error:
            sys.exit(f"error: {name} has a table of {error.filename}, which is not there; run its study")
        if filled != text:
            different.append(name)
            if not args.check:
                (ROOT / name).write_text(filled)
                print(f"{name} written")
    if args.check and different:
        sys.exit(f"error: tables of {', '.join(different)} differ from the CSVs; run python studies/tables.py")


if __name__ == "__main__":
    main()
