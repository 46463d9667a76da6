"""What a sweep leaves behind, read with mistrust: run.json, progress.csv, packed runs, manifest and references.

Every reader either returns what it promises or raises Damaged, whose text is one line that names the file. A run is
finished if its run.json says so and its progress.csv is whole; anything less is not. A run that ended with a non-finite
loss is a result too, since it would end so again: that the method failed.
"""

import csv
import gzip
import io
import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

PACKED = "packed.csv.gz"
VERDICT_SEEDS = 5  # fewer than so many have no verdict: the bootstrap of the aggregates would claim too much
POINTS = 100  # every curve is read at so many equally spaced steps, the last one at the end of the budget
STEP, RETURN = "global_step", "charts/episodic_return"
METRICS = ("alignment", "variability_quotient", "nc1", "etf_error", "mean_weight_cosine")  # which reports show
GROUPS = ("collapse", "collapse_null")
CLASSES = "collapse/classes_present"
PACKED_TAGS = (RETURN, CLASSES, *(f"{group}/{m}" for m in METRICS for group in GROUPS))
READ = (STEP, *PACKED_TAGS)
DIVERGED = "error: non-finite loss"  # how the scripts' message begins
UNCOMPARED = ("run_dir", "resume")  # arguments that say nothing of what was run


class Damaged(ValueError):
    """A file that does not hold what it should: which one, and what is wrong, in one line."""

    def __init__(self, path, what):
        super().__init__(f"{path} {' '.join(str(what).split())}")


@dataclass(frozen=True)
class Run:
    """A run's result: its run.json, and its curves as arrays (rows,) by column, NaN where it logged nothing. A run that
    diverged has one row, where it ended, without a return."""

    name: str
    path: Path  # its folder, or the packed table that it is in
    record: dict
    curves: dict

    @property
    def diverged(self):
        return has_diverged(self.record)


def has_diverged(record):
    """Whether it is the run.json of a run that ended with a non-finite loss."""
    return record["status"] == "failed" and str(record.get("error")).startswith(DIVERGED)


def is_number(value, low=-math.inf):
    """Whether it is a finite number of at least `low`; True and False are none."""
    return type(value) in (int, float) and math.isfinite(value) and value >= low


def is_integer(value, low):
    return type(value) is int and low <= value < 2**63


def is_optional(check, *bounds):
    return lambda value: value is None or check(value, *bounds)


def is_json_object(text):
    """Whether it is text that holds a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (TypeError, ValueError, RecursionError):
        return False


def is_text(value):
    return isinstance(value, str)


def is_name(value):
    """Whether it is text for one line."""
    return is_text(value) and value.isprintable() and 0 < len(value) < 256


# What every run.json of the scripts holds, as far as anything here reads it
ARGS = {
    "env_id": is_name,
    "exp_name": is_name,
    "seed": lambda value: is_integer(value, 0),
    "total_timesteps": lambda value: is_integer(value, 1),
    "env_kwargs": is_json_object,
    "max_episode_steps": lambda value: value is None or is_integer(value, 1),
}
RECORD = {
    "acpg_run": lambda value: type(value) is int and value == 1,
    "status": is_name,
    "script_sha256": is_text,
    "args": lambda value: isinstance(value, dict),
    "versions": lambda value: isinstance(value, dict),
}
FINISHED = {
    "global_step": lambda value: is_integer(value, 1),
    "wall_time": lambda value: is_number(value, 0),
    "final_return": lambda value: value is None or is_number(value),
}
REFERENCE = {
    "mean": is_optional(is_number),
    "standard_error": is_optional(is_number, 0),
    "episodes": lambda value: is_integer(value, 0),
    "seed": lambda value: is_integer(value, 0),
}


def check(path, content, fields, where=""):
    """Raise Damaged unless `content` is an object whose fields pass their checks."""
    if not isinstance(content, dict):
        raise Damaged(path, f"holds no JSON object{where}")
    for key, valid in fields.items():
        if key not in content:
            raise Damaged(path, f"lacks {key}{where}")
        if not valid(content[key]):
            raise Damaged(path, f"has {str(content[key])[:50]!r} for {key}{where}")


def read_json(path):
    """The object in a JSON file, {} if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise Damaged(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"is no JSON file: {error}") from error
    check(path, content, {})
    return content


def check_record(path, record):
    """`record` if it is one of a run of the scripts."""
    check(path, record, RECORD)
    check(path, record["args"], ARGS, " in args")
    if record["status"] == "finished" or has_diverged(record):
        check(path, record, FINISHED)
    return record


def read_record(folder):
    """run.json of a run's folder."""
    path = folder / "run.json"
    record = read_json(path)
    if not record and not path.exists():
        raise Damaged(path, "is missing")
    return check_record(path, record)


