"""What a run does and leaves behind: reproducibility, pairing of twins, files, checkpoints, logged tags."""

import itertools
import json
import math
import re
import subprocess
import sys
import types
from types import SimpleNamespace

import gymnasium as gym
import helpers
import numpy as np
import probe_envs
import pytest
import torch
from helpers import (
    ACPG,
    ALGORITHMS,
    FROZEN,
    PAIRS,
    SCRIPTS,
    WITH_CRITIC,
    advantages_by_hand,
    algorithm,
    frozen,
    read_events,
    read_progress,
    record_gradients,
    run_script,
    steps_by_env,
    tiny,
    train,
    trained_by_optimizer,
)

every = pytest.mark.parametrize("script", SCRIPTS)
with_critic = pytest.mark.parametrize("script", WITH_CRITIC)
fixed_layer = pytest.mark.parametrize("script", ACPG)
pairs = pytest.mark.parametrize(("baseline", "acpg"), PAIRS, ids=ALGORITHMS)


@pytest.fixture(autouse=True)
def forget_calls():
    """Start each test with no recorded calls."""
    probe_envs.CALLS.clear()


def weights(result):
    """The final state dict, copied."""
    return {name: tensor.detach().clone() for name, tensor in result.agent.state_dict().items()}


def same(one, other):
    """Whether two state dicts are identical, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_speed(rows):
    """Rows of progress.csv without the one column that depends on the clock."""
    return [{tag: value for tag, value in row.items() if tag != "charts/SPS"} for row in rows]


def first_actions(script, tmp_path, *more):
    """What each environment was told to do by an untrained policy that only has its noise to choose by."""
    probe_envs.CALLS.clear()
    train(script, "Silence", tmp_path / "run", *tiny(script, 6), *frozen(script), *more)
    return [[call.action for call in calls] for calls in steps_by_env()]


# Reproducibility


@every
def test_same_seed_same_run(script, tmp_path):
    """The same seed gives the same progress.csv and weights; another seed gives others."""
    flags = (*tiny(script, 16, updates=24), "--diagnostics-interval", 2)
    one, again, other = (
        (weights(train(script, "CartPole-v1", tmp_path / name, *flags, "--seed", seed)), read_progress(tmp_path / name))
        for name, seed in (("one", 3), ("again", 3), ("other", 4))
    )
    assert same(one[0], again[0])
    assert without_speed(one[1]) == without_speed(again[1])
    assert not same(one[0], other[0])
    assert without_speed(one[1]) != without_speed(other[1])


@every
def test_diagnostics_do_not_change_training(script, tmp_path):
    """Measuring at every update or never gives the same weights."""
    flags = tiny(script, 16, updates=16)
    often, never = (
        weights(train(script, "CartPole-v1", tmp_path / str(interval), *flags, "--diagnostics-interval", interval))
        for interval in (1, 0)
    )
    assert same(often, never)


@every
def test_environments_of_all_seeds_are_independent(script, tmp_path):
    """No two environments of any two runs are reset with one seed, and resets within a run keep their own stream.

    REINFORCE resets all environments before each update, each time with seeds of their own.
    """
    seeds, flags = [], (*tiny(script, 6), "--num-envs", 4, "--diagnostics-interval", 0)
    for seed in range(8):
        probe_envs.CALLS.clear()
        train(script, "Clock", tmp_path / "run", *flags, "--seed", seed)
        resets = {}
        for call in probe_envs.CALLS:
            if call.kind == "reset":
                resets.setdefault(call.env, []).append(call.seed)
        assert len(resets) == 4
        for own in resets.values():
            assert own[0] is not None and None in own
            given = [one for one in own if one is not None]
            assert len(given) == 1 or script not in WITH_CRITIC
            seeds += given
    assert len(seeds) == 32 or (script not in WITH_CRITIC and len(seeds) > 32)
    assert len(set(seeds)) == len(seeds)


# Pairing


@pairs
def test_twins_start_from_the_same_weights(baseline, acpg, tmp_path):
    """With one seed, critic and backbone are the same numbers, up to the gain of the last hidden layer."""
    results = [
        train(script, "Bandit", tmp_path / script, *tiny(script), *frozen(script)) for script in (baseline, acpg)
    ]
    gain = results[1].args.feature_gain
    ours, theirs = (weights(result) for result in results)
    shared = [name for name in ours if name in theirs and not name.startswith("action_layer")]
    scaled = [name for name in shared if name.endswith("weight") and not torch.equal(ours[name], theirs[name])]
    assert len([name for name in shared if name.endswith("weight")]) == (5 if baseline in WITH_CRITIC else 2)
    assert len(scaled) == 1, "only the last hidden layer's weights may differ"
    torch.testing.assert_close(ours[scaled[0]] / math.sqrt(2), theirs[scaled[0]] / gain, rtol=1e-5, atol=1e-7)


@pairs
def test_twins_share_features_and_values_at_equal_gain(baseline, acpg, tmp_path):
    """With the baseline's own gain and constraint, untrained features and values agree exactly."""
    same_gain = ("--feature-gain", repr(math.sqrt(2)), "--feature-constraint", "tanh")
    ours = train(baseline, "Bandit", tmp_path / "baseline", *tiny(baseline), *frozen(baseline)).agent
    theirs = train(acpg, "Bandit", tmp_path / "acpg", *tiny(acpg), *frozen(acpg), *same_gain).agent
    obs = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for function in ("features", "value") if baseline in WITH_CRITIC else ("features",):
            torch.testing.assert_close(getattr(ours, function)(obs), getattr(theirs, function)(obs), rtol=0, atol=1e-6)


