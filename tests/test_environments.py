"""Users' environments: infos, rewards and arrays of any kind; and what goes wrong in them ends in one line."""

import json
import re
import sys

import helpers
import numpy as np
import probe_envs
import pytest
import torch
from helpers import SCRIPTS, WITH_CRITIC, frozen, read_events, read_progress, read_record, run_script, tiny, train

every = pytest.mark.parametrize("script", SCRIPTS)
NUM_ENVS = 2


@pytest.fixture(autouse=True)
def forget_calls():
    """Start each test with no recorded calls."""
    probe_envs.CALLS.clear()


def flags(script, **kwargs):
    """Flags for a short run in probe_envs.Odd with these arguments."""
    return (*tiny(script, 6, updates=3), "--no-anneal-lr", "--env-kwargs", json.dumps(kwargs))


def outcome(script, run_dir, *more):
    """What a run computed: its weights, its progress.csv but for the clock, and its event file's tags and steps."""
    agent = train(script, "Odd", run_dir, *more).agent
    rows = [{tag: value for tag, value in row.items() if tag != "charts/SPS"} for row in read_progress(run_dir)]
    assert len(rows) > 3
    steps = {tag: [step for step, _ in points] for tag, points in read_events(run_dir)[0].items()}
    return {name: tensor.tolist() for name, tensor in agent.state_dict().items()}, rows, steps


# What has to work


@every
def test_infos(script, tmp_path):
    """No info of anybody's stops a run, or changes it: types, lengths and keys that come and go, nested, any names."""
    expected = outcome(script, tmp_path / "none", *flags(script))
    assert outcome(script, tmp_path / "mixed", *flags(script, infos="mixed")) == expected


@every
def test_rewards(script, tmp_path):
    """Rewards of shape (1,), of no dimension, of bool, of integers: the run of the floats that they stand for."""
    expected = outcome(script, tmp_path / "float", *flags(script))
    assert outcome(script, tmp_path / "mixed", *flags(script, reward="mixed")) == expected


@every
def test_one_array_for_all_observations(script, tmp_path):
    """An environment that changes the array it has returned: the run of a twin that returns a new one each time."""
    expected = outcome(script, tmp_path / "new", *flags(script))
    assert outcome(script, tmp_path / "same", *flags(script, shared=True)) == expected


@pytest.mark.parametrize("script", WITH_CRITIC)
def test_one_array_for_all_observations_and_the_truncated_state(script, tmp_path):
    """In that environment, too, the state that a truncated step led to is its own, not the reset's."""
    still = (*flags(script, shared=True), *frozen(script))
    result = train(script, "Odd", tmp_path / "run", *still)
    after, truncations, terminations = result.after, result.truncations, result.terminations
    times = np.round(8 * after[..., 0])
    assert truncations.any() and (times >= 1).all(), "time 0 is a reset's"
    over = np.maximum(terminations, truncations)
    np.testing.assert_array_equal(times[1:] - 1, np.where(over[:-1] == 1, 0, times[:-1]))
    assert not np.shares_memory(result.envs.obs, result.envs.after)


# What has to end in one line


def the_line(result):
    """The one line of the error. Gymnasium's checker may have warned before it."""
    assert result.status == 1, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    *warnings, line = result.stderr.splitlines()
    assert line.startswith("error:"), result.stderr
    assert not [other for other in warnings if other.startswith("error:")]
    return line


def step_in(line):
    """The step that the line names, and between which steps it was: those before and those with the broken one."""
    (broken, *_) = [call for call in probe_envs.CALLS if call.kind == "broken"]
    steps = broken.obs
    return int(re.search(r"\bstep (\d+)", line)[1]), (NUM_ENVS * max(steps - 1, 0), NUM_ENVS * steps)


def check_files(script, run_dir, *more):
    """Logs and model.pt are whole, and hold what a run that ended at the last entry leaves."""
    record = read_record(run_dir)
    assert record["status"] == "failed" and record["error"]
    events, texts = read_events(run_dir)
    assert texts
    saved = torch.load(run_dir / "model.pt", weights_only=True)
    assert saved["script"] == script and all(tensor.isfinite().all() for tensor in saved["agent"].values())
    rows = read_progress(run_dir)
    if not rows:
        assert record["global_step"] <= NUM_ENVS
        return 0
    steps = [int(row["global_step"]) for row in rows]
    assert [step for step, _ in events["losses/entropy"]] == steps[1:]
    assert steps[-1] <= record["global_step"] <= steps[-1] + 32
    before = train(script, "Odd", run_dir.parent / "before", *more, "--total-timesteps", steps[-1]).agent.state_dict()
    assert all(torch.equal(saved["agent"][name], before[name]) for name in before)
    return len(rows)


@every
@pytest.mark.parametrize(
    ("broken", "where", "at"),
    [
        *(
            ("nan", "reset", 1),
            ("nan", "reset", 12),
            ("nan", "step", 1),
            ("nan", "step", 40),
            ("nan", "truncation", 30),
        ),
        *(("inf", "step", 40), ("-inf", "step", 40)),
    ],
)
def test_observation_not_finite(script, broken, where, at, tmp_path):
    """In the first reset or a later one, in the first step or midway, or where an episode was truncated."""
    kwargs = {"broken": broken, "where": where, "at": at}
    line = the_line(run_script(script, "Odd", tmp_path / "run", *flags(script, **kwargs)))
    assert "observation" in line and "finite" in line
    named, (_, step) = step_in(line)
    assert named == step
    rows = check_files(script, tmp_path / "run", *flags(script))
    assert (rows > 1) == (at > 1)


