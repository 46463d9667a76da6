"""reading.py: whatever a file holds, its reader returns what it promises or says in one line which file is wrong."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import make_report, write_run, write_sweep

import reading

bounded = settings(max_examples=150, deadline=None)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run, whose files tests put back."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return next((folder / "runs").iterdir())


def refused(read, *files):
    """Whether `read` raises Damaged, in one line that names one of the files; anything else it raises goes through."""
    try:
        read()
    except reading.Damaged as error:
        assert "\n" not in str(error) and any(str(file) in str(error) for file in files), str(error)
        return True
    return False


class Kept:
    """The file's content, put back at the end."""

    def __init__(self, path):
        self.path, self.content = path, path.read_bytes()

    def __enter__(self):
        return self.content

    def __exit__(self, *_):
        self.path.write_bytes(self.content)


@st.composite
def damage(draw, content):
    """Bytes cut short, with a piece replaced, or others altogether."""
    at = draw(st.integers(0, len(content)))
    kind = draw(st.sampled_from(("cut", "replace", "other")))
    if kind == "cut":
        return content[:at]
    if kind == "other":
        return draw(st.binary(max_size=40))
    length = draw(st.integers(1, 40))
    return content[:at] + draw(st.binary(max_size=8)) + content[at + length :]


# Whatever a file holds


@pytest.mark.parametrize("name", ("run.json", "progress.csv"))
def test_any_bytes_of_a_run(run, name):
    """A run read in spite of them is whole: its curves are finite numbers or NaN, and end where its record says."""

    @bounded
    @given(st.data())
    def check(data):
        with Kept(run / name) as content:
            (run / name).write_bytes(data.draw(damage(content)))
            if not refused(lambda: reading.read_run(run), run / "run.json", run / "progress.csv"):
                found = reading.read_run(run)
                steps = found.curves["global_step"]
                assert (np.diff(steps) > 0).all() and steps[-1] == found.record["global_step"]
                assert not any(np.isinf(values).any() for values in found.curves.values())

    check()


def replace(content, keys, value):
    """A JSON document with the value at `keys` replaced, or without it for Ellipsis."""
    content = json.loads(content)
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    if value is ...:
        del inner[keys[-1]]
    return json.dumps(content).encode()


FIELDS = [(key,) for key in (*reading.RECORD, *reading.FINISHED)] + [("args", key) for key in reading.ARGS]


@pytest.mark.parametrize("keys", FIELDS, ids=".".join)
def test_any_value_in_a_record(run, keys):
    """A missing one is refused, and so is one of another kind."""

    @bounded
    @given(json_values)
    def check(value):
        with Kept(run / "run.json") as content:
            (run / "run.json").write_bytes(replace(content, keys, value))
            if not refused(lambda: reading.read_run(run), run / "run.json", run / "progress.csv"):
                known = json.loads(content)
                for key in keys:
                    known = known[key]
                kinds = (int, float) if isinstance(known, float) else type(known)
                assert isinstance(value, kinds) or known is None or value is None, value

    check()
    with Kept(run / "run.json") as content:
        (run / "run.json").write_bytes(replace(content, keys, ...))
        assert refused(lambda: reading.read_run(run), run / "run.json")


@pytest.mark.parametrize("name, read", [("manifest", reading.read_manifest), ("references", reading.read_references)])
def test_any_json_of_a_sweep(tmp_path, name, read):
    path = tmp_path / f"{name}.json"
    entry = {"mean": 1.0, "standard_error": 0.1, "episodes": 3, "seed": 0, "status": "finished"}
    runs = st.dictionaries(st.text(max_size=4), json_values | st.just(entry), max_size=3)
    contents = json_values | runs | st.fixed_dictionaries({"runs": runs, "commands": json_values})

    @bounded
    @given(contents)
    def check(content):
        path.write_text(json.dumps(content))
        if not refused(lambda: read(tmp_path), path):
            found = read(tmp_path)
            assert all(isinstance(e, dict) for e in (found.get("runs", {}) if name == "manifest" else found).values())

    check()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    write_sweep(folder, seeds=1, envs=("CartPole-v1",))
    reading.write_packed(folder / reading.PACKED, [reading.read_run(path) for path in (folder / "runs").iterdir()])
    return folder / reading.PACKED


@pytest.mark.parametrize("inside", (False, True), ids=("the file", "the table in it"))
def test_any_bytes_of_a_packed_table(packed, inside):
    @bounded
    @given(st.data())
    def check(data):
        with Kept(packed) as content:
            if inside:
                packed.write_bytes(gzip.compress(data.draw(damage(gzip.decompress(content)))))
            else:
                packed.write_bytes(data.draw(damage(content)))
            if not refused(lambda: reading.read_packed(packed), packed):
                assert all(len(run.curves["global_step"]) > 1 for run in reading.read_packed(packed).values())

    check()


# Cases


def rows(*lines):
    return "global_step,charts/episodic_return\n" + "".join(f"{line}\n" for line in lines)


