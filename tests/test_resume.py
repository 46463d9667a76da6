"""Runs are not lost: resuming, the folder's lock and name, signals, a full disk, a folder that goes away."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
import torch
from helpers import (
    ACPG,
    BASELINES,
    SCRIPTS,
    WITH_CRITIC,
    algorithm,
    read_progress,
    read_record,
    run_script,
    tiny,
    train,
)

every = pytest.mark.parametrize("script", SCRIPTS)
one = pytest.mark.parametrize("script", ["ppo_acpg"])  # where it is about code that all have, held equal elsewhere
in_processes = pytest.mark.parametrize("script", [ACPG[0], BASELINES[1], ACPG[2]])


class Killed(BaseException):
    """In place of SIGKILL, after which nothing of the script runs any more."""


def killed(monkeypatch, script, env_id, run_dir, *more, after):
    """Run a script that dies like one that is killed, right after `after` entries of its logs."""
    entries = []

    def patch(module):
        log = module.Run.log

        def dies(self, tags, step):
            log(self, tags, step)
            entries.append(step)
            if len(entries) == after:
                self.writer.close()  # its thread would go on in this process
                self.file.close()  # the lock goes with the process
                raise Killed

        module.Run.log = dies
        module.Run.__exit__ = lambda *_: None

    with monkeypatch.context() as context:
        context.setattr(helpers, "patch_script", patch)
        result = run_script(script, env_id, run_dir, *more)
    assert "Killed" in result.stderr, result.stderr
    return result


def flags(script, updates=9, checkpoint=2):
    """Diagnostics at some entries, entries at other updates than checkpoints."""
    more = ("--log-interval", 3, "--diagnostics-interval", 4, "--checkpoint-interval", checkpoint, "--save-model")
    return (*tiny(script, 16, updates), *more, "--max-episode-steps", 16)


def content(run_dir):
    """What a run is: the rows of progress.csv but for what the clock says, and the weights."""
    rows = [{key: value for key, value in row.items() if key != "charts/SPS"} for row in read_progress(run_dir)]
    return rows, torch.load(run_dir / "model.pt", weights_only=True)["agent"]


def same(one, other):
    """Whether two runs are equal bit for bit."""
    (rows, weights), (theirs, other_weights) = content(one), content(other)
    assert weights.keys() == other_weights.keys()
    return rows == theirs and all(torch.equal(weights[name], other_weights[name]) for name in weights)


@every
@pytest.mark.parametrize("after", [2, 3, 5, 6])
def test_resumed_run_equals_an_uninterrupted_one(script, after, tmp_path, monkeypatch):
    """Weights and progress.csv, wherever it was killed; and what is in the event files is what is in progress.csv."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    uninterrupted = train(script, "CartPole-v1", whole, *flags(script))
    killed(monkeypatch, script, "CartPole-v1", cut, *flags(script), after=after)
    assert read_record(cut)["status"] == "running"
    result = train(script, "CartPole-v1", cut, *flags(script), "--resume")
    assert ("starts over" in result.stdout) == (not result.run.saved), result.stdout
    assert len(read_progress(whole)) > 6
    assert same(whole, cut)
    assert read_record(cut)["status"] == "finished" and not (cut / "checkpoint.pt").exists()
    assert read_record(cut)["final_return"] == read_record(whole)["final_return"]
    assert result.run.returns == uninterrupted.run.returns  # of which those before the checkpoint, too, are the last
    assert read_record(cut)["wall_time"] > 0
    steps = [int(row["global_step"]) for row in read_progress(cut)]
    events = helpers.EventAccumulator(str(cut), size_guidance={"scalars": 0}).Reload()
    logged = [event.step for event in events.Scalars("charts/learning_rate")]
    assert logged == steps[1:]


@every
def test_it_is_the_checkpoint_that_is_resumed(script, tmp_path, monkeypatch):
    """The steps before it are not trained again, and a second death is survived like the first."""
    cut = tmp_path / "cut"
    killed(monkeypatch, script, "CartPole-v1", cut, *flags(script), after=5)
    checkpoint = torch.load(cut / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] > 0 and checkpoint["script"] == script
    killed(monkeypatch, script, "CartPole-v1", cut, *flags(script), "--resume", after=1)
    later = torch.load(cut / "checkpoint.pt", weights_only=True)
    assert later["step"] >= checkpoint["step"]
    result = train(script, "CartPole-v1", cut, *flags(script), "--resume")
    assert result.run.saved["step"] == later["step"] and str(later["step"]) in result.stdout
    train(script, "CartPole-v1", tmp_path / "whole", *flags(script))
    assert same(tmp_path / "whole", cut)


