"""benchmark.sh: what it plans, that a stopped sweep goes on, that failures are said, and the way through to the
report."""

import contextlib
import fcntl
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pandas as pd
import pytest
import slurm_node
from helpers import ROOT, snapshot
from test_report import write_run

import reading
import sweep as sweep_module

ENV = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
TINY_SWEEP = ("--algos", "ppo", "--envs", "CartPole-v1", "--num-seeds", "2", "--total-timesteps", "2048")
TINY_SWEEP += ("--arms", "baseline", "acpg", "bad=acpg:--learning-rate=1e30")  # a non-finite loss
ONE = ("--algos", "ppo", "--envs", "CartPole-v1", "--seeds", "1", "--arms", "baseline", "--total-timesteps", "1024")


def start(*flags, **options):
    return subprocess.Popen(["bash", str(ROOT / "benchmark.sh"), *map(str, flags)], env=ENV, text=True, **options)


def sweep(*flags, **options):
    """(exit status, stdout, stderr) of `bash benchmark.sh ...`."""
    process = start(*flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


def in_process(*flags):
    """What a sweep that starts no run says: (exit message or None, stdout)."""
    stdout = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with patch.object(sys, "argv", ["sweep.py", *map(str, flags)]), contextlib.redirect_stdout(stdout):
            sweep_module.main()
    except SystemExit as end:
        return end.code, stdout.getvalue()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return None, stdout.getvalue()


def commands(*flags):
    """What --print lists, as lists of words."""
    error, stdout = in_process("--print", *flags)
    assert error is None, error
    return [shlex.split(line) for line in stdout.splitlines()]


def starts(folder):
    """When each run in the folder that has a result was started: its event files, whose names hold the time."""
    records = (folder / "runs").glob("*/run.json")
    records = [path for path in records if any(x in path.read_text() for x in ('"finished"', "non-finite loss"))]
    return {path.parent.name: [e.name for e in path.parent.glob("events.out.tfevents.*")] for path in records}


# The plan


def test_the_default_suite(tmp_path):
    lines = commands("--out", tmp_path / "out")
    value = lambda line, flag: line[line.index(flag) + 1]  # noqa: E731
    runs = {tuple(value(line, flag) for flag in ("--algos", "--arms", "--envs", "--seeds")) for line in lines}
    assert len(runs) == len(lines) == 3 * 2 * 4 * 10
    assert {run[:2] for run in runs} == {(a, arm) for a in ("ppo", "a2c", "reinforce") for arm in ("baseline", "acpg")}
    assert {"CartPole-v1", "Acrobot-v1", "LunarLander-v3"} < {run[2] for run in runs}
    assert {run[3] for run in runs} == {str(seed) for seed in range(1, 11)}
    assert not (tmp_path / "out").exists()


def test_options(tmp_path):
    arms = ("baseline", "random=acpg:--action-layer=random --etf-scale=2", "fast=baseline:--learning-rate=8e-4")
    flags = (
        "--algos",
        "a2c",
        "--envs",
        "CartPole-v1",
        "CliffWalking-v1",
        "--seeds",
        "3",
        "7",
        "--total-timesteps",
        "5000",
    )
    lines = commands("--out", tmp_path, *flags, "--arms", *arms, "--extra=--gamma 0.9")
    assert len(lines) == 2 * 2 * 3
    text = [" ".join(line) for line in lines]
    assert all("--total-timesteps 5000" in line and "--extra=--gamma 0.9" in line for line in text)
    assert {line[line.index("--seeds") + 1] for line in lines} == {"3", "7"}
    assert sum("random=acpg:--action-layer=random --etf-scale=2" in line for line in text) == 4
    assert len(commands("--out", tmp_path, *flags[:-5], "--seeds", "3", "--arms", "baseline")) == 2  # that seed
    assert len(commands("--out", tmp_path, *flags[:-5], "--num-seeds", "3", "--arms", "baseline")) == 2 * 3
    assert commands("--seeds", "7", "3", "3") == commands("--seeds", "3", "7")


def test_what_an_arm_means():
    """Flags of all scripts, then the arm's own; what an environment needs; all of it as the script reads it."""
    args = sweep_module.Args(envs=["CliffWalking-v1", "CartPole-v1"], algos=["a2c"], seeds=[4], extra="--gamma 0.9")
    args.arms = ["baseline", "random=acpg:--action-layer=random --etf-scale=2", "fast=baseline:--learning-rate=8e-4"]
    sweep_module.settle(args)
    jobs = {(job.args["env_id"], job.args["exp_name"]): job for job in sweep_module.plan(args)}
    assert len(jobs) == 6 and all(job.args["gamma"] == 0.9 and job.args["seed"] == 4 for job in jobs.values())
    random, fast = jobs["CartPole-v1", "a2c_random"], jobs["CartPole-v1", "a2c_fast"]
    assert (random.script, random.args["action_layer"], random.args["etf_scale"]) == ("a2c_acpg.py", "random", 2.0)
    assert (fast.script, fast.args["learning_rate"]) == ("a2c_baseline.py", 8e-4)
    assert {env: job.args["max_episode_steps"] for (env, _), job in jobs.items()} == {
        "CliffWalking-v1": 200,
        "CartPole-v1": None,
    }


def test_quick_leaves_what_was_said():
    quick = commands("--quick")
    assert len(quick) == 3 * 2 * 3 and all("CartPole-v1" in run and "100000" in run for run in quick)
    assert len(commands("--quick", "--num-seeds", "10")) == 3 * 2 * 10
    assert all(
        "Acrobot-v1" in run and "5000" in run
        for run in commands("--quick", "--envs", "Acrobot-v1", "--total-timesteps", "5000")
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--algos", "dqn"), ("--algos", "dqn")),
        (("--envs", "Nonsense-v9"), ("--envs", "Nonsense")),
        (("--num-seeds", "0"), ("--num-seeds",)),
        (("--num-seeds", "99999999999"), ("--num-seeds",)),
        (("--seeds", "-1"), ("--seeds",)),
        (("--seeds", "1", "--num-seeds", "2"), ("--seeds", "--num-seeds")),
        (("--envs",), ("--envs",)),
        (("--seeds",), ("--seeds",)),
        (("--arms", "bad=acpg:--feature-dim=0"), ("--arms", "bad", "--feature-dim")),
        (("--arms", "bad=acpg:--nonsense=0"), ("--arms", "bad", "--nonsense")),
        (("--arms", "help=acpg:--help"), ("--arms", "help")),
        (("--extra=--ent-coef nan",), ("--extra", "--ent-coef")),
        (("--extra=--resume",), ("--extra", "--resume")),
        (("--total-timesteps", "100"), ("--total-timesteps",)),
        (("--arms", "random=dqn:--x"), ("--arms", "random")),
        (("--arms", "acpg", "acpg"), ("--arms", "twice")),
        (("--jobs", "0"), ("--jobs",)),
        (("--total-timesteps", "0"), ("--total-timesteps",)),
        (("--extra=--x 'y",), ("--extra",)),
        (("--extra=--seed 3",), ("--extra", "--seeds")),
        (("--arms", "baseline", "short=acpg:--total_timesteps=5"), ("--arms", "--total-timesteps")),
        (("--arms", "baseline", "short=acpg:--max-episode-steps 5"), ("--arms", "--extra")),
        (("--arms", "baseline=acpg:--gamma=0.9"), ("--arms", "another name")),
        (("--envs", "absent_module:My-v0"), ("--envs", "absent_module")),
        (("--out", "/dev/null/x"), ("--out", "/dev/null/x")),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") and len(value) > 1 else None,
)
def test_bad_input_is_one_line(tmp_path, flags, words):
    out = () if "--out" in flags else ("--out", tmp_path / "out")
    error, stdout = in_process(*out, *flags)
    assert error.startswith("error: ") and "\n" not in error and stdout == "", error
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


# Sweeps


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One environment, two seeds, few steps, an arm that diverges: the folder, and what the sweep said."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    return out, *sweep("--out", out, *TINY_SWEEP)


def test_through_to_the_report(tiny):
    """An arm that diverges has results, which score 0; nothing is missing."""
    out, status, stdout, stderr = tiny
    assert status == 0 and "failed:" not in stderr
    assert stdout.count("diverged, which scores 0: non-finite loss at update") == 2 and "[6/6, 0 failed" in stdout
    text = (out / "report.md").read_text()
    assert "Missing" not in text and "non-finite loss: 2 runs" in text
    runs = pd.read_csv(out / "report" / "runs.csv")
    assert list(runs.norm_final[runs.arm == "bad"]) == [0, 0]
    assert "| CartPole-v1 | ppo | acpg | auc | 2 |" in text
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["git_commit"] is not None and manifest["packages"]["torch"] and manifest["cpu"]
    assert {run["status"] for run in manifest["runs"].values()} == {"finished", "diverged"}
    assert all(run["wall_time"] > 0 for run in manifest["runs"].values())


FRAGILE = """
import sys
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

class Fragile(CartPoleEnv):
    def step(self, action):
        if any("ppo_bad" in word for word in sys.argv):
            raise RuntimeError("it broke")
        return super().step(action)

gym.register("Fragile-v0", Fragile, max_episode_steps=100)
"""


@pytest.fixture
def fragile(tmp_path):
    """An environment that fails in the runs of the arm "bad"."""
    (tmp_path / "fragile.py").write_text(FRAGILE)
    with patch.dict(ENV, {"PYTHONPATH": str(tmp_path)}):
        yield "fragile:Fragile-v0"


@pytest.mark.slow
def test_a_run_that_fails(fragile, tmp_path):
    """It is named with the end of its log, the others go on, the status says so, it is missing, and run again."""
    flags = "--out", tmp_path / "out", *ONE, "--envs", fragile, "--arms", "baseline", "bad=acpg"
    for before in (0, 1):
        status, stdout, stderr = sweep(*flags)
        assert status == 1 and "1 of 2 runs failed" in stderr and "ppo_bad 1" in stderr
        assert "it broke" in stdout and "exit status 1" in stdout and f"{before} of them finished" in stdout
    assert "ppo_bad 1: failed" in (tmp_path / "out" / "report.md").read_text()


def test_a_second_time_keeps_what_is_finished(tiny):
    out, before = tiny[0], starts(tiny[0])
    status, stdout, _ = sweep("--out", out, *TINY_SWEEP)
    assert status == 0 and "6 of them finished before" in stdout
    assert starts(out) == before and len(before) == 6


def pack(folder, *flags):
    command = [sys.executable, str(ROOT / "benchmark" / "pack.py"), str(folder), *flags]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_packed_runs_are_finished(tiny, tmp_path):
    """Without their folders, for the sweep and for the report; files that no run left stay."""
    out = tmp_path / "out"
    shutil.copytree(tiny[0], out)
    note = out / "runs" / "CartPole-v1__ppo_acpg__2" / "note.txt"
    note.write_text("mine")
    killed = out / "runs" / "CartPole-v1__ppo_acpg__3"
    shutil.copytree(out / "runs" / "CartPole-v1__ppo_baseline__1", killed)
    record = json.loads((killed / "run.json").read_text()) | {"status": "interrupted"}
    (killed / "run.json").write_text(json.dumps(record))
    result = pack(out, "--remove")
    assert result.returncode == 0 and "6 runs in" in result.stdout, result.stderr
    assert "not packed" in result.stdout and "is of a run that is interrupted" in result.stdout
    assert "holds other files" in result.stdout and [*note.parent.iterdir()] == [note]
    assert {path.name for path in (out / "runs").iterdir()} == {note.parent.name, killed.name}
    status, stdout, stderr = sweep("--out", out, *TINY_SWEEP)
    assert status == 0 and "6 runs, 6 of them finished before" in stdout, stderr
    assert "6 runs, 1 missing" in stdout
    text = (out / "report.md").read_text()
    assert "non-finite loss: 2 runs" in text and f"{killed.name.replace('__', ' ')}: interrupted" in text
    status, stdout, stderr = sweep("--out", out, *ONE, "--extra=--gamma 0.9")
    assert status == 1 and "packed.csv.gz: CartPole-v1__ppo_" in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize("held", ("part/tuned/sweep.lock", "study.lock"))
def test_packing_refuses(tmp_path, held):
    """Folders without runs, and one that a sweep writes to, or its study does; and leaves both as they are."""
    folder = tmp_path / "part" / "tuned"
    folder.mkdir(parents=True)
    result = pack(folder)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and not list(folder.iterdir())
    (folder / "runs").mkdir()
    with open(tmp_path / held, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = pack(folder, "--remove")
    assert result.returncode == 1 and "a sweep is writing" in result.stderr and result.stderr.count("\n") == 1
    assert not (folder / "packed.csv.gz").exists()
    assert pack(folder).returncode == 0


@pytest.mark.slow
def test_what_is_recognised(tmp_path):
    """The same settings written in another way are; a curve that is not whole, a record cut short are not."""
    assert sweep("--out", tmp_path, *ONE, "--extra=--gamma 0.9 --ent-coef 0.02")[0] == 0
    before = starts(tmp_path)
    same = ("--out", tmp_path, *ONE, "--extra=--ent_coef=2e-2 --no-compile --gamma .9")
    status, stdout, _ = sweep(*same)
    assert status == 0 and "1 of them finished before" in stdout and starts(tmp_path) == before
    curve = next((tmp_path / "runs").glob("*/progress.csv"))
    whole = curve.read_text()
    curve.write_text(whole[: len(whole) // 2])
    status, stdout, _ = sweep(*same)
    assert status == 0 and "0 of them finished before" in stdout and starts(tmp_path) != before
    assert len(curve.read_text().splitlines()) == len(whole.splitlines())


def wait_for(condition, process):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


LONG = (*ONE[:-1], "4000000", "--jobs", "1", "--seeds", "1", "2")


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGHUP, signal.SIGINT))
def test_a_signal_reaches_the_runs(tmp_path, number):
    """Each ends after its update, with its logs whole; the sweep says how to go on, and that it does."""
    seeds = map(str, range(1, 41))  # many that have not begun
    process = start("--out", tmp_path, *LONG[:-2], *seeds, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    record = tmp_path / "runs" / "CartPole-v1__ppo_baseline__1" / "run.json"
    wait_for(record.exists, process)
    time.sleep(1)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 128 + number, stderr
    assert "waiting for 1 runs" in stderr and "goes on later" in stderr and "Traceback" not in stderr
    assert json.loads(record.read_text())["status"] == "interrupted"
    statuses = [run["status"] for run in json.loads((tmp_path / "manifest.json").read_text())["runs"].values()]
    assert statuses == ["interrupted", *["planned"] * 39] and "FAILED" not in stdout


@pytest.mark.slow
def test_killed_runs_go_on_from_their_checkpoints(tmp_path):
    """To what a run that nobody killed ends with."""
    flags = (*ONE[:-1], "30720", "--extra=--checkpoint-interval 10")
    process = start("--out", tmp_path / "killed", *flags, stdout=subprocess.DEVNULL, start_new_session=True)
    folder = tmp_path / "killed" / "runs" / "CartPole-v1__ppo_baseline__1"
    wait_for((folder / "checkpoint.pt").exists, process)
    process.kill()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)
    process.wait()
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    status, stdout, stderr = sweep("--out", tmp_path / "killed", *flags)
    assert status == 0 and "0 of them finished before" in stdout, stderr
    assert "goes on at step" in (tmp_path / "killed" / "logs" / f"{folder.name}.log").read_text()
    assert sweep("--out", tmp_path / "whole", *flags)[0] == 0
    killed, whole = (
        pd.read_csv(tmp_path / name / "runs" / folder.name / "progress.csv").drop(columns="charts/SPS")
        for name in ("killed", "whole")
    )
    pd.testing.assert_frame_equal(killed, whole, check_exact=True)


def test_files_in_the_way(tmp_path):
    """In the place of folders: one line, and they stay."""
    for name in ("runs", "logs", "manifest.json", "references.json", "packed.csv.gz"):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text("mine")
        status, stdout = in_process("--out", out, *ONE)
        assert isinstance(status, str) and status.startswith("error: ") and "\n" not in status, status
        assert str(out / name) in stdout + status and (out / name).read_text() == "mine"


@pytest.mark.slow
def test_a_changed_flag_runs_again(tmp_path):
    assert sweep("--out", tmp_path, *ONE)[0] == 0
    before = starts(tmp_path)
    assert sweep("--out", tmp_path, *ONE, "--extra=--gamma 0.9")[0] == 0
    after = starts(tmp_path)
    assert before.keys() == after.keys() and before != after
    assert json.loads(next((tmp_path / "runs").glob("*/run.json")).read_text())["args"]["gamma"] == 0.9
    record = next((tmp_path / "runs").glob("*/run.json"))
    record.write_text(
        record.read_text().replace('"script_sha256": "', '"script_sha256": "other')
    )  # made by another script
    assert "0 of them finished before" in sweep("--out", tmp_path, *ONE, "--extra=--gamma 0.9")[1]


@pytest.mark.slow
def test_other_settings_are_refused_before_anything_runs(tmp_path):
    """Where they would stay beside the new runs; runs of the same seeds are replaced."""
    assert sweep("--out", tmp_path, *ONE)[0] == 0
    before = snapshot(tmp_path)
    for change in (
        ("--extra=--gamma 0.9",),
        ("--total-timesteps", "2048"),
        ("--total-timesteps", "2048", "--arms", "acpg"),
    ):
        status, _, stderr = sweep("--out", tmp_path, *ONE, "--seeds", "2", "3", *change)
        assert status == 1 and "CartPole-v1__ppo_baseline__1" in stderr and stderr.count("\n") == 1, stderr
        assert snapshot(tmp_path) == before
    assert sweep("--out", tmp_path, *ONE, "--arms", "acpg")[0] == 0


@pytest.mark.slow
def test_an_environment_of_ones_own(tmp_path):
    """An id such as module:MyEnv-v0, through to the report, with its own threshold; its runs on one thread each."""
    (tmp_path / "lamp.py").write_text(
        "import os, sys\n"
        "import gymnasium as gym\n"
        "assert 'ppo_' not in sys.argv[0] or os.environ['OMP_NUM_THREADS'] == '1'\n"
        "made = {'max_episode_steps': 30, 'reward_threshold': 29.0}\n"
        "gym.register('Lamp-v0', 'gymnasium.envs.classic_control:CartPoleEnv', **made)\n"
    )
    environment = ENV | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "2"}
    command = ["bash", str(ROOT / "benchmark.sh"), "--out", str(tmp_path / "out"), *ONE, "--envs", "lamp:Lamp-v0"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| lamp:Lamp-v0 | ppo | baseline | 1 |" in text and "| 29 |" in text


@pytest.mark.slow
def test_a_run_killed_while_it_wrote_its_record(tmp_path):
    half = tmp_path / "runs" / "CartPole-v1__ppo_baseline__1"
    half.mkdir(parents=True)
    (half / "run.json.tmp").write_text('{"acpg_run"')
    status, stdout, stderr = sweep("--out", tmp_path, *ONE)
    assert status == 0, stdout + stderr


@pytest.mark.slow
def test_kill_and_go_on(tmp_path):
    """Killed in the middle of its second run: the first is kept, the orphan left to end or taken over, all is there
    once."""
    flags = ("--out", tmp_path, *ONE[:-1], "120000", "--seeds", "1", "2", "--jobs", "1")
    process = start(*flags, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 200
    second = tmp_path / "runs" / "CartPole-v1__ppo_baseline__2" / "run.json"
    while not second.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = starts(tmp_path)
    status, stdout, stderr = sweep(*flags)
    assert status == 0, stdout + stderr
    assert "1 of them finished before" in stdout and "ppo_baseline 2 is being run by another sweep" in stdout
    after = starts(tmp_path)
    assert len(after) == 2 and after["CartPole-v1__ppo_baseline__1"] == before["CartPole-v1__ppo_baseline__1"]
    assert len(list(second.parent.glob("events.out.tfevents.*"))) == 1
    for record in (tmp_path / "runs").glob("*/run.json"):
        assert json.loads(record.read_text())["status"] == "finished"
        assert len((record.parent / "progress.csv").read_text().splitlines()) == 2 + 59  # of 234 updates, 4 a row


def test_two_sweeps_into_one_folder(tmp_path):
    process = start("--out", tmp_path, *ONE[:-1], "60000", stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (tmp_path / "runs").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    status, _, stderr = sweep("--out", tmp_path, *ONE)
    assert process.poll() is None
    process.kill()
    process.wait()
    assert status == 1 and "another sweep" in stderr and stderr.count("\n") == 1


@pytest.mark.slow
def test_printed_commands_run_anywhere(tmp_path):
    (command,) = commands("--out", tmp_path / "out", *ONE)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for _ in range(2):
        result = subprocess.run(command, cwd=elsewhere, env=ENV, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        found = starts(tmp_path / "out")
    assert found == starts(tmp_path / "out") and len(found) == 1 and not snapshot(elsewhere)
    assert "1 of them finished before" in sweep("--out", tmp_path / "out", *ONE)[1]


@pytest.mark.slow
@pytest.mark.skipif(bool(slurm_node.why_not()), reason=slurm_node.why_not() or "-")
def test_slurm(fragile, tmp_path):
    """A job array on a real single-node SLURM, an arm of which fails, and the report job that waits for its end."""
    with slurm_node.slurm(tmp_path / "slurm") as env:
        out = tmp_path / "out"
        command = ["bash", str(ROOT / "benchmark.sh"), "--out", str(out), *ONE, "--seeds", "1", "2", "--slurm"]
        command += ["--arms", "baseline", "bad=acpg", "--envs", fragile, "--slurm-args=--time=10 --comment='a b'"]
        result = subprocess.run(command, env=ENV | env, capture_output=True, text=True)
        assert result.returncode == 0 and "submitted 4 runs" in result.stdout, result.stderr
        waits = ["squeue", "--noheader", "--name=acpg-report", "--format=%E"]
        assert "afterany" in subprocess.run(waits, env=env, capture_output=True, text=True).stdout
        again = subprocess.run(command, env=ENV | env, capture_output=True, text=True)
        assert again.returncode == 1 and "another sweep" in again.stderr and again.stderr.count("\n") == 1
        deadline = time.monotonic() + 240
        while subprocess.run(["squeue", "-h"], env=env, capture_output=True, text=True).stdout:
            assert time.monotonic() < deadline
            time.sleep(1)
    assert len(starts(out)) == 2, [path.read_text() for path in (out / "logs").iterdir()]
    text = (out / "report.md").read_text()
    assert "2 finished runs" in text and "Missing: 2 runs" in text and "ppo_bad 2: failed" in text
    runs = json.loads((out / "manifest.json").read_text())["runs"]
    assert [run["status"] for _, run in sorted(runs.items())] == ["failed", "failed", "finished", "finished"]
    assert all(run["wall_time"] > 0 for run in runs.values() if run["status"] == "finished")


@pytest.mark.slow
@pytest.mark.skipif(bool(slurm_node.why_not()), reason=slurm_node.why_not() or "-")
def test_a_study_on_slurm(fragile, tmp_path):
    """A chain of arrays to the reports' end on a real SLURM: a part whose tuning fails stops alone and without a loop,
    the next goes on; submitted by hand again, the study tries only what has failed."""
    part = """
[[part]]
name = "{name}"
arms = ["baseline", "{name}=acpg"]
grid = {{ flag = "--learning-rate", values = ["1e-3", "1e-2"] }}
tasks = {{ "{env}" = 1024 }}
seeds = {{ tuning = "101", report = "1" }}
"""
    path, out = tmp_path / "study.toml", tmp_path / "out"
    text = part.format(name="bad", env=fragile) + part.format(name="fine", env="CartPole-v1")
    path.write_text(f"[threshold]\n'{fragile}' = 100\n{text}")
    command = ["bash", str(ROOT / "benchmark.sh"), "--study", str(path), "--out", str(out), "--slurm"]
    with slurm_node.slurm(tmp_path / "slurm") as env:
        made = []
        for submitted in ("submitted 4 runs", "submitted 2 runs"):
            result = subprocess.run(command, env=ENV | env, capture_output=True, text=True)
            assert result.returncode == 0 and submitted in result.stdout, result.stderr
            deadline = time.monotonic() + 400
            while subprocess.run(["squeue", "-h"], env=env, capture_output=True, text=True).stdout:
                assert time.monotonic() < deadline
                time.sleep(1)
            made.append({stage: starts(out / stage) for stage in ("bad/tuning", "fine/tuning", "fine/tuned")})
            assert [len(runs) for runs in made[-1].values()] == [2, 4, 2]
            logs = [log.read_text() for log in out.glob("*/*/logs/slurm-report.out")]
            assert any("2 runs failed: fragile" in log for log in logs), logs
            assert (out / "fine" / "reports" / "tuned" / "report.md").exists()
            assert not (out / "bad" / "reports").exists() and not (out / "bad" / "tuned").exists()
        assert made[0] == made[1]  # nothing that was finished is made again


@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="sbatch is installed")
def test_without_slurm(tmp_path):
    status, _, stderr = sweep("--out", tmp_path / "out", *ONE, "--slurm")
    assert status == 1 and "sbatch" in stderr and stderr.count("\n") == 1


def test_a_run_that_leaves_a_damaged_result_says_what_is_wrong(tmp_path):
    """It ended as it should, so that its log says nothing of it."""
    write_run(tmp_path)
    (path,) = (tmp_path / "runs").iterdir()
    (path / "progress.csv").write_text((path / "progress.csv").read_text().replace("300.0", "inf"))
    job = SimpleNamespace(path=path, log=tmp_path / "logs" / "a.log", command=["echo", "finished"], args={"seed": 1})
    job.record = lambda packed: reading.result_record(path)
    record, why = sweep_module.Runner({}).run(job)
    assert record is None and why.startswith("finished\n") and "infinite values of charts/episodic_return" in why
    job.command = ["sh", "-c", "echo no; exit 3"]
    assert sweep_module.Runner({}).run(job) == (None, "no\n    exit status 3")
