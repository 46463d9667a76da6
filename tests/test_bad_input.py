"""What cannot work ends with one clear line, a non-zero exit status and nothing half-written."""

import dataclasses
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from operator import attrgetter

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from helpers import (
    ACPG,
    BASELINES,
    PAIRS,
    SCRIPTS,
    WITH_CRITIC,
    algorithm,
    read_progress,
    read_record,
    run_script,
    tiny,
    train,
)
from tensorboard.summary.writer.event_file_writer import EventFileWriter

every = pytest.mark.parametrize("script", SCRIPTS)
in_processes = pytest.mark.parametrize(  # each imports torch anew; the twins' main blocks are the same
    "script", [*ACPG, *(pytest.param(script, marks=pytest.mark.slow) for script in BASELINES)]
)
COUNTS = {  # and those that all scripts have
    "ppo": ("num-steps", "num-minibatches", "update-epochs"),
    "a2c": ("num-steps",),
    "reinforce": ("num-episodes", "num-minibatches", "minibatch-size", "update-epochs"),
    "trpo": ("num-steps", "num-minibatches", "update-epochs", "cg-iterations", "line-search-steps"),
}
SHARED_COUNTS = ("total-timesteps", "num-envs", "feature-dim", "max-episode-steps", "torch-threads", "log-interval")
POSITIVE = {
    "ppo": ("clip-coef",),
    "a2c": (),
    "reinforce": (),
    "trpo": ("max-kl",),
}
ZERO_OR_MORE = {
    "ppo": ("vf-coef", "target-kl"),
    "a2c": ("vf-coef",),
    "reinforce": (),
    "trpo": ("damping",),
}


def refused(script, env_id, run_dir, *more):
    """The one line on stderr with which the script turns its command line down, having created nothing."""
    siblings = set(run_dir.parent.iterdir())
    result = run_script(script, env_id, run_dir, *more)
    assert result.status not in (0, None), f"not refused: {result.stdout}"
    assert "Traceback" not in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stdout == ""
    assert set(run_dir.parent.iterdir()) == siblings
    return result.stderr


def mentions(line, argument):
    """Whether a message names an argument, as --num-envs or num_envs."""
    return argument.strip("-").replace("-", "_") in line.replace("-", "_")


@every
@pytest.mark.parametrize(
    "env_id", ["NoSuchEnv-v0", "CartPole-v99", "probe_envs:NoSuchEnv-v0", "no_such_module:NoSuchEnv-v0", "not an id!"]
)
def test_unknown_environment(script, env_id, tmp_path):
    """An environment, version or module that does not exist, or no id at all."""
    line = refused(script, env_id, tmp_path / "run", *tiny(script))
    assert mentions(line, "--env-id") and env_id in line


@every
@pytest.mark.parametrize(
    ("env_id", "package"),
    [
        ("LunarLander-v3", "Box2D"),
        ("HalfCheetah-v5", "mujoco"),
        ("phys2d/CartPole-v1", "jax"),
    ],
)
def test_missing_extra(script, env_id, package, tmp_path, monkeypatch):
    """An environment of gymnasium's whose extra is not installed: the message says what to type."""
    for name in list(sys.modules):
        if re.match(rf"gymnasium\.envs\.(box2d|mujoco|phys2d|functional)|{package}(\.|$)", name):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(script, env_id, tmp_path / "run", *tiny(script))
    assert env_id in line
    assert "pip install" in line


@every
@pytest.mark.parametrize(
    ("env_id", "what"),
    [
        ("BoxAction", "action"),
        ("Pendulum-v1", "action"),
        ("MultiDiscreteAction", "action"),
        ("TextObservation", "observation"),
        ("DictTextObservation", "observation"),
        ("GraphObservation", "observation"),
        ("SequenceObservation", "observation"),
        ("ChannelsFirst", "channels first"),
    ],
)
def test_unsupported_spaces(script, env_id, what, tmp_path):
    """Continuous and multiple actions; texts, graphs and sequences, also inside others; images the wrong way round."""
    line = refused(script, env_id, tmp_path / "run", *tiny(script))
    assert env_id in line and what in line.lower() and "wrap" in line


@every
@pytest.mark.parametrize("value", [0, -128])
def test_counts(script, value, tmp_path):
    """Zero and negative counts."""
    for count in (*SHARED_COUNTS, *COUNTS[algorithm(script)]):
        line = refused(script, "CartPole-v1", tmp_path / "run", *tiny(script), f"--{count}", value)
        assert mentions(line, count) and str(value) in line