@pairs
def test_twins_share_environment_resets(baseline, acpg, tmp_path):
    """With one seed, both scripts reset their environments with the same seeds, another for each environment."""
    starts = {}
    for script in (baseline, acpg):
        probe_envs.CALLS.clear()
        train(script, "Clock", tmp_path / script, *tiny(script, 6))
        starts[script] = [call.seed for call in probe_envs.CALLS[:2]]
        assert [call.kind for call in probe_envs.CALLS[:3]] == ["reset", "reset", "step"]
    assert starts[baseline] == starts[acpg]
    assert None not in starts[baseline] and len(set(starts[baseline])) == 2


@pairs
def test_action_noise_is_paired(baseline, acpg, tmp_path):
    """Where the logits are equal, both scripts and all controls take the same actions, however often they update."""
    expected = first_actions(baseline, tmp_path)
    assert len(expected) == 2 and len(set(itertools.chain(*expected))) == 6
    assert first_actions(acpg, tmp_path) == expected
    assert first_actions(acpg, tmp_path, "--action-layer", "random", "--feature-constraint", "ball") == expected
    assert first_actions(acpg, tmp_path, "--action-layer", "learned", "--feature-dim", 5) == expected
    assert first_actions(baseline, tmp_path, "--diagnostics-interval", 0) == expected
    assert first_actions(baseline, tmp_path, "--env-kwargs", '{"draws": 3}') == expected
    assert first_actions(baseline, tmp_path, "--seed", 2) != expected
    if algorithm(baseline) == "ppo":
        assert first_actions(baseline, tmp_path, "--update-epochs", 3) == expected


# The rollout


@with_critic
def test_every_step_is_a_real_one(script, tmp_path):
    """global_step counts the environments' own steps, and the batch holds exactly those, in order."""
    steps, envs = 32, 3
    flags = (*tiny(script), "--num-envs", envs, "--num-steps", steps, "--total-timesteps", 330)
    result = train(script, "Clock", tmp_path / "run", *flags)
    calls = steps_by_env()
    total = 3 * envs * steps  # three whole batches fit into 330 steps
    assert [len(each) for each in calls] == [total / envs] * envs
    assert int(read_progress(tmp_path / "run")[-1]["global_step"]) == total
    for i, each in enumerate(calls):
        last = each[-steps:]
        np.testing.assert_array_equal(np.asarray(result.obs)[:steps, i], np.stack([call.obs for call in last]))
        np.testing.assert_array_equal(np.asarray(result.actions)[:, i], [call.action for call in last])
        np.testing.assert_array_equal(np.asarray(result.rewards)[:, i], [call.reward for call in last])


@every
def test_episodes_are_booked_whole(script, tmp_path):
    """Returns and lengths are right where episodes cross the end of a rollout, which REINFORCE does not let them."""
    flags = ("--num-steps", 4) if script in WITH_CRITIC else ()
    train(script, "Terminated", tmp_path / "run", *tiny(script, 3, updates=5), *flags)
    events, _ = read_events(tmp_path / "run")
    assert {value for _, value in events["charts/episodic_return"]} == {3.0}
    assert {value for _, value in events["charts/episodic_length"]} == {3.0}


@with_critic
@pytest.mark.parametrize("seed", [1, 2])
def test_losses_by_hand(script, seed, tmp_path):
    """With frozen weights the first update's losses follow from the environments' own record of what happened.

    PPO's are means over all minibatches, which the last minibatch's are not; and the value loss, half the mean squared
    advantage here, tells where the critic was asked for the value of the next state and where the sum was cut.
    """
    flags = (*tiny(script), "--num-envs", 3, "--num-steps", 32, "--total-timesteps", 96)
    flags += ("--num-minibatches", 8, "--update-epochs", 2) if algorithm(script) == "ppo" else ()
    flags += ("--gamma", 0.9, "--gae-lambda", 0.8, "--no-norm-adv", "--seed", seed, *frozen(script))
    agent = train(script, "Clock", tmp_path / "run", *flags).agent
    calls = steps_by_env()
    ends = [(call.terminated, call.truncated) for each in calls for call in each]
    assert ends.count((True, False)) > 3 < ends.count((False, True))
    advantages = np.concatenate([advantages_by_hand(agent, each, 0.9, 0.8) for each in calls])
    with torch.no_grad():
        logprobs = agent.logits(torch.as_tensor(np.stack([call.obs for each in calls for call in each]))).log_softmax(
            -1
        )
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean().item()
    policy_loss = -advantages.mean()  # PPO's ratio is 1
    if algorithm(script) == "a2c":
        taken = np.array([call.action for each in calls for call in each])
        policy_loss = -(advantages * logprobs.numpy()[np.arange(len(taken)), taken]).mean()
    events, _ = read_events(tmp_path / "run")
    assert events["losses/value_loss"] == [(96, pytest.approx(np.square(advantages).mean() / 2, rel=1e-4))]
    assert events["losses/policy_loss"] == [(96, pytest.approx(policy_loss, rel=1e-4))]
    assert events["losses/entropy"] == [(96, pytest.approx(entropy, rel=1e-4))]
    if algorithm(script) == "ppo":
        assert events["losses/clipfrac"] == [(96, 0.0)]
        assert events["losses/approx_kl"] == [(96, pytest.approx(0.0, abs=1e-6))]