@pytest.mark.slow
@pytest.mark.parametrize("script", WITH_CRITIC)
def test_resumed_run_equals_an_uninterrupted_one_compiled(script, tmp_path, monkeypatch):
    """The same with --compile."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(script, "CartPole-v1", whole, *flags(script), "--compile")
    killed(monkeypatch, script, "CartPole-v1", cut, *flags(script), "--compile", after=4)
    assert train(script, "CartPole-v1", cut, *flags(script), "--compile", "--resume").run.saved
    assert same(whole, cut)


@pytest.mark.parametrize("script", ACPG)
@pytest.mark.parametrize("env_id", ["LunarLander-v3", "FrozenLake-v1"])
def test_resume_in_other_environments(script, env_id, tmp_path, monkeypatch):
    """Box2D, which nothing can pickle, and a table; with options that keep state of their own."""
    more = ["--total-timesteps", 2000] if algorithm(script) == "reinforce" else []
    more = (*flags(script), *more, "--max-episode-steps", 1000)
    train(script, env_id, tmp_path / "whole", *more)
    killed(monkeypatch, script, env_id, tmp_path / "cut", *more, after=4)
    assert train(script, env_id, tmp_path / "cut", *more, "--resume").run.saved
    assert same(tmp_path / "whole", tmp_path / "cut")


@in_processes
def test_kill(script, tmp_path):
    """A real SIGKILL, in a process of its own."""
    more = (*flags(script, updates=400), "--log-interval", 10, "--checkpoint-interval", 10)
    process = helpers.start_script(script, "CartPole-v1", tmp_path / "cut", *more, stdout=subprocess.DEVNULL)
    for _ in range(600):
        if process.poll() is not None or (tmp_path / "cut" / "checkpoint.pt").exists():
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert read_record(tmp_path / "cut")["status"] == "running", "it ended before it was killed"
    train(script, "CartPole-v1", tmp_path / "cut", *more, "--resume")
    train(script, "CartPole-v1", tmp_path / "whole", *more)
    assert same(tmp_path / "whole", tmp_path / "cut")


@every
def test_checkpoints_are_part_of_the_run(script, tmp_path):
    """Without --checkpoint-interval nothing changes; with it all episodes begin anew there; none is left at the end."""
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    train(script, "CartPole-v1", plain, *tiny(script, 16, 9), "--max-episode-steps", 16, "--save-model")
    train(script, "CartPole-v1", marked, *flags(script))
    assert same(plain, marked) is False  # other entries, and in PPO and A2C other episodes
    assert not (plain / "checkpoint.pt").exists() and not (marked / "checkpoint.pt").exists()
    weights = [content(run_dir)[1] for run_dir in (plain, marked)]
    equal = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert equal == (algorithm(script) == "reinforce")  # which begins every batch with new episodes anyway


@one
def test_kept_checkpoints(script, tmp_path):
    """--keep-checkpoints keeps each as checkpoints/<step>.pt, and changes nothing else."""
    train(script, "CartPole-v1", tmp_path / "plain", *flags(script), "--save-model")
    train(script, "CartPole-v1", tmp_path / "kept", *flags(script), "--save-model", "--keep-checkpoints")
    weights = [torch.load(tmp_path / name / "model.pt", weights_only=True)["agent"] for name in ("plain", "kept")]
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    kept = [torch.load(path, weights_only=True) for path in (tmp_path / "kept" / "checkpoints").iterdir()]
    steps = {float(row["global_step"]) for row in helpers.read_progress(tmp_path / "kept")}
    assert len({checkpoint["step"] for checkpoint in kept}) == len(kept) >= 2
    assert {checkpoint["step"] for checkpoint in kept} < steps
    assert not (tmp_path / "plain" / "checkpoints").exists()


@one
def test_nothing_to_resume(script, tmp_path):
    """Without a checkpoint it starts over, in a new folder too, and a finished run is left as it is; both are said."""
    result = train(script, "CartPole-v1", tmp_path / "run", *flags(script), "--resume")
    assert "starts over" in result.stdout
    before = helpers.snapshot(tmp_path / "run")
    result = run_script(script, "CartPole-v1", tmp_path / "run", *flags(script), "--resume")
    assert result.status == 0 and "finished" in result.stdout and result.stderr == ""
    assert helpers.snapshot(tmp_path / "run") == before


@one
def test_resume_with_other_arguments_is_refused(script, tmp_path, monkeypatch):
    """One line that names what differs; the folder may have moved."""
    cut = tmp_path / "cut"
    killed(monkeypatch, script, "CartPole-v1", cut, *flags(script), after=4)
    before = helpers.snapshot(cut)
    for more in (("--learning-rate", 1e-3), ("--seed", 2), ("--no-save-model",)):
        result = run_script(script, "CartPole-v1", cut, *flags(script), *more, "--resume")
        assert result.status not in (0, None)
        (line,) = result.stderr.splitlines()
        assert "--resume" in line and more[0].removeprefix("--no-").strip("-").replace("-", "_") in line
        assert helpers.snapshot(cut) == before
    cut.rename(tmp_path / "elsewhere")
    assert train(script, "CartPole-v1", tmp_path / "elsewhere", *flags(script), "--resume").run.saved


@one
@pytest.mark.parametrize("what", ["script", "truncated", "text", "empty", "foreign"])
def test_checkpoints_that_do_not_fit(script, what, tmp_path, monkeypatch):
    """Another version of the script, a damaged file: one line, and nothing is touched."""
    cut = tmp_path / "cut"
    killed(monkeypatch, script, "CartPole-v1", cut, *flags(script), after=4)
    path = cut / "checkpoint.pt"
    if what == "script":
        record = read_record(cut) | {"script_sha256": "0" * 64}
        (cut / "run.json").write_text(json.dumps(record))
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif what == "foreign":
        torch.save({"mine": 1}, path)
    else:
        path.write_text("text" if what == "text" else "")
    before = helpers.snapshot(cut)
    result = run_script(script, "CartPole-v1", cut, *flags(script), "--resume")
    assert result.status not in (0, None)
    (line,) = result.stderr.splitlines()
    assert "--resume" in line and str(cut) in line
    assert helpers.snapshot(cut) == before


# The folder


@in_processes
def test_second_run_in_a_folder(script, tmp_path, monkeypatch):
    """A folder in which a run is writing is refused in one line, by either way to name it, and is left alone."""
    monkeypatch.chdir(tmp_path)
    more = (*tiny(script, 16), "--max-episode-steps", 16)
    train(script, "CartPole-v1", None, *more, "--save-model")
    (folder,) = Path("runs").iterdir()
    before = helpers.snapshot(folder)
    with open(folder / "progress.csv", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for run_dir, own in (
            (None, "--save-model"),
            (folder, "--save-model"),
            (folder, "--resume"),
            (folder, "--cuda"),
        ):
            result = run_script(script, "CartPole-v1", run_dir, *more, own)
            assert result.status not in (0, None)
            (line,) = result.stderr.splitlines()
            assert "--run-dir" in line and str(folder) in line or "--resume" in line
            assert helpers.snapshot(folder) == before
            assert list(Path("runs").iterdir()) == [folder]
    train(script, "CartPole-v1", None, *more, "--save-model")


@in_processes
def test_two_runs_at_a_time(script, tmp_path):
    """The second one, started while the first is training, leaves it to end well."""
    more = (*tiny(script, 16), "--max-episode-steps", 16)
    long = ("--total-timesteps", 50_000_000)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = helpers.start_script(script, "CartPole-v1", tmp_path / "run", *more, *long, **pipes)
    try:
        for _ in range(600):
            if process.poll() is not None or helpers.event_files(tmp_path / "run"):
                break
            time.sleep(0.05)
        result = run_script(script, "CartPole-v1", tmp_path / "run", *more)
        assert result.status not in (0, None)
        assert len(result.stderr.splitlines()) == 1
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert stderr == "" and process.returncode == 128 + signal.SIGTERM
    assert read_record(tmp_path / "run")["args"]["total_timesteps"] == long[1]
    assert len(helpers.event_files(tmp_path / "run")) == 1


@one
def test_other_arguments_get_another_folder(script, tmp_path, monkeypatch):
    """Without --run-dir, only the same arguments replace a run; others go to the next free name, and that is said."""
    monkeypatch.chdir(tmp_path)
    name = f"CartPole-v1__{script}__1"
    kinds = [(), ("--learning-rate", 1e-3), ("--learning-rate", 2e-3)]
    for more in kinds:
        result = train(script, "CartPole-v1", None, *tiny(script), *more)
        assert (f"runs/{name}-" in result.stdout.splitlines()[0]) == bool(more), result.stdout
    folders = [Path("runs") / name, Path("runs") / f"{name}-2", Path("runs") / f"{name}-3"]
    assert sorted(Path("runs").iterdir()) == folders
    rates = [read_record(folder)["args"]["learning_rate"] for folder in folders]
    assert rates == [2.5e-4, 1e-3, 2e-3]
    for folder in folders:
        (folder / "evaluation.json").write_text("{}")
    train(script, "CartPole-v1", None, *tiny(script), *kinds[1])  # replaces its own
    assert sorted(Path("runs").iterdir()) == folders
    assert [(folder / "evaluation.json").exists() for folder in folders] == [True, False, True]
    shutil.rmtree(folders[1])
    folders[1].mkdir()
    (folders[1] / "thesis.tex").write_text("mine")
    train(script, "CartPole-v1", None, *tiny(script), *kinds[1])  # goes past what is nobody's run
    assert [path.name for path in folders[1].iterdir()] == ["thesis.tex"]
    assert read_record(Path("runs") / f"{name}-4")["args"]["learning_rate"] == 1e-3


@one
def test_resume_looks_for_its_run(script, tmp_path, monkeypatch):
    """Without --run-dir, --resume refuses other arguments, too."""
    monkeypatch.chdir(tmp_path)
    killed(monkeypatch, script, "CartPole-v1", None, *flags(script), after=4)
    before = helpers.snapshot("runs")
    result = run_script(script, "CartPole-v1", None, *flags(script), "--gamma", 0.9, "--resume")
    assert result.status not in (0, None) and "gamma" in result.stderr
    assert helpers.snapshot("runs") == before
    assert train(script, "CartPole-v1", None, *flags(script), "--resume").run.saved


@one
def test_replacing_removes_what_speaks_of_the_old_model(script, tmp_path):
    """Model, checkpoint, evaluation, pictures and videos; not what others put there."""
    run_dir = tmp_path / "run"
    train(script, "CartPole-v1", run_dir, *tiny(script), "--save-model")
    (run_dir / "videos").mkdir()
    (run_dir / "checkpoints").mkdir()
    old = ["evaluation.json", "collapse.png", "collapse.gif", "checkpoint.pt", "checkpoints/512.pt", "model.pt.tmp"]
    old += ["videos/evaluation-episode-0.mp4"]
    for name in (*old, "notes.txt"):
        (run_dir / name).write_text("old")
    train(script, "CartPole-v1", run_dir, *tiny(script))
    assert not any((run_dir / name).exists() for name in (*old, "model.pt"))
    assert (run_dir / "notes.txt").read_text() == "old"


def test_names_of_folders():
    """Two environments never share one; what file systems and shells mind is encoded; plain ids stay."""
    from ppo_acpg import run_name

    ids = ["CartPole-v1", "m:ns/E-v0", "m:ns_E-v0", "m/ns:E-v0", "m_ns_E-v0", "m ns E-v0", "m.ns:E-v0", "ü:E-v0", "=3A"]
    names = {run_name(env_id, "ppo_acpg", 1) for env_id in ids}
    assert len(names) == len(ids)
    assert all(re.fullmatch(r"[\w.=-]+", name, re.ASCII) for name in names)
    assert "CartPole-v1__ppo_acpg__1" in names


@one
@pytest.mark.parametrize(
    "text",
    [
        '{"note": "acpg_run"}',
        '["acpg_run"]',
        '"acpg_run"',
        '{"acpg_run": 2, "args": {}}',
        '{"acpg_run": 1}',
        '{"acpg_run": 1, "args": null}',
        "null",
        "[" * 100_000,
        "\x00acpg_run",
    ],
)
def test_what_is_not_a_run_is_left_alone(script, text, tmp_path):
    """A run.json that only mentions our marker is somebody else's."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(text)
    before = helpers.snapshot(folder)
    for more in ((), ("--resume",)):
        result = run_script(script, "ConstantReward", folder, *tiny(script), *more)
        assert result.status not in (0, None)
        assert len(result.stderr.splitlines()) == 1
        assert helpers.snapshot(folder) == before