@every
@pytest.mark.parametrize(
    "kind",
    ["positive", "zero or more", "fraction", "seed", "interval"],
)
def test_out_of_range(script, kind, tmp_path):
    """Rates, norms, coefficients and discounts that mean nothing."""
    layer = ("etf-scale", "feature-gain") if script in ACPG else ()
    options, values = {
        "positive": (("learning-rate", "max-grad-norm", *layer, *POSITIVE[algorithm(script)]), (0, -1, "inf", "nan")),
        "zero or more": (("ent-coef", *ZERO_OR_MORE[algorithm(script)]), (-0.1, "inf", "nan")),
        "fraction": (("gamma", *(("gae-lambda",) if script in WITH_CRITIC else ())), (-0.1, 1.1, "inf", "nan")),
        "seed": (("seed",), (-1, 2**32)),
        "interval": (("diagnostics-interval",), (-1,)),
    }[kind]
    for option in options:
        for value in values:
            line = refused(script, "CartPole-v1", tmp_path / "run", *tiny(script), f"--{option}={value}")
            assert mentions(line, option) and str(value) in line


@every
def test_every_number_is_bounded(script, tmp_path):
    """Of each option that takes a number, one is refused: no option is without a bound."""
    spaces = {field.name: str(field.type) for field in dataclasses.fields(importlib.import_module(script).Args)}
    numbers = [name for name, kind in spaces.items() if re.search("int|float", kind)]
    tested = (
        *SHARED_COUNTS,
        *COUNTS[algorithm(script)],
        *POSITIVE[algorithm(script)],
        *ZERO_OR_MORE[algorithm(script)],
    )
    assert {name.replace("-", "_") for name in tested} < set(numbers)
    for name in numbers:
        line = refused(script, "CartPole-v1", tmp_path / "run", f"--{name.replace('_', '-')}=-1")
        assert mentions(line, name) and "-1" in line


@every
def test_bounds_themselves_are_allowed(script, tmp_path):
    """Zero where it means something, and the largest seed."""
    zero = ("gamma", "ent-coef", *ZERO_OR_MORE[algorithm(script)], *(("gae-lambda",) if script in WITH_CRITIC else ()))
    flags = [f"--{name}=0" for name in zero]
    train(script, "ConstantReward", tmp_path / "run", *tiny(script), *flags, "--seed", 0, "--diagnostics-interval", 0)
    ones = ("--gamma", 1, *(("--gae-lambda", 1) if script in WITH_CRITIC else ()), "--seed", 2**32 - 1)
    train(script, "ConstantReward", tmp_path / "run", *tiny(script), *ones)


@pytest.mark.parametrize("script", PAIRS[0])
@pytest.mark.parametrize(
    "sizes", [("--num-minibatches", 3), ("--num-envs", 3, "--num-steps", 5), ("--num-envs", 1, "--num-steps", 2)]
)
def test_indivisible_batch(script, sizes, tmp_path):
    """A batch that does not divide into the minibatches."""
    assert mentions(refused(script, "CartPole-v1", tmp_path / "run", *sizes), "num-minibatches")


@every
def test_intervals_need_not_fit(script, tmp_path):
    """Diagnostics that are due between two entries of the logs wait for the next one, and may be rarer than the run."""
    flags = (*tiny(script, updates=5), "--log-interval", 2, "--diagnostics-interval")
    for interval, due in ((3, (0, 128, 160)), (1, (0, 64, 128, 160)), (1000, (0, 160))):
        train(script, "ConstantReward", tmp_path / "run", *flags, interval)
        rows = read_progress(tmp_path / "run")
        assert tuple(int(row["global_step"]) for row in rows if row["collapse/feature_norm"]) == due


@pytest.mark.parametrize("script", PAIRS[2])
def test_two_baselines(script, tmp_path):
    """REINFORCE's normalisation would take away what the running baseline subtracts."""
    line = refused(script, "ConstantReward", tmp_path / "run", *tiny(script), "--norm-returns")
    assert mentions(line, "norm-returns") and mentions(line, "running-baseline")


@pytest.mark.parametrize(
    ("script", "size"), [(script, size) for pair, size in zip(PAIRS, (512, 40), strict=False) for script in pair]
)
def test_less_than_one_batch(script, size, tmp_path):
    """Fewer steps than one batch of the default size; one batch is enough."""
    for steps in (1, size - 1):
        line = refused(script, "ConstantReward", tmp_path / "run", "--total-timesteps", steps)
        assert all(mentions(line, name) for name in ("total-timesteps", "num-envs", "num-steps"))
    train(script, "ConstantReward", tmp_path / "run", "--total-timesteps", size)