WHOLE = [f"{step},{step / 10}" for step in range(0, 10001, 1000)]
CUT = {
    "empty": "",
    "only a header": rows(),
    "no returns": "global_step\n10000\n",
    "cut at a sixth": rows(*WHOLE[:2]),
    "cut in its last row": rows(*WHOLE)[:-5],
    "in reverse": rows(*WHOLE[::-1]),
    "a step twice": rows(*WHOLE[:-1], WHOLE[-2], WHOLE[-1]),
    "beyond the end": rows(*WHOLE, "11000,3"),
    "text": rows(*WHOLE[:-1], "10000,high"),
    "infinite": rows(*WHOLE[:-1], "10000,inf"),
    "infinite collapse": rows(*WHOLE).replace("return\n", "return,collapse/nc1\n").replace("0\n", "0,inf\n"),
    "no step": rows(*WHOLE[:-1], "nan,1"),
    "other columns in a row": rows(*WHOLE[:-1], "10000,1,2"),
    "a column twice": rows(*WHOLE).replace("\n", ",global_step\n", 1).replace("0\n", "0,1\n"),
    "NUL": rows(*WHOLE[:-1], "10000,\0"),
}


@pytest.mark.parametrize("content", CUT.values(), ids=CUT)
def test_what_is_not_a_whole_curve(run, content):
    with Kept(run / "progress.csv"):
        (run / "progress.csv").write_text(rows(*WHOLE))
        assert reading.finished_record(run)["global_step"] == 10000
        (run / "progress.csv").write_text(content)
        assert refused(lambda: reading.read_run(run), run / "progress.csv")
        assert reading.finished_record(run) is None


def test_an_infinite_loss_is_no_damage(run):
    """The explained variance is -inf where all targets are equal, as those of a policy that is perfect may be."""
    with Kept(run / "progress.csv"):
        text = rows(*WHOLE).replace("return\n", "return,losses/explained_variance\n")
        (run / "progress.csv").write_text(text.replace("0\n", "0,.5\n").replace("10000,1000.0,.5", "10000,1000.0,-inf"))
        curves = reading.read_run(run).curves
        assert curves["charts/episodic_return"][-1] == 1000
        values = curves["losses/explained_variance"]
        assert np.isnan(values[-1]) and (values[:-1] == 0.5).all()


@pytest.mark.parametrize("status, step", [("running", 10000), ("finished", 1666), ("finished", 5000)])
def test_what_is_not_finished(run, status, step):
    """By its status, or by how little of its budget is used: rollouts round it down, by less than a half."""
    with Kept(run / "run.json") as content, Kept(run / "progress.csv"):
        (run / "run.json").write_bytes(replace(replace(content, ["status"], status), ["global_step"], step))
        (run / "progress.csv").write_text(rows(f"{step},1"))
        assert refused(lambda: reading.read_run(run), run / "run.json", run / "progress.csv")


@pytest.mark.parametrize("name", ("run.json", "progress.csv"))
def test_folders_in_the_place_of_files(tmp_path, name):
    write_run(tmp_path)
    folder = next((tmp_path / "runs").iterdir())
    (folder / name).unlink()
    assert refused(lambda: reading.read_run(folder), folder / name)
    (folder / name).mkdir()
    assert refused(lambda: reading.read_run(folder), folder / name)
    assert reading.finished_record(folder) is None


def test_a_deep_document_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("[" * 100_000)
    assert refused(lambda: reading.read_record(tmp_path), tmp_path / "run.json")


def test_where_a_run_lies_and_whether_it_was_resumed_do_not_matter(run):
    record = reading.read_record(run)
    args = record["args"] | {"run_dir": "elsewhere", "resume": True}
    assert reading.same_run(record, args, "x")
    assert not reading.same_run(record, args, "y")
    assert not reading.same_run(record, args | {"seed": 2}, "x")


# Packed runs


def test_packing_keeps_what_a_report_reads(tmp_path):
    """Steps, returns and collapse at 100 points and at both ends; the same runs in any order give the same bytes."""
    write_sweep(tmp_path, seeds=2)
    runs = [reading.read_run(path) for path in (tmp_path / "runs").iterdir()]
    path = tmp_path / reading.PACKED
    reading.write_packed(path, runs)
    first = path.read_bytes()
    reading.write_packed(path, runs[::-1])
    assert path.read_bytes() == first
    packed = reading.read_packed(path)
    reading.write_packed(path, packed.values())
    assert path.read_bytes() == first, "packing again changes nothing"
    assert packed.keys() == {run.name for run in runs}
    for run in runs:
        other = packed[run.name]
        assert other.record["args"]["run_dir"] == run.name and str(tmp_path) not in json.dumps(other.record)
        args = run.record["args"] | {"run_dir": run.name}
        assert other.record == {key: run.record[key] for key in other.record} | {"args": args}
        assert reading.same_run(other.record, run.record["args"], "x")
        for tag in reading.PACKED_TAGS[2:]:
            read = (reading.on_grid(curves, tag, 10000) for curves in (run.curves, other.curves))
            assert next(read) == pytest.approx(next(read), rel=1e-3)
        assert np.isnan(other.curves["charts/episodic_return"][0]) and other.curves["collapse/nc1"][0] == 0.2