# Signals


@in_processes
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_end_a_run_like_ctrl_c(script, name, tmp_path):
    """After the update: logs whole, the model saved, status "interrupted", exit status 128 + signal."""
    number = getattr(signal, name)
    run_dir, more = tmp_path / "run", (*flags(script), "--total-timesteps", 50_000_000, "--no-save-model")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = helpers.start_script(script, "CartPole-v1", run_dir, *more, **pipes)
    try:
        for _ in range(600):
            if process.poll() is not None or (run_dir / "checkpoint.pt").exists():
                break
            time.sleep(0.05)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + number, stderr
    assert stderr == "" and "interrupted" in stdout
    record = read_record(run_dir)
    assert record["status"] == "interrupted"
    assert int(read_progress(run_dir)[-1]["global_step"]) == record["global_step"]
    assert (run_dir / "model.pt").exists() and (run_dir / "checkpoint.pt").exists()


@one
def test_terminal_closed(script, tmp_path):
    """The signal that a closed terminal sends, with nowhere left to print to."""
    run_dir = tmp_path / "run"
    command = [sys.executable, str(helpers.ROOT / f"{script}.py"), "--total-timesteps", "50000000"]
    process, terminal = pty.fork()
    if process == 0:
        os.execv(command[0], [*command, "--run-dir", str(run_dir)])
    try:
        for _ in range(600):
            if select.select([terminal], [], [], 0.05)[0]:
                os.read(terminal, 1000)
            if (run_dir / "progress.csv").exists() and len(read_progress(run_dir)) > 2:
                break
        os.close(terminal)
        for _ in range(300):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                break
            time.sleep(0.1)
        assert ended and os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    finally:
        if not ended:
            os.kill(process, signal.SIGKILL)
    assert read_record(run_dir)["status"] == "interrupted" and (run_dir / "model.pt").exists()