def check_curves(path, columns, rows):
    """Arrays (rows,) by column name of a table of text, whose steps must grow and whose values are numbers or empty.

    Steps and what reports read (PACKED_TAGS) must not be infinite. Others may, as the explained variance of constant
    targets is, and are NaN here.
    """
    if not rows or not {STEP, RETURN} <= set(columns):
        raise Damaged(path, f"has no rows with {STEP} and {RETURN}")
    if len(set(columns)) < len(columns):
        raise Damaged(path, "has two columns of one name")
    for number, row in enumerate(rows):
        if len(row) != len(columns):
            raise Damaged(path, f"has {len(row)} values instead of {len(columns)} in row {number + 1}")
    try:
        table = np.array([[float(value or "nan") for value in row] for row in rows])
    except ValueError as error:
        raise Damaged(path, f"has text where a number belongs: {str(error)[:60]}") from error
    infinite = np.isinf(table)
    if wrong := [name for name, bad in zip(columns, infinite.any(0), strict=True) if bad and name in READ]:
        raise Damaged(path, f"has infinite values of {wrong[0]}")
    table[infinite] = np.nan
    curves = dict(zip(columns, table.T, strict=True))
    if not (np.diff(curves[STEP]) > 0).all() or not curves[STEP][0] >= 0:  # a step that is NaN fails too
        raise Damaged(path, f"has values of {STEP} that do not grow")
    return curves


def read_curves(folder, record):
    """progress.csv of a finished run's folder: arrays (rows,) by column, which end at the run's last step."""
    path = folder / "progress.csv"
    try:
        text = path.read_text(encoding="utf-8")
        columns, *rows = list(csv.reader(io.StringIO(text), strict=True)) or [[]]
    except OSError as error:
        raise Damaged(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise Damaged(path, f"is no CSV file: {error}") from error
    if not text.endswith("\n"):
        raise Damaged(path, "ends amid a row")
    curves = check_curves(path, columns, rows)
    check_end(path, record, curves[STEP][-1])
    return curves


def check_end(path, record, last):
    """Raise Damaged unless the curves end where the run did, and that is where its budget did."""
    step, budget = record["global_step"], record["args"]["total_timesteps"]
    if last != step:
        raise Damaged(path, f"ends at step {last:.0f}, and the run at {step}")
    if has_diverged(record) and step <= budget:
        return
    if not step <= budget < 2 * step:  # a budget is cut down to whole rollouts, so it is half used at least
        raise Damaged(path, f"ends at step {step} of {budget}")


def read_run(folder):
    """The finished run in a folder. Raises Damaged for any other, with its status if that is the reason."""
    record = read_record(folder)
    if record["status"] != "finished":
        raise Damaged(folder / "run.json", f"is of a run that is {record['status'][:20]}")
    return Run(folder.name, folder, record, read_curves(folder, record))


def read_result(folder):
    """The run in a folder if it is finished or has diverged. Raises Damaged for any other."""
    record = read_record(folder)
    if has_diverged(record):
        curves = {STEP: np.array([float(record["global_step"])]), RETURN: np.array([math.nan])}
        return Run(folder.name, folder, record, curves)
    return read_run(folder)


def finished_record(folder):
    """The record of the finished run in a folder, or None."""
    record = result_record(folder)
    return None if record is None or has_diverged(record) else record


def result_record(folder):
    """The record of the run in a folder if it is finished or has diverged, or None."""
    try:
        stamps = [(folder / name).stat() for name in ("run.json", "progress.csv")]
    except OSError:
        return None
    return _result_record(folder, tuple((stamp.st_mtime_ns, stamp.st_size) for stamp in stamps))


@cache
def _result_record(folder, _):
    try:
        return read_result(folder).record
    except Damaged:
        return None


def same_run(record, args, sha256):
    """Whether a run's record is of these arguments (a dict) and this script, wherever its folder lies."""
    strip = lambda values: {key: value for key, value in values.items() if key not in UNCOMPARED}  # noqa: E731
    return record["script_sha256"] == sha256 and strip(record["args"]) == strip(args)


# Packed runs: a table with a row for each, its record as JSON and each of its curves as numbers with blanks between


def write_packed(path, runs):
    """Pack results of runs into one table. The same runs give the same bytes."""
    packed = {run.name: (pack_record(run.record), pack_curves(run)) for run in runs}
    tags = sorted({tag for _, curves in packed.values() for tag in curves} - {STEP})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "record", STEP, *tags])
    for name, (record, curves) in sorted(packed.items()):
        writer.writerow([name, record, *(curves.get(tag, "") for tag in (STEP, *tags))])
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    temporary.replace(path)


def pack_record(record):
    """JSON of what is read of a record; of the folder only its name, as where it lay says nothing elsewhere."""
    record = {key: record[key] for key in (*RECORD, *FINISHED, *(["error"] if has_diverged(record) else []))}
    record["args"] = record["args"] | {"run_dir": Path(record["args"].get("run_dir") or "").name}
    return json.dumps(record, sort_keys=True, separators=(",", ":"))