@every
def test_gradient_is_clipped(script, tmp_path, monkeypatch):
    """Gradients longer than --max-grad-norm are cut to that length and keep their direction, others are left alone."""
    flags = (*tiny(script, 6, updates=8), *frozen(script), "--max-grad-norm")
    gradients = record_gradients(monkeypatch)
    train(script, "Clock", tmp_path / "run", *flags, 1e9)
    raw = gradients.copy()
    bound = sorted(gradient.norm().item() for gradient in raw)[len(raw) // 2] * 1.01
    gradients.clear()
    train(script, "Clock", tmp_path / "run", *flags, bound)
    assert len(gradients) == len(raw) >= 8
    longer = [gradient.norm() > bound for gradient in raw]
    assert 0 < sum(longer) < len(raw)
    for before, after, cut in zip(raw, gradients, longer, strict=True):
        assert after.norm() <= bound * (1 + 1e-6)
        torch.testing.assert_close(after, before * bound / before.norm() if cut else before, rtol=1e-4, atol=1e-9)


@every
def test_learning_rate_is_annealed(script, tmp_path):
    """The learning rate falls linearly from its first value, and stays with --no-anneal-lr."""
    train(script, "ConstantReward", tmp_path / "run", *tiny(script, updates=4), "--learning-rate", 1e-3, "--anneal-lr")
    events, _ = read_events(tmp_path / "run")
    assert [value for _, value in events["charts/learning_rate"]] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    train(script, "ConstantReward", tmp_path / "run", *tiny(script), "--learning-rate", 1e-3, "--no-anneal-lr")
    events, _ = read_events(tmp_path / "run")
    assert [value for _, value in events["charts/learning_rate"]] == pytest.approx([1e-3, 1e-3])


# The run's folder


@every
@pytest.mark.parametrize(
    ("env_id", "name"),
    [
        ("CartPole-v1", r"CartPole-v1"),
        ("probe_envs:ConstantReward-v0", r"probe_envs[\w.=-]+ConstantReward-v0"),
        ("probe_envs:probes/ConstantReward-v0", r"probe_envs[\w.=-]+probes[\w.=-]+ConstantReward-v0"),
    ],
)
def test_default_folder(script, env_id, name, tmp_path, monkeypatch):
    """Without --run-dir a run goes to runs/<env>__<exp_name>__<seed>, a name that any file system takes."""
    monkeypatch.chdir(tmp_path)
    flags = (*tiny(script, 16), "--max-episode-steps", 16)
    train(script, env_id, None, *flags, "--seed", 7)
    train(script, env_id, None, *flags, "--exp-name", "mine")
    first, second = sorted((tmp_path / "runs").iterdir(), key=lambda path: "mine" in path.name)
    assert re.fullmatch(rf"{name}__{script}__7", first.name)
    assert re.fullmatch(rf"{name}__mine__1", second.name)
    assert (first / "progress.csv").is_file()


@every
def test_rerun_replaces_the_run(script, tmp_path):
    """A second run in the same folder leaves nothing of the first."""
    run_dir = tmp_path / "run"
    train(script, "CartPole-v1", run_dir, *tiny(script, 16), "--max-episode-steps", 16, "--save-model", "--seed", 1)
    old = helpers.snapshot(run_dir)
    train(script, "ConstantReward", run_dir, *tiny(script, updates=1), "--seed", 2)
    assert len(helpers.event_files(run_dir)) == 1
    assert not (run_dir / "model.pt").exists()
    assert [row["global_step"] for row in read_progress(run_dir)] == ["0", "32"]
    assert "CartPole" not in (run_dir / "run.json").read_text()
    assert not old.items() & helpers.snapshot(run_dir).items()


@every
def test_foreign_folder_is_refused(script, tmp_path):
    """A folder that holds other things is left as it is; an empty one is taken."""
    run_dir = tmp_path / "thesis"
    run_dir.mkdir()
    train(script, "ConstantReward", run_dir, *tiny(script))
    for name in ("chapter.tex", "run.json", "progress.csv", "events.out.tfevents.1.mine"):
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        (folder / name).write_text("{}")
        before = helpers.snapshot(folder)
        result = run_script(script, "ConstantReward", folder, *tiny(script))
        assert result.status not in (0, None), name
        assert len(result.stderr.splitlines()) == 1
        assert helpers.snapshot(folder) == before


@every
@pytest.mark.parametrize(
    ("env_id", "wrong"),
    [
        ("CartPole-v1", ("--num-envs", 0)),
        ("CartPole-v1", ("--total-timesteps", 0)),
        ("CartPole-v1", ("--env-kwargs", "{")),
        ("NoSuchEnv-v0", ()),
        ("BoxAction", ()),
        ("CartPole-v1", ("--track",)),
        ("CartPole-v1", ("--no-such-argument",)),
    ],
)
def test_invalid_arguments_leave_the_old_run(script, env_id, wrong, tmp_path, monkeypatch):
    """A run is replaced only once the arguments have been found valid."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    train(script, "ConstantReward", tmp_path / "run", *tiny(script), "--save-model")
    before = helpers.snapshot(tmp_path / "run")
    assert run_script(script, env_id, tmp_path / "run", *tiny(script), *wrong).status != 0
    assert helpers.snapshot(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("script", "wrong"),
    [
        *((script, ("--feature-dim", 4)) for script in ACPG),  # too many actions for it
        *((script, ("--total-timesteps", 31)) for script in WITH_CRITIC),
        *((script, ("--num-minibatches", 3)) for script in PAIRS[0]),
        *((script, ("--num-steps", 0)) for script in PAIRS[1]),
        *((script, ("--norm-returns",)) for script in PAIRS[2]),
    ],
)
def test_arguments_invalid_in_this_script_leave_the_old_run(script, wrong, tmp_path):
    """The same for what not all scripts refuse."""
    train(script, "ConstantReward", tmp_path / "run", *tiny(script))
    before = helpers.snapshot(tmp_path / "run")
    assert run_script(script, "Bandit", tmp_path / "run", *tiny(script), *wrong).status != 0
    assert helpers.snapshot(tmp_path / "run") == before


@every
def test_run_is_described(script, tmp_path):
    """Hyperparameters, package versions and the git commit are stored with the run."""
    train(script, "ConstantReward", tmp_path / "run", *tiny(script), "--gamma", 0.83, "--exp-name", "described")
    record = helpers.read_record(tmp_path / "run")
    args = record["args"]
    assert record["status"] == "finished" and record["error"] is None
    assert (args["gamma"], args["exp_name"], args["num_envs"], args["max_grad_norm"]) == (0.83, "described", 2, 0.5)
    text = json.dumps(record)
    for version in (torch.__version__, gym.__version__, np.__version__):
        assert str(version) in text
    commit = subprocess.run(
        ["git", "-C", helpers.ROOT, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert commit in text


@every
def test_last_line_says_how_it_went(script, tmp_path):
    """The last line on stdout has the mean return of the last 100 episodes and the folder of the logs."""
    result = train(script, "Terminated", tmp_path / "run", *tiny(script, 3))
    last = result.stdout.splitlines()[-1]
    assert str(tmp_path / "run") in last
    assert re.search(r"\b3\.0", last)


# The logs


def documented_tags(script, num_actions):
    """The tags that the tables of docs/metrics.md, in the first column, in backticks, say this script writes.

    Algorithms in parentheses beside a tag are those that write it, as in "`losses/value_loss` (ppo, a2c)"; else all do.
    """
    tags = set()
    for line in (helpers.ROOT / "docs" / "metrics.md").read_text().splitlines():
        cell = line.split("|")[1] if line.startswith("|") else ""
        (only,) = re.findall(r"\((.*?)\)", re.sub(r"`[^`]*`", "", cell)) or [", ".join(ALGORITHMS)]
        found = {tag for tag in re.findall(r"`([^`]+)`", cell) if "/" in tag}
        if found:
            assert set(only.split(", ")) <= set(ALGORITHMS), line
            tags |= found if algorithm(script) in only.split(", ") else set()
    families = {tag for tag in tags if "<" in tag}
    each = {re.sub("<.*?>", str(action), family) for family in families for action in range(num_actions)}
    return tags - families | each


@every
def test_tags_are_the_documented_ones(script, tmp_path):
    """The event file and progress.csv hold exactly the tags of docs/metrics.md."""
    train(script, "Bandit", tmp_path / "run", *tiny(script))
    scalars, texts = read_events(tmp_path / "run")
    assert set(scalars) | texts == documented_tags(script, num_actions=6)
    assert set(read_progress(tmp_path / "run")[0]) - {"global_step"} == set(scalars)


@every
def test_every_tag_of_the_issue_is_logged(script, tmp_path):
    """CleanRL's tags, and the collapse metrics beside their null, from step 0 on."""
    train(script, "Bandit", tmp_path / "run", *tiny(script))
    scalars, _ = read_events(tmp_path / "run")
    losses = {
        "ppo": "value_loss policy_loss entropy approx_kl old_approx_kl clipfrac explained_variance",
        "a2c": "value_loss policy_loss entropy explained_variance",
        "reinforce": "policy_loss entropy",
        "trpo": "value_loss policy_loss entropy kl line_search_failed explained_variance",
    }[algorithm(script)]
    metrics = """nc1 variability_quotient cdnv alignment ncc_agreement means_equinorm means_equiangularity
        means_max_angle weights_equinorm weights_equiangularity weights_max_angle etf_error self_duality
        mean_weight_cosine classes_present"""
    expected = {f"charts/{name}" for name in ("episodic_return", "episodic_length", "learning_rate", "SPS")}
    expected |= {f"losses/{name}" for name in losses.split()}
    collapse = {f"{group}/{name}" for group in ("collapse", "collapse_null") for name in metrics.split()}
    assert set(scalars) >= expected | collapse
    assert {tag for tag in scalars if tag.startswith("losses/")} == {
        tag for tag in expected if tag.startswith("losses/")
    }
    for tag in scalars:
        assert (scalars[tag][0][0] == 0) == tag.startswith("collapse"), tag
        assert scalars[tag][-1][0] == 64, tag


@every
def test_undefined_metrics_are_logged_as_nan(script, tmp_path):
    """Where the greedy action is always the same, the metrics are there, as NaN."""
    train(script, "ConstantReward", tmp_path / "run", *tiny(script))
    scalars, _ = read_events(tmp_path / "run")
    for group in ("collapse", "collapse_null"):
        assert [value for _, value in scalars[f"{group}/classes_present"]] == [1.0, 1.0]
        for name in ("nc1", "cdnv", "etf_error", "self_duality", "means_equinorm"):
            assert [math.isnan(value) for _, value in scalars[f"{group}/{name}"]] == [True, True]
            assert math.isnan(float(read_progress(tmp_path / "run")[0][f"{group}/{name}"]))


@every
@pytest.mark.parametrize("more", [(), ("--log-interval", 3)], ids=["each", "third"])
def test_step_0_is_the_untrained_network(script, more, tmp_path):
    """The first point of collapse/* speaks of the network before the first update, the last of the final network."""
    flags = (*tiny(script, updates=6), "--learning-rate", 1e-2, "--diagnostics-interval", 3, *more)
    untrained = train(script, "ActionObservationReward", tmp_path / "frozen", *flags, *frozen(script)).agent
    trained = train(script, "ActionObservationReward", tmp_path / "run", *flags).agent
    scalars, _ = read_events(tmp_path / "run")
    both = torch.tensor([[1.0], [-1.0]])  # all there is to observe
    with torch.no_grad():
        first, last = (agent.features(both).norm(dim=1).mean().item() for agent in (untrained, trained))
    assert abs(first - last) > 0.01
    points = scalars["collapse/feature_norm"]
    assert [step for step, _ in points] == [0, 96, 192]
    assert [points[0][1], points[-1][1]] == pytest.approx([first, last], rel=1e-5)


@every
@pytest.mark.parametrize(("batches", "log_interval"), [(3, 1), (45, 4), (7, 4), (3, 50)])
def test_progress_rows(script, batches, log_interval, tmp_path):
    """progress.csv: row 0, then a row every --log-interval updates and one for the last, each with all its columns."""
    own = {
        "ppo": ("--num-steps", 3, "--num-minibatches", 1, "--update-epochs", 1, "--total-timesteps", 6 * batches + 3),
        "a2c": ("--num-steps", 3, "--total-timesteps", 6 * batches + 3),
        "reinforce": ("--num-episodes", 1, "--total-timesteps", 6 * batches),
        "trpo": ("--num-steps", 3, "--num-minibatches", 1, "--update-epochs", 1, "--total-timesteps", 6 * batches + 3),
    }[algorithm(script)]
    own += ("--num-envs", 2, "--log-interval", log_interval)
    train(script, "Terminated", tmp_path / "run", *own, "--diagnostics-interval", 10)
    rows = read_progress(tmp_path / "run")
    updates = [*range(log_interval, batches, log_interval), batches]
    assert [int(row["global_step"]) for row in rows] == [0, *(6 * update for update in updates)]
    assert len({len(row) for row in rows}) == 1
    assert all(row["losses/policy_loss"] and row["charts/SPS"] for row in rows[1:])
    assert all(math.isfinite(float(row["losses/policy_loss"])) for row in rows[1:])
    assert {row["charts/episodic_return"] for row in rows[1:]} == {"3.0"}
    assert not any(rows[0][tag] for tag in rows[0] if tag.startswith(("losses", "charts")))
    # the diagnostics: at the first entry at or after each multiple of their interval, and at both ends
    due = [0] + [min(u for u in updates if u >= k) for k in range(10, batches + 1, 10)] + [batches]
    measured = [int(row["global_step"]) for row in rows if row["collapse/feature_norm"]]
    assert measured == sorted({6 * update for update in due})
    events, _ = read_events(tmp_path / "run")
    for tag in set(rows[0]) - {"global_step"}:
        points = [(int(row["global_step"]), float(row[tag])) for row in rows if row[tag]]
        assert events[tag] == [(step, pytest.approx(value, rel=1e-5, nan_ok=True)) for step, value in points], tag


@every
def test_columns_are_the_same_in_every_run(script, tmp_path):
    """The header: global_step, then the tags in one order, whatever the interval, and however the run ended."""
    headers = set()
    for name, more in {"often": (), "seldom": ("--log-interval", 5, "--diagnostics-interval", 2)}.items():
        train(script, "Bandit", tmp_path / name, *tiny(script, updates=3), *more)
        headers.add((tmp_path / name / "progress.csv").read_text().splitlines()[0])
    train(script, "Bandit", tmp_path / "off", *tiny(script, updates=3), "--diagnostics-interval", 0)
    run_script(script, "NotFinite", tmp_path / "failed", *tiny(script, 5, updates=3))
    failed = (tmp_path / "failed" / "progress.csv").read_text().splitlines()
    (header,) = headers
    columns = header.split(",")
    assert columns[0] == "global_step" and len(set(columns)) == len(columns)
    without = [tag for tag in columns if not tag.startswith("collapse")]
    assert columns[: len(without)] == without and columns[1] == "charts/episodic_return"
    assert (tmp_path / "off" / "progress.csv").read_text().splitlines()[0].split(",") == without
    actions = [f"collapse/action_frequency_{action}" for action in range(2, 6)]  # of the bandit, not of the other
    assert failed[0].split(",") == [tag for tag in columns if tag not in actions]
    assert {line.count(",") for line in failed} == {failed[0].count(",")}


@every
def test_entries_are_means_since_the_last(script, tmp_path):
    """With frozen weights, entries over three updates are the means of the entries over one; the last is over fewer."""
    flags = (*tiny(script, 6), "--total-timesteps", 7 * 32, *frozen(script))
    flags += ("--num-minibatches", 2) if algorithm(script) == "ppo" else ()
    for interval in (1, 3):
        probe_envs.CALLS.clear()
        train(script, "Clock", tmp_path / str(interval), *flags, "--log-interval", interval)
    one, three = (read_events(tmp_path / str(interval))[0] for interval in (1, 3))
    assert set(one) == set(three)
    steps = [step for step, _ in one["losses/entropy"]]
    assert len(steps) % 3 == 1 or script not in WITH_CRITIC
    windows = [slice(i, i + 3) for i in range(0, len(steps), 3)]
    ends = [steps[window][-1] for window in windows]
    if len(steps) % 3:  # the last entry stands at the end, to which REINFORCE may have taken steps of a batch cut short
        ends[-1] = int(read_progress(tmp_path / "3")[-1]["global_step"])
    for tag in {tag for tag in one if tag.startswith("losses")} - {"losses/explained_variance"}:
        means = [np.mean([value for _, value in one[tag][window]]) for window in windows]
        # rounding: the ratio of unmoved weights is 1
        assert [step for step, _ in three[tag]] == ends
        assert [value for _, value in three[tag]] == pytest.approx(means, rel=1e-4, abs=1e-7), tag
    # of the episodes, means over those that ended, not over updates; REINFORCE's updates have equally many
    ended, entries, taken = [], [], 0
    if script in WITH_CRITIC:
        for calls in zip(*steps_by_env(), strict=True):
            taken += 2
            ended += [call.after[0] for call in calls if call.terminated or call.truncated]
            if taken in ends:
                entries.append((taken, pytest.approx(np.mean(ended))))
                ended = []
    else:
        lengths = [value for _, value in one["charts/episodic_length"]]
        means = [np.mean(lengths[window]) for window in windows]
        entries = [(end, pytest.approx(mean)) for end, mean in zip(ends, means, strict=True)]
    assert three["charts/episodic_length"] == entries


# Checkpoints


def plain(value):
    """Whether a checkpoint's content is made of nothing but plain types and tensors."""
    if isinstance(value, dict):
        return all(type(key) is str and plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str, torch.Tensor)


@pytest.mark.parametrize(
    ("script", "more"),
    [
        *((script, ()) for script in SCRIPTS),
        ("ppo_acpg", ("--action-layer", "learned", "--feature-constraint", "ball", "--etf-scale", 5)),
        ("ppo_acpg", ("--action-layer", "random", "--feature-constraint", "sphere", "--feature-dim", 17)),
        ("ppo_acpg", ("--feature-constraint", "none", "--max-episode-steps", 5)),
    ],
)
@pytest.mark.parametrize("env_id", ["OffsetActions", "DiscreteObservation"])
def test_checkpoint_rebuilds_the_agent(script, more, env_id, tmp_path):
    """model.pt reads with weights_only=True and, with the spaces of one environment, gives the trained agent again."""
    result = train(script, env_id, tmp_path / "run", *tiny(script), "--save-model", *more)
    checkpoint = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert set(checkpoint) == {"script", "agent", "args", "versions"}
    assert checkpoint["script"] == script
    assert plain(checkpoint["agent"]) and plain(checkpoint["args"]) and plain(checkpoint["versions"])
    assert checkpoint["args"]["env_id"] == f"probe_envs:{env_id}-v0"
    assert str(torch.__version__) in checkpoint["versions"].values()

    env = gym.make(f"probe_envs:{env_id}-v0")
    agent = result.Agent(env.observation_space, env.action_space, SimpleNamespace(**checkpoint["args"]))
    obs = torch.as_tensor(np.stack([env.observation_space.sample() for _ in range(16)]))
    agent.load_state_dict(checkpoint["agent"])
    with torch.no_grad():
        for function in ("features", "logits", "value") if script in WITH_CRITIC else ("features", "logits"):
            assert torch.equal(getattr(agent, function)(obs), getattr(result.agent, function)(obs)), function
        assert agent.features(obs).shape == (16, checkpoint["args"]["feature_dim"])
        assert script not in WITH_CRITIC or agent.value(obs).shape == (16,)


@every
def test_no_checkpoint_unless_asked(script, tmp_path):
    """Without --save-model there is no model.pt."""
    train(script, "ConstantReward", tmp_path / "run", *tiny(script))
    assert not (tmp_path / "run" / "model.pt").exists()


@fixed_layer
@pytest.mark.parametrize("layer", ["etf", "random"])
def test_fixed_layer_is_never_trained(script, layer, tmp_path):
    """The layer is a buffer that training and saving leave alone, bit for bit, and that the optimiser does not hold."""
    flags = ("--learning-rate", 1e-2, "--action-layer", layer, "--save-model")
    result = train(script, "Bandit", tmp_path / "run", *tiny(script, updates=16), *flags)
    spaces = result.envs.observation_space, gym.make("probe_envs:Bandit-v0").action_space
    torch.manual_seed(result.args.seed)
    fresh = result.Agent(*spaces, result.args)
    still = train(script, "Bandit", tmp_path / "still", *tiny(script), *frozen(script), "--action-layer", layer).agent
    saved = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["agent"]

    ((name, buffer),) = result.agent.named_buffers()
    assert buffer.shape == (6, result.args.feature_dim)
    assert torch.equal(buffer, dict(fresh.named_buffers())[name])
    assert torch.equal(buffer, dict(still.named_buffers())[name])
    assert torch.equal(buffer, saved[name])
    torch.testing.assert_close(buffer.norm(), torch.tensor(6.0).sqrt())
    assert layer == "random" or torch.allclose(buffer.norm(dim=1), torch.ones(6))
    assert name not in dict(result.agent.named_parameters())
    held = {id(parameter) for parameter in result.optimizer.params}
    assert held == {id(parameter) for parameter in trained_by_optimizer(script, result.agent).parameters()}
    pointers = {parameter.untyped_storage().data_ptr() for parameter in result.optimizer.params}
    assert buffer.untyped_storage().data_ptr() not in pointers
    trained = [key for key in still.state_dict() if not torch.equal(still.state_dict()[key], saved[key])]
    assert len(trained) == len(saved) - 1  # all the rest did move


@fixed_layer
def test_learned_layer_starts_at_the_etf_and_is_trained(script, tmp_path):
    """--action-layer learned: the same first weights as the fixed ETF's, then training moves them."""
    run = lambda name, *more: train(script, "Bandit", tmp_path / name, *tiny(script), *more).agent.action_layer.weight  # noqa: E731
    etf, end = run("etf"), run("end", "--action-layer", "learned")
    start = run("start", "--action-layer", "learned", *frozen(script))
    torch.testing.assert_close(start, etf, rtol=0, atol=1e-20)
    assert not torch.equal(end, etf)
    assert end.requires_grad and not etf.requires_grad


@pytest.mark.parametrize("constraint", ["tanh", "ball", "sphere", "none"])
def test_feature_constraints(constraint, tmp_path):
    """logits = scale W h, with h in the box, in the ball, on the sphere, or anywhere."""
    flags = ("--feature-constraint", constraint, "--etf-scale", 3.5, "--feature-gain", 2)
    agent = train("ppo_acpg", "CartPole-v1", tmp_path / "run", *tiny("ppo_acpg"), *FROZEN, *flags).agent
    obs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        near, far = agent.features(0.01 * obs), agent.features(100 * obs)
        weight = agent.action_layer.weight
        torch.testing.assert_close(agent.logits(obs), 3.5 * agent.features(obs) @ weight.T, rtol=1e-4, atol=1e-5)
    norms = torch.cat([near, far]).norm(dim=1)
    one = torch.ones(64)
    assert (far < 0).any() and (far > 0).any(), "features are signed"
    if constraint == "sphere":
        torch.testing.assert_close(norms, torch.cat([one, one]))
    elif constraint == "ball":
        torch.testing.assert_close(norms[64:], one)
        assert (norms[:64] < 0.5).all()
    else:
        assert (norms[:64] < 0.5).all() and (norms[64:] > 1.5).all()
        assert (far.abs().max() <= 1) == (constraint == "tanh")


def test_layer_orientation_depends_on_the_seed(tmp_path):
    """Another seed turns the ETF elsewhere, but it stays an ETF."""
    flags = tiny("ppo_acpg")
    one, two = (
        train("ppo_acpg", "Bandit", tmp_path / "run", *flags, "--seed", s).agent.action_layer.weight for s in (1, 2)
    )
    assert not torch.allclose(one, two, atol=1e-2)
    for weight in (one, two):
        torch.testing.assert_close(weight @ weight.T, 1.2 * torch.eye(6) - 0.2, rtol=0, atol=1e-6)


# Options


@every
def test_video_does_not_change_training(script, tmp_path):
    """--capture-video leaves videos in the run's folder and the same weights as without."""
    pytest.importorskip("moviepy", reason="gymnasium records videos with MoviePy: pip install moviepy")
    silent = train(script, "Clock", tmp_path / "silent", *tiny(script, 6))
    filmed = train(script, "Clock", tmp_path / "filmed", *tiny(script, 6), "--capture-video")
    assert same(weights(silent), weights(filmed))
    assert without_speed(read_progress(tmp_path / "silent")) == without_speed(read_progress(tmp_path / "filmed"))
    assert list((tmp_path / "filmed").rglob("*.mp4"))


@every
def test_track_without_wandb(script, tmp_path, monkeypatch):
    """--track without Weights & Biases says so in one line."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = run_script(script, "ConstantReward", tmp_path / "run", *tiny(script), "--track")
    (line,) = result.stderr.splitlines()
    assert "wandb" in line
    assert result.status == 0 or not (tmp_path / "run").exists()


@every
def test_help_describes_every_argument(script, tmp_path):
    """--help lists the arguments, each with its line of description."""
    names = """env-id total-timesteps learning-rate num-envs anneal-lr gamma ent-coef max-grad-norm exp-name seed
        cuda track capture-video save-model env-kwargs max-episode-steps run-dir log-interval diagnostics-interval
        torch-threads"""
    critic = "num-steps gae-lambda norm-adv vf-coef"
    own = {
        "ppo": f"{critic} compile num-minibatches update-epochs clip-coef clip-vloss target-kl",
        "a2c": f"{critic} compile",
        "reinforce": "num-episodes num-minibatches minibatch-size update-epochs norm-returns running-baseline",
        "trpo": "num-steps gae-lambda norm-adv compile num-minibatches update-epochs max-kl damping cg-iterations",
    }
    acpg_only = "etf-scale feature-constraint feature-gain action-layer"
    result = run_script(script, "CartPole-v1", tmp_path / "run", "--help")
    assert result.status == 0
    assert not (tmp_path / "run").exists()
    for name in f"{names} {own[algorithm(script)]}".split():
        assert re.search(rf"--{name}\b", result.stdout), name
    for name in set(" ".join(own.values()).split()) - set(own[algorithm(script)].split()):
        assert not re.search(rf"--{name}\b", result.stdout), name
    for name in acpg_only.split():
        assert (f"--{name}" in result.stdout) == (script in ACPG), name
    source = (helpers.ROOT / f"{script}.py").read_text()
    fields = re.search(r"class Args:\n(.*?)\n\n\n", source, re.DOTALL)[1]
    lines = [line.strip() for line in fields.splitlines() if line.strip() and not line.strip().startswith("#")]
    shown = " ".join(re.sub(r"[^\x20-\x7e]", " ", result.stdout).split())  # without frames and line breaks
    for line in lines:
        name, comment = re.fullmatch(r"(\w+): .* = .*?  # (.+)", line).groups()
        assert comment in shown, f"the help of --{name} is not its comment"


@pytest.mark.parametrize("script", PAIRS[0])
def test_defaults_are_those_of_cleanrl(script, tmp_path):
    """The defaults are ppo.py's."""
    args = vars(train(script, "ConstantReward", tmp_path / "run", "--total-timesteps", 512).args)
    defaults = dict(num_envs=4, num_steps=128, update_epochs=4, num_minibatches=4, learning_rate=2.5e-4, anneal_lr=True)
    defaults |= dict(
        gamma=0.99, gae_lambda=0.95, norm_adv=True, clip_coef=0.2, clip_vloss=True, ent_coef=0.01, vf_coef=0.5
    )
    defaults |= dict(max_grad_norm=0.5, target_kl=None, exp_name=script, seed=1, track=False, capture_video=False)
    assert {name: args[name] for name in defaults} == defaults
    source = (helpers.ROOT / f"{script}.py").read_text()
    assert re.search(r"total_timesteps: int = 500_?000\b", source)


@pytest.mark.parametrize("script", PAIRS[1])
def test_defaults_are_those_of_stable_baselines(script, tmp_path):
    """The defaults are A2C's, with eight environments; vf_coef is twice that of a value loss without our 1/2."""
    args = vars(train(script, "ConstantReward", tmp_path / "run", "--total-timesteps", 40).args)
    defaults = dict(
        num_envs=8, num_steps=5, learning_rate=7e-4, anneal_lr=False, gamma=0.99, gae_lambda=1.0, norm_adv=False
    )
    defaults |= dict(ent_coef=0.01, vf_coef=1.0, max_grad_norm=0.5, exp_name=script, seed=1)
    assert {name: args[name] for name in defaults} == defaults


@every
def test_progress_bar_on_a_terminal_only(script, tmp_path):
    """A terminal gets a bar with steps and mean return; anything else gets nothing on stderr."""
    shown = run_script(script, "Terminated", tmp_path / "run", *tiny(script, 3), terminal=True)
    assert "\r" in shown.stderr and "step" in shown.stderr and "3.0" in shown.stderr
    assert train(script, "Terminated", tmp_path / "run", *tiny(script, 3)).stderr == ""


def clock(seconds):
    """A time.perf_counter by which `seconds` pass between two calls of Run.log, whatever else looks at it."""
    now = [0.0]

    def patch(module):
        log, module.time = module.Run.log, types.SimpleNamespace(perf_counter=lambda: now[0])

        def later(self, tags, step):
            now[0] += seconds if step else 0.0
            return log(self, tags, step)

        module.Run.log = later

    return patch


@pytest.mark.parametrize(
    ("script", "seconds", "entries", "lines"),
    [
        *((script, 4, 10, [3, 6, 9]) for script in SCRIPTS),  # no two within ten seconds
        ("ppo_acpg", 2, 40, [8, 16, 24, 32, 40]),
        ("ppo_acpg", 11, 40, [4, 8, 12, 16, 20, 24, 28, 32, 36, 40]),  # every tenth of the run
        ("ppo_acpg", 11, 5, [1, 2, 3, 4, 5]),  # at most each entry
        ("ppo_acpg", 0.2, 40, []),
    ],
)
def test_progress_lines_without_a_terminal(script, seconds, entries, lines, tmp_path, monkeypatch):
    """About every tenth of the run, but no two within ten seconds, a line with steps and return; none beside a bar."""
    monkeypatch.setattr(helpers, "patch_script", clock(seconds))
    size = 12 if script in WITH_CRITIC else 6  # steps of an update
    own = ("--num-steps", 6) if script in WITH_CRITIC else ("--num-episodes", 1)
    flags = (*tiny(script, 3), *own, "--total-timesteps", size * entries, "--diagnostics-interval", 0)
    result = train(script, "Terminated", tmp_path / "run", *flags)
    *shown, last = result.stdout.splitlines()
    assert [int(re.match(r"\d+", line)[0]) for line in shown] == [size * entry for entry in lines]
    assert all(str(size * entries) in line and "3.0" in line for line in shown)
    assert result.stderr == "" and str(tmp_path) in last
    assert run_script(script, "Terminated", tmp_path / "bar", *flags, terminal=True).stdout.splitlines()[:-1] == []