@pytest.mark.parametrize("script", ["reinforce_acpg"])
def test_nohup(script, tmp_path):
    """A run that is told to ignore SIGHUP does."""
    command = ["nohup", sys.executable, str(helpers.ROOT / f"{script}.py"), "--total-timesteps", "50000000"]
    process = subprocess.Popen(
        [*command, "--run-dir", tmp_path / "run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for _ in range(600):
            if process.poll() is not None or helpers.event_files(tmp_path / "run"):
                break
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM


@every
def test_second_signal_ends_at_once(script, tmp_path):
    """Also in the midst of a rollout that would go on for ever."""
    result = run_script(
        script, "Interrupted", tmp_path / "run", *tiny(script), "--env-kwargs", '{"step": 20, "times": 2}'
    )
    assert result.status == 128 + signal.SIGINT
    record = read_record(tmp_path / "run")
    assert record["status"] == "interrupted" and record["global_step"] <= 40


# A full disk, a folder that is gone


def limited(script, run_dir, limit, *more):
    """Run a script in a process whose files must not grow beyond `limit` bytes."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    code += f"import runpy, sys; sys.argv[0] = {str(helpers.ROOT / script)!r} + '.py'\n"
    code += "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, *helpers.flags("CartPole-v1", run_dir, *more)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@in_processes
@pytest.mark.parametrize("limit", [0, 600, 3000, 6000, 20_000])
def test_full_disk(script, limit, tmp_path):
    """At the start or midway: one line, non-zero exit, no half-written file, and the folder can be used again."""
    more = (*flags(script, updates=30), "--log-interval", 1)
    result = limited(script, tmp_path / "run", limit, *more)
    assert result.returncode not in (0, None)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "File too large" in result.stderr
    for name in ("model.pt", "checkpoint.pt"):
        if (tmp_path / "run" / name).exists():
            torch.load(tmp_path / "run" / name, weights_only=True)
    if (tmp_path / "run" / "run.json").exists():
        assert read_record(tmp_path / "run")["status"] in ("running", "failed")
    train(script, "CartPole-v1", tmp_path / "run", *more)
    assert not list((tmp_path / "run").glob("*.tmp"))


@every
@pytest.mark.parametrize("checkpoint", [0, 1])
def test_folder_removed(script, checkpoint, tmp_path, monkeypatch):
    """While training: one line, non-zero exit."""

    def patch(module):
        log = module.Run.log

        def removes(self, tags, step):
            log(self, tags, step)
            if step > 32:
                shutil.rmtree(self.path, ignore_errors=True)

        module.Run.log = removes

    monkeypatch.setattr(helpers, "patch_script", patch)
    more = (*tiny(script, 16, 8), "--max-episode-steps", 16, "--checkpoint-interval", checkpoint)
    result = run_script(script, "CartPole-v1", tmp_path / "run", *more)
    assert result.status not in (0, None)
    (line,) = result.stderr.splitlines()
    assert "No such file" in line and str(tmp_path / "run") in line
    assert not (tmp_path / "run").exists()