def pack_curves(run):
    """Text of a run's curves by tag: the first row, POINTS equally spaced steps of the budget, and the last row."""
    budget, curves = run.record["args"]["total_timesteps"], defined(run.curves)  # else it would be interpolated over
    steps = curves[STEP]
    grid = np.linspace(budget / POINTS, budget, POINTS)
    inside = (grid > steps[0]) & (grid < steps[-1])
    result = {STEP: [steps[0], *grid[inside], *steps[1:][-1:]]}
    for tag in PACKED_TAGS:
        if tag in curves:
            values = curves[tag]
            result[tag] = [values[0], *on_grid(curves, tag, budget)[inside], *values[1:][-1:]]
    digits = {STEP: 12, RETURN: 6}
    return {tag: " ".join(f"{x:.{digits.get(tag, 4)}g}" for x in values) for tag, values in result.items()}


def read_packed(path):
    """The runs in a packed table, by name; {} if there is no such file."""
    try:
        with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
            csv.field_size_limit(2**24)
            columns, *rows = list(csv.reader(file, strict=True)) or [[]]
    except FileNotFoundError:
        return {}
    except (OSError, EOFError, ValueError, csv.Error, gzip.zlib.error) as error:
        raise Damaged(path, f"is no packed table: {error}") from error
    if columns[:3] != ["run", "record", STEP] or any(len(row) != len(columns) for row in rows):
        raise Damaged(path, "is no packed table: other columns")
    runs = {}
    for name, text, *cells in rows:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Damaged(path, f"has no JSON object as the record of {name}") from error
        record = check_record(path, record)
        if not (record["status"] == "finished" or has_diverged(record)) or name in runs:
            raise Damaged(path, f"has {name} twice or unfinished")
        known = {tag: cell.split(" ") for tag, cell in zip(columns[2:], cells, strict=True) if cell}
        if len({len(values) for values in known.values()}) != 1:
            raise Damaged(path, f"has curves of different lengths for {name}")
        curves = check_curves(path, list(known), list(zip(*known.values(), strict=True)))
        check_end(path, record, curves[STEP][-1])
        runs[name] = Run(name, path, record, curves)
    return runs


def defined(curves):
    """The curves with NaN where a collapse metric says nothing: with fewer than two greedy actions all of them, with
    fewer than three the ETF error, as two centred means are always antipodal. Packed curves, which are interpolated,
    may have a value there."""
    classes = curves.get(CLASSES)
    if classes is None:
        return curves
    least = {tag: 3 if tag.endswith("/etf_error") else 2 for tag in PACKED_TAGS if tag not in (RETURN, CLASSES)}
    return curves | {tag: np.where(classes < n, np.nan, curves[tag]) for tag, n in least.items() if tag in curves}


def on_grid(curves, tag, budget):
    """A tag's curve at POINTS equally spaced steps, by linear interpolation; NaN throughout if it has no value. One of
    collapse is NaN from a measurement at which it is undefined to the next at which it is not. The return is NaN up to
    the last entry before the first with an episode, and after the last one if that is not in the last tenth."""
    values = curves.get(tag)
    if values is None or not (known := np.isfinite(values)).any():
        return np.full(POINTS, np.nan)
    if tag.startswith(GROUPS) and CLASSES in curves and np.isfinite(curves[CLASSES]).any():
        known = np.isfinite(curves[CLASSES])
    steps, grid = curves[STEP], np.linspace(budget / POINTS, budget, POINTS)
    result = np.interp(grid, steps[known], values[known])
    if tag == RETURN:
        (first, *_), (*_, last) = np.flatnonzero(known), np.flatnonzero(known)
        if first:
            result[grid <= steps[first - 1]] = np.nan
        if steps[last] < 0.9 * budget:
            result[grid > steps[last]] = np.nan
    return result


# The sweep's own files


def read_manifest(folder):
    """manifest.json of a sweep, {} if there is none: at least `commands`, a list, and `runs`, each with a status."""
    path = folder / "manifest.json"
    if not (manifest := read_json(path)):
        return {}
    check(path, manifest, {"runs": lambda value: isinstance(value, dict)})
    commands = manifest.setdefault("commands", [])
    if not isinstance(commands, list) or not all(map(is_text, commands)):
        raise Damaged(path, "has commands that are no list of text")
    for name, run in manifest["runs"].items():
        check(path, run, {"status": is_name}, f" of {name[:80]}")
    return manifest


def read_references(folder):
    """references.json: what the random policy gets and where the threshold lies, by environment; {} without one."""
    path = folder / "references.json"
    references = read_json(path)
    for key, entry in references.items():
        check(path, entry, REFERENCE, f" of {key[:80]}")
        if not is_optional(is_number)(entry.get("threshold")):
            raise Damaged(path, f"has {str(entry['threshold'])[:50]!r} for threshold of {key[:80]}")
    return references