@pytest.mark.parametrize("script", PAIRS[2])
def test_less_than_one_batch_of_episodes(script, tmp_path):
    """How long REINFORCE's first batch takes is known only once it has been played: then, too, one line."""
    flags = ("--num-envs", 2, "--num-episodes", 2, "--save-model")
    result = run_script(script, "Terminated", tmp_path / "run", *flags, "--total-timesteps", 10)
    assert result.status not in (0, None)
    (line,) = result.stderr.splitlines()
    assert mentions(line, "total-timesteps")
    assert read_record(tmp_path / "run")["status"] == "failed"
    train(script, "Terminated", tmp_path / "run", *flags, "--total-timesteps", 12)


@pytest.mark.parametrize(("baseline", "acpg"), PAIRS)
def test_more_actions_than_the_simplex_takes(baseline, acpg, tmp_path):
    """K <= feature_dim + 1, and only ACPG minds."""
    line = refused(acpg, "Bandit", tmp_path / "run", *tiny(acpg), "--feature-dim", 4)
    assert mentions(line, "feature-dim") and "6" in line and "4" in line
    line = refused(acpg, "Bandit", tmp_path / "run", *tiny(acpg), "--feature-dim", 4, "--action-layer", "learned")
    assert mentions(line, "feature-dim")
    train(acpg, "Bandit", tmp_path / "five", *tiny(acpg), "--feature-dim", 5)
    train(baseline, "Bandit", tmp_path / "four", *tiny(baseline), "--feature-dim", 4)


@pytest.mark.parametrize("script", ACPG)
def test_one_action(script, tmp_path):
    """A simplex needs two actions."""
    assert "action" in refused(script, "Bandit", tmp_path / "run", *tiny(script), "--env-kwargs", '{"actions": 1}')


@every
@pytest.mark.parametrize("kwargs", ["{", "actions=3", "{'actions': 3}", "", "[1]", "3", '"actions"', "null"])
def test_bad_json(script, kwargs, tmp_path):
    """--env-kwargs that is not JSON, or not an object."""
    assert mentions(refused(script, "Bandit", tmp_path / "run", *tiny(script), "--env-kwargs", kwargs), "env-kwargs")


@every
@pytest.mark.parametrize("kwargs", ['{"no_such_thing": 1}', '{"max_episode_steps": 5}'])
def test_wrong_environment_arguments(script, kwargs, tmp_path):
    """JSON that the environment does not take."""
    line = refused(script, "Bandit", tmp_path / "run", *tiny(script), "--env-kwargs", kwargs)
    assert re.search(r"\w+", kwargs)[0] in line


@every
def test_environment_arguments_arrive(script, tmp_path):
    """And JSON that it does take."""
    agent = train(script, "Bandit", tmp_path / "run", *tiny(script), "--env-kwargs", '{"actions": 3}').agent
    assert agent.logits(torch.zeros(1, 3)).shape == (1, 3)


@every
def test_unwritable_run_directory(script, tmp_path):
    """A run folder below, or in the place of, a file."""
    file = tmp_path / "file"
    file.write_text("mine")
    for run_dir in (file / "run", file):
        result = run_script(script, "CartPole-v1", run_dir, *tiny(script))
        assert result.status not in (0, None)
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert mentions(result.stderr, "run-dir") and str(run_dir) in result.stderr
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


@every
def test_reward_not_finite(script, tmp_path):
    """A NaN stops the run, says at which update, and the weights from before that update are kept."""
    flags = (*tiny(script, 5), "--num-envs", 1, "--no-anneal-lr", "--env-kwargs", '{"where": "reward", "after": 40}')
    result = run_script(script, "NotFinite", tmp_path / "run", *flags, "--total-timesteps", 96)
    assert result.status not in (0, None)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert re.search(r"update\D{0,3}3\b", result.stderr) and "reward" in result.stderr  # steps 33 to 48, or 31 to 45
    saved = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["agent"]
    before = train(script, "NotFinite", tmp_path / "before", *flags, "--total-timesteps", 32).agent.state_dict()
    assert all(torch.equal(saved[name], before[name]) for name in before)
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert read_record(tmp_path / "run")["status"] == "failed"
    size = 15 if algorithm(script) == "reinforce" else 16  # three episodes of five steps, or a rollout
    assert [int(row["global_step"]) for row in read_progress(tmp_path / "run")] == [0, size, 2 * size]


@pytest.mark.parametrize("script", BASELINES)
def test_not_finite_learning_rate(script, tmp_path):
    """Weights that a step drives to infinity are caught as NaN rewards are."""
    flags = (*tiny(script, 16), "--max-episode-steps", 16, "--learning-rate", 1e38)
    result = run_script(script, "CartPole-v1", tmp_path / "run", *flags)
    assert result.status not in (0, None)
    assert re.search(r"update\D{0,3}[12]\b", result.stderr.splitlines()[-1]), result.stderr
    saved = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["agent"]
    assert all(tensor.isfinite().all() for tensor in saved.values())


