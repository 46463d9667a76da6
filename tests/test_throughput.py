"""studies/throughput.py: how it reads a script's progress and its parts, and a race from start to end."""

import json
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from helpers import ROOT, SCRIPTS

import a2c_baseline
import ppo_baseline
import throughput

COMMAND = [sys.executable, str(ROOT / "studies" / "throughput.py")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_section_of_a_script_is_found(script):
    """The script as it was, but for a call in place of each comment, so that lines keep their numbers."""
    source = (ROOT / f"{script}.py").read_text()
    definitions, main = throughput.instrument(source)
    assert main.count("\n") == source.count("\n") and 'if __name__ == "__main__":' not in definitions
    assert main.count(" clock(") == 4 - script.startswith("reinforce") and "clock(" not in definitions
    assert set(throughput.PARTS) == {*throughput.SECTIONS.values(), "environments"}


def test_a_script_without_its_comments_is_refused():
    with pytest.raises(ValueError, match="# Update"):
        throughput.instrument((ROOT / "ppo_acpg.py").read_text().replace("            # Update", "            # Learn"))


def test_the_clock_adds_up_by_part():
    clock, start = throughput.Clock(), time.process_time()
    for part in ("acting", "update", "acting", "the rest"):
        clock(part)
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass
    clock("end")
    total = time.process_time() - start
    assert sum(clock.seconds.values()) == pytest.approx(total, abs=0.01)
    assert clock.seconds["acting"] == pytest.approx(2 * clock.seconds["update"], rel=0.2)
    assert 0.05 <= clock.first_update < 5


def test_progress(tmp_path):
    """Of a run the last whole line's step, of SB3 the file's, of what is not there yet none."""
    run, sb3 = tmp_path / "run", tmp_path / "sb3"
    assert throughput.progress(run) == (0, 0)
    run.mkdir()
    (run / "progress.csv").write_text("global_step,charts/SPS\n")
    assert throughput.progress(run) == (0, 0)
    (run / "progress.csv").write_text("global_step,charts/SPS\n0,\n2048,3.5\n40")
    assert throughput.progress(run)[1] == 2048
    sb3.write_text("512")
    assert throughput.progress(sb3) == (sb3.stat().st_mtime_ns, 512)


def test_a_race(tmp_path):
    """A program that takes twice the time a step has half the speed."""
    (tmp_path / "program.py").write_text(
        "import pathlib, sys, time\n"
        "for step in range(1, 200):\n"
        "    end = time.process_time() + 0.01 * int(sys.argv[2])\n"
        "    while time.process_time() < end:\n"
        "        pass\n"
        "    pathlib.Path(sys.argv[1] + '.tmp').write_text(str(100 * step))\n"
        "    pathlib.Path(sys.argv[1] + '.tmp').rename(sys.argv[1])\n"
    )
    paths = [tmp_path / "one", tmp_path / "two"]
    programs = {p: [sys.executable, str(tmp_path / "program.py"), str(p), str(k + 1)] for k, p in enumerate(paths)}
    one, two = throughput.race(programs, throughput.Args(warmup=1000))
    assert 8000 < one <= 10100 and one / two == pytest.approx(2, rel=0.1)


@pytest.mark.slow
def test_nothing_is_left_of_a_race_that_is_ended():
    """Not even the programs that are stopped at the time."""
    command = [*COMMAND, "--algorithm", "reinforce", "--env-id", "Acrobot-v1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while len(own := children.read_text().split()) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 143 and not any(Path(f"/proc/{child}").exists() for child in own)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["CartPole-v1", "environments.minatar:MinAtar-Breakout-v0"])
@pytest.mark.parametrize("algorithm", ["ppo", "a2c"])
def test_stable_baselines3_runs_with_the_scripts_hyperparameters(algorithm, env_id, tmp_path):
    """To the end; the last entry is that of the last rollout's start."""
    pytest.importorskip("stable_baselines3", reason="needs pip install stable-baselines3==2.9.2")
    if "minatar" in env_id:
        pytest.importorskip("minatar", reason="pip install -r requirements-environments.txt")
    command = [*COMMAND, "--sb3", str(tmp_path / "steps"), "--algorithm", algorithm, "--env-id", env_id]
    command += ["--total-timesteps", "128", "--warmup", "64", "--extra=--num-envs 4 --num-steps 16"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int((tmp_path / "steps").read_text()) == 64


@pytest.mark.slow
@pytest.mark.parametrize("script", [ppo_baseline, a2c_baseline])
def test_on_images_stable_baselines3_has_the_scripts_networks(script):
    """As many parameters of the same shapes, but the order."""
    policies = pytest.importorskip("stable_baselines3.common.policies", reason="pip install stable-baselines3==2.9.2")
    space, actions = gym.spaces.Box(0, 1, (10, 10, 4), np.float32), gym.spaces.Discrete(6)
    kwargs = throughput.image_policy(script) | {"normalize_images": False}
    theirs = policies.ActorCriticPolicy(space, actions, lambda remaining: 1e-3, **kwargs)
    ours = script.Agent(space, actions, script.Args())
    assert sorted(p.shape for p in theirs.parameters()) == sorted(p.shape for p in ours.parameters())


def test_parts(tmp_path):
    """What the parts take sums to what the run takes, and steps are counted after the warm-up."""
    command = [*COMMAND, "--instrumented", "1024", "reinforce_acpg.py", "--total-timesteps", "8192", "--no-cuda"]
    subprocess.run([*command, "--run-dir", str(tmp_path)], check=True, capture_output=True)
    parts, run = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("parts", "run"))
    assert {"acting", "environments", "update", "the rest"} <= set(parts["seconds"])
    assert 4096 < parts["steps"] <= 8192 - 1024 and parts["first_update"] > 0
    assert 0.2 * run["wall_time"] < sum(parts["seconds"].values()) < run["wall_time"]


@pytest.mark.slow
def test_the_command(tmp_path):
    flags = ["--algorithm", "reinforce", "--rounds", "1", "--total-timesteps", "20000", "--warmup", "2000"]
    flags += ["--csv", str(tmp_path / "a" / "speeds.csv")]
    result = subprocess.run([*COMMAND, *flags], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == ["reinforce_baseline.py", "reinforce_acpg.py"]
    header, row = (tmp_path / "a" / "speeds.csv").read_text().splitlines()
    assert header == "round,reinforce_baseline.py,reinforce_acpg.py"
    assert [f"{float(x):,.0f}" for x in row.split(",")[1:]] == [line.split(" | ")[1].split()[0] for line in lines]