@every
@pytest.mark.parametrize(
    ("broken", "where", "at"),
    [
        *(("raise", "reset", 1), ("raise", "reset", 12), ("raise", "step", 1), ("raise", "step", 40)),
        *(("KeyError", "step", 40), ("shape", "step", 40)),
    ],
)
def test_exception(script, broken, where, at, tmp_path):
    """Whatever an environment raises, or makes numpy raise: its message and the step; the files are kept."""
    kwargs = {"broken": broken, "where": where, "at": at}
    line = the_line(run_script(script, "Odd", tmp_path / "run", *flags(script, **kwargs)))
    message = {"raise": "Flux: the flux capacitor", "KeyError": "KeyError: 'capacitor'", "shape": "shape"}[broken]
    assert message in line
    named, (before, after) = step_in(line)
    assert before <= named <= after
    rows = check_files(script, tmp_path / "run", *flags(script))
    assert (rows > 1) == (at > 1)


@every
def test_exception_with_a_traceback(script, tmp_path, monkeypatch):
    """ACPG_TRACEBACK=1 brings the traceback back, and the files are kept all the same."""
    kwargs = {"broken": "raise", "where": "step", "at": 40}
    monkeypatch.setenv("ACPG_TRACEBACK", "1")
    result = run_script(script, "Odd", tmp_path / "run", *flags(script, **kwargs))
    assert result.status == 1
    assert "Traceback" in result.stderr and "probe_envs.py" in result.stderr and "Flux" in result.stderr
    assert check_files(script, tmp_path / "run", *flags(script)) > 1


@every
@pytest.mark.parametrize(("reward", "names"), [("None", "NoneType"), ("shape (2,)", "size 1"), ("str", "one")])
def test_reward_that_is_no_number(script, reward, names, tmp_path):
    """None, several numbers, a text: one line with the step."""
    line = the_line(run_script(script, "Odd", tmp_path / "run", *flags(script, reward=reward)))
    assert names in line
    assert 0 <= int(re.search(r"\bstep (\d+)", line)[1]) <= NUM_ENVS
    assert read_record(tmp_path / "run")["status"] == "failed"


# Closing


@every
@pytest.mark.parametrize("how", ["finished", "failed", "close raises"])
def test_environments_are_closed(script, how, tmp_path, monkeypatch):
    """Each once, however the run ends; what goes wrong in that is nobody's business any more."""
    closed = []

    def close(self):
        closed.append(self.instance)
        if how == "close raises":
            raise RuntimeError("the window is gone")

    monkeypatch.setattr(probe_envs.Odd, "close", close)
    kwargs = {"broken": "raise", "at": 5} if how == "failed" else {}
    result = run_script(script, "Odd", tmp_path / "run", *flags(script, **kwargs))
    assert (result.status, len(result.stderr.splitlines())) == ((1, 1) if how == "failed" else (0, 0)), result.stderr
    assert len(closed) == len(set(closed))
    assert len(closed) == NUM_ENVS or (how == "close raises" and closed)


# Where modules are found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder that is not on the path, under any name."""
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(folder))])
    return folder


MODULE = """
import gymnasium as gym
import probe_envs

class Mine(probe_envs.Clock):
    pass

gym.register("Mine-v0", entry_point=Mine)
"""


@every
def test_module_in_the_current_folder(script, folder, tmp_path):
    """`my_module:MyEnv-v0` works where my_module.py lies, without PYTHONPATH."""
    (folder / f"of_{script}.py").write_text(MODULE)
    train(script, f"of_{script}:Mine-v0", tmp_path / "run", *tiny(script, 6))
    assert helpers.event_files(tmp_path / "run")


@every
def test_installed_module_is_not_replaced(script, folder, tmp_path):
    """A file of the current folder does not take the place of an installed module of its name."""
    installed = tmp_path / "installed"
    installed.mkdir()
    sys.path.append(str(installed))  # the fixture takes it back
    (installed / f"both_{script}.py").write_text(MODULE)
    (folder / f"both_{script}.py").write_text("raise ValueError('the wrong module')")
    train(script, f"both_{script}:Mine-v0", tmp_path / "run", *tiny(script, 6))


@every
def test_missing_module(script, folder, tmp_path):
    """The line names the module and where it was looked for; nothing is left."""
    result = run_script(script, "no_such_module:Mine-v0", tmp_path / "run", *tiny(script))
    line = the_line(result)
    assert "no_such_module" in line and str(folder) in line and "env-id" in line.replace("_", "-")
    assert not (tmp_path / "run").exists()


@every
def test_module_that_cannot_be_imported(script, folder, tmp_path):
    """What the module lacks, or raises, is in the line."""
    for i, (content, named) in enumerate((("import no_such_dependency", "no_such_dependency"), ("1 / 0", "division"))):
        (folder / f"bad_{script}_{i}.py").write_text(content)
        result = run_script(script, f"bad_{script}_{i}:Mine-v0", tmp_path / "run", *tiny(script))
        assert named in the_line(result)
        assert not (tmp_path / "run").exists()