@in_processes
def test_interrupt(script, tmp_path):
    """Ctrl-C: exit status 130, nothing on stderr, logs that read; and no progress bar where there is no terminal."""
    flags = (*tiny(script, 3), "--total-timesteps", 10_000_000, "--diagnostics-interval", 1000)
    process = helpers.start_script(
        script, "Terminated", tmp_path / "run", *flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        events, size = [], 0
        for _ in range(600):
            events = helpers.event_files(tmp_path / "run")
            # the event file grows when its writer first flushes; its first record is there from the start
            size = events[0].stat().st_size if events else 0
            if process.poll() is not None or size > 2000:
                break
            time.sleep(0.1)
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert stderr == ""
    assert str(tmp_path / "run") in stdout
    assert read_record(tmp_path / "run")["status"] == "interrupted"
    rows = read_progress(tmp_path / "run")
    events, _ = helpers.read_events(tmp_path / "run")
    assert events["losses/policy_loss"][-1][0] > 0
    assert int(rows[-1]["global_step"]) == max(points[-1][0] for points in events.values())
    assert torch.load(tmp_path / "run" / "model.pt", weights_only=True)["script"] == script


@every
@pytest.mark.parametrize("step", ["null", 1, 40])
def test_interrupt_in_an_environment(script, step, tmp_path):
    """Ctrl-C in the first reset, the first step or the third rollout ends as cleanly."""
    flags = (*tiny(script), "--num-envs", 1, "--env-kwargs", f'{{"step": {step}}}')
    result = run_script(script, "Interrupted", tmp_path / "run", *flags)
    assert result.status == 130
    assert result.stderr == ""
    if step == 40:
        assert read_record(tmp_path / "run")["status"] == "interrupted"
        ends = (32, 40) if algorithm(script) == "reinforce" else (32, 48)  # an incomplete batch is not waited for
        assert int(read_progress(tmp_path / "run")[-1]["global_step"]) in ends
        assert len(helpers.event_files(tmp_path / "run")) == 1


@every
@pytest.mark.parametrize(
    "call",
    [
        "nn.init.orthogonal_",  # the network, before there is a run
        "cat",  # the optimizer, after there is one
    ],
)
def test_interrupt_while_setting_up(script, call, tmp_path, monkeypatch):
    """Ctrl-C while network and optimizer are set up ends as cleanly."""
    where, _, name = call.rpartition(".")
    where = attrgetter(where)(torch) if where else torch
    original, calls = getattr(where, name), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, interrupted)
    result = run_script(script, "ConstantReward", tmp_path / "run", *tiny(script))
    assert calls and result.status == 130
    assert result.stderr == ""
    assert not (tmp_path / "run").exists() or read_record(tmp_path / "run")["status"] == "interrupted"


@every
def test_interrupt_while_logging(script, tmp_path, monkeypatch):
    """Ctrl-C does not tear a call of the event writer, whose queue can stay locked then, so that closing it hangs."""
    calls, torn = [], []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 20:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            except KeyboardInterrupt:
                torn.append(args)
                raise
        return add_event(*args, **kwargs)

    add_event = EventFileWriter.add_event
    monkeypatch.setattr(EventFileWriter, "add_event", interrupted)
    result = run_script(script, "Terminated", tmp_path / "run", *tiny(script, 3, updates=30))
    assert len(calls) >= 20
    assert result.status == 130
    assert result.stderr == ""
    assert not torn
    assert read_record(tmp_path / "run")["status"] == "interrupted"


@in_processes
def test_real_exit(script, tmp_path):
    """The same in a process of its own: one line on stderr, exit status 1, no traceback."""
    process = helpers.start_script(
        script, "CartPole-v1", tmp_path / "run", "--num-envs", 0, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert stdout == "" and len(stderr.splitlines()) == 1 and mentions(stderr, "num-envs")
    assert not (tmp_path / "run").exists()


def test_probe_environments_conform():
    """The probes follow gymnasium's interface, so that what they show is the scripts' doing."""
    for name in ("Terminated", "OffsetActions", "DiscreteObservation", "Clock", "Stay", "DelayedAction"):
        env = gym.make(f"probe_envs:{name}-v0")
        obs, _ = env.reset(seed=1)
        assert env.observation_space.contains(obs)
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert env.observation_space.contains(obs) and np.isfinite(reward)
        assert (terminated, truncated).count(True) <= 1