def test_a_run_that_diverged_is_a_result(tmp_path):
    """Read from its folder and from a packed table; one that failed for another reason is none."""
    error = "error: non-finite loss at update 3 (step 9): x"
    write_run(tmp_path, seed=1, status="failed", error=error, global_step=9, final_return=None)
    write_run(tmp_path, seed=2, status="failed", error="error: at step 9: ValueError: y")
    write_run(tmp_path, seed=3)
    diverged, failed, finished = sorted((tmp_path / "runs").iterdir())
    (diverged / "progress.csv").write_text("half a r")  # what it logged does not matter
    assert refused(lambda: reading.read_run(diverged), diverged / "run.json")
    assert refused(lambda: reading.read_result(failed), failed / "run.json")
    assert reading.finished_record(diverged) is reading.result_record(failed) is None
    assert reading.result_record(diverged)["error"] == error
    runs = [reading.read_result(path) for path in (diverged, finished)]
    assert [run.diverged for run in runs] == [True, False]
    reading.write_packed(tmp_path / reading.PACKED, runs)
    packed = reading.read_packed(tmp_path / reading.PACKED)
    assert packed[diverged.name].diverged and not packed[finished.name].diverged
    assert packed[diverged.name].record["error"] == error
    for run in (runs[0], packed[diverged.name]):
        assert list(run.curves[reading.STEP]) == [9] and np.isnan(run.curves[reading.RETURN]).all()


@pytest.mark.slow
def test_a_report_of_packed_runs_is_that_of_the_runs(tmp_path):
    """Whether both are there or the table alone."""
    write_sweep(tmp_path, seeds=3)
    runs = [reading.read_run(path) for path in (tmp_path / "runs").iterdir()]
    (tmp_path / "references.json").write_text("{}")
    assert make_report(tmp_path).returncode == 0
    known = (tmp_path / "report" / "cells.csv").read_text()
    reading.write_packed(tmp_path / reading.PACKED, runs)
    assert make_report(tmp_path).returncode == 0 and (tmp_path / "report" / "cells.csv").read_text() == known
    for run in runs:
        for path in run.path.iterdir():
            path.unlink()
        run.path.rmdir()
    result = make_report(tmp_path)
    assert result.returncode == 0 and "12 runs, 0 missing" in result.stdout, result.stderr
    read = lambda text: [x for line in text.splitlines()[1:] for x in line.split(",")]  # noqa: E731
    for ours, theirs in zip(read((tmp_path / "report" / "cells.csv").read_text()), read(known), strict=True):
        assert ours == theirs or float(ours) == pytest.approx(float(theirs), rel=1e-4)


@pytest.mark.parametrize("file", ("progress.csv", "manifest.json", "references.json", reading.PACKED))
def test_the_report_names_what_is_damaged(tmp_path, file):
    """In one line, and writes nothing; a run that is finished but not whole is refused, not left out."""
    write_sweep(tmp_path, seeds=1)
    path = next((tmp_path / "runs").iterdir()) / file if file == "progress.csv" else tmp_path / file
    path.write_text(rows(*WHOLE[:2]) if file == "progress.csv" else '{"runs": [null], "CartPole": 3}')
    result = make_report(tmp_path)
    assert result.returncode == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert str(path) in result.stderr and not (tmp_path / "report.md").exists()


def test_the_report_lists_what_is_not_a_run(tmp_path):
    write_sweep(tmp_path, seeds=1)
    foreign = tmp_path / "runs" / "foreign" / "run.json"
    foreign.parent.mkdir()
    foreign.write_text('{"note": "acpg_run"}')
    result = make_report(tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"- foreign: {foreign} lacks acpg_run" in (tmp_path / "report.md").read_text()


def test_packing_makes_nothing_of_what_is_undefined():
    """The ETF error between measurements with two actions is no value, packed or not."""
    classes = np.array([2.0, 2, 3, 4, 1, 4, 4, 2, 4, 4])
    curves = {reading.STEP: np.arange(1.0, 11) * 1000, reading.RETURN: np.ones(10), reading.CLASSES: classes}
    curves["collapse/etf_error"] = np.where(classes > 2, 0.5, 0.0)
    record = {"args": {"total_timesteps": 10000}}
    packed = reading.pack_curves(reading.Run("x", None, record, curves))
    again = {tag: np.array(text.split(" "), dtype=float) for tag, text in packed.items()}
    one, other = (reading.on_grid(reading.defined(c), "collapse/etf_error", 10000) for c in (curves, again))
    assert np.isnan(one).sum() > 40 and (np.isnan(one) == np.isnan(other))[:-1].all()
    assert np.nanmin(other) == np.nanmax(other) == 0.5


def test_a_column_of_classes_without_values():
    curves = {reading.STEP: np.array([0.0, 100]), reading.CLASSES: np.full(2, np.nan)}
    curves["collapse/alignment"] = np.array([0.2, 0.4])
    assert reading.on_grid(curves, "collapse/alignment", 100)[-1] == pytest.approx(0.4)
