"""What a run does and leaves behind: reproducibility, pairing of the two scripts, files, checkpoints, logged tags."""

import itertools
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import helpers
import numpy as np
import probe_envs
import pytest
import torch
from helpers import FROZEN, SCRIPTS, TINY, read_events, read_progress, run_script, train

both = pytest.mark.parametrize("script", SCRIPTS)


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


def steps_by_env():
    """The recorded step() calls of each environment that was stepped, in the order of their construction."""
    steps = sorted((call for call in probe_envs.CALLS if call.kind == "step"), key=lambda call: call.env)  # stable
    return [list(calls) for _, calls in itertools.groupby(steps, key=lambda call: call.env)]


def first_actions(script, tmp_path, *more):
    """What each environment was told to do by an untrained policy that only has its noise to choose by."""
    probe_envs.CALLS.clear()
    train(script, "Silence", tmp_path / "run", *TINY, *FROZEN, *more)
    return [[call.action for call in calls] for calls in steps_by_env()]


# Reproducibility


@both
def test_same_seed_same_run(script, tmp_path):
    """The same seed gives the same progress.csv and weights; another seed gives others."""
    flags = ("--total-timesteps", 2048, "--diagnostics-interval", 2)
    one, again, other = (
        (weights(train(script, "CartPole-v1", tmp_path / name, *flags, "--seed", seed)), read_progress(tmp_path / name))
        for name, seed in (("one", 3), ("again", 3), ("other", 4))
    )
    assert same(one[0], again[0])
    assert without_speed(one[1]) == without_speed(again[1])
    assert not same(one[0], other[0])
    assert without_speed(one[1]) != without_speed(other[1])


@both
def test_diagnostics_do_not_change_training(script, tmp_path):
    """Measuring at every update or never gives the same weights."""
    flags = ("--total-timesteps", 1024)
    often, never = (
        weights(train(script, "CartPole-v1", tmp_path / str(interval), *flags, "--diagnostics-interval", interval))
        for interval in (1, 0)
    )
    assert same(often, never)


@both
def test_environments_of_all_seeds_are_independent(script, tmp_path):
    """No two environments of any two runs are reset with one seed, and later resets keep their own stream."""
    seeds = []
    for seed in range(8):
        probe_envs.CALLS.clear()
        train(script, "Clock", tmp_path / "run", *TINY, "--num-envs", 4, "--seed", seed, "--diagnostics-interval", 0)
        stepped = {call.env for call in probe_envs.CALLS if call.kind == "step"}
        resets = {env: [call.seed for call in probe_envs.CALLS if call.kind == "reset" and call.env == env] for env in stepped}
        assert len(resets) == 4
        for first, *later in resets.values():
            seeds.append(first)
            assert first is not None
            assert later and set(later) == {None}
    assert len(set(seeds)) == 32


# Pairing


def test_scripts_start_from_the_same_weights(tmp_path):
    """With one seed, critic and backbone are the same numbers, up to the gain of the last hidden layer."""
    baseline, acpg = (weights(train(script, "CartPole-v1", tmp_path / script, *TINY, *FROZEN)) for script in SCRIPTS)
    gain = run_script("ppo_acpg", "CartPole-v1", tmp_path / "ppo_acpg", *TINY).args.feature_gain
    shared = [name for name in baseline if name in acpg and not name.startswith("action_layer")]
    scaled = [name for name in shared if name.endswith("weight") and not torch.equal(baseline[name], acpg[name])]
    assert len([name for name in shared if name.endswith("weight")]) == 5
    assert len(scaled) == 1, "only the last hidden layer's weights may differ"
    torch.testing.assert_close(baseline[scaled[0]] / math.sqrt(2), acpg[scaled[0]] / gain, rtol=1e-5, atol=1e-7)


def test_scripts_share_features_and_values_at_equal_gain(tmp_path):
    """With the baseline's own gain and constraint, untrained features and values agree exactly."""
    same_gain = ("--feature-gain", repr(math.sqrt(2)), "--feature-constraint", "tanh")
    baseline = train("ppo_baseline", "CartPole-v1", tmp_path / "baseline", *TINY, *FROZEN).agent
    acpg = train("ppo_acpg", "CartPole-v1", tmp_path / "acpg", *TINY, *FROZEN, *same_gain).agent
    obs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(baseline.features(obs), acpg.features(obs), rtol=0, atol=1e-6)
        torch.testing.assert_close(baseline.value(obs), acpg.value(obs), rtol=0, atol=1e-6)


def test_scripts_share_environment_resets(tmp_path):
    """With one seed, both scripts reset their environments to the same first observations."""
    starts = []
    for script in SCRIPTS:
        probe_envs.CALLS.clear()
        train(script, "Clock", tmp_path / script, *TINY)
        starts.append([call.seed for call in probe_envs.CALLS if call.kind == "reset" and call.seed is not None])
    assert starts[0] == starts[1]
    assert len(starts[0]) == 2
    first, other = (train(script, "CartPole-v1", tmp_path / script, *TINY).obs[0] for script in SCRIPTS)
    assert np.array_equal(np.asarray(first), np.asarray(other))


def test_action_noise_is_paired(tmp_path):
    """Where the logits are equal, both scripts and all controls take the same actions, however often they update."""
    expected = first_actions("ppo_baseline", tmp_path)
    assert len(expected) == 2 and len(set(itertools.chain(*expected))) == 6
    assert first_actions("ppo_acpg", tmp_path) == expected
    assert first_actions("ppo_acpg", tmp_path, "--action-layer", "random", "--feature-constraint", "ball") == expected
    assert first_actions("ppo_acpg", tmp_path, "--action-layer", "learned", "--feature-dim", 5) == expected
    assert first_actions("ppo_baseline", tmp_path, "--update-epochs", 3, "--diagnostics-interval", 0) == expected
    assert first_actions("ppo_baseline", tmp_path, "--env-kwargs", '{"draws": 3}') == expected
    assert first_actions("ppo_baseline", tmp_path, "--seed", 2) != expected


# The rollout


@both
def test_every_step_is_a_real_one(script, tmp_path):
    """global_step counts the environments' own steps, and the batch holds exactly those, in order."""
    steps, envs = 32, 3
    flags = ("--num-envs", envs, "--num-steps", steps, "--total-timesteps", 330, "--update-epochs", 1)
    result = train(script, "Clock", tmp_path / "run", *flags)
    calls = steps_by_env()
    total = 3 * envs * steps  # three whole batches fit into 330 steps
    assert [len(each) for each in calls] == [total / envs] * envs
    assert int(read_progress(tmp_path / "run")[-1]["global_step"]) == total
    for i, each in enumerate(calls):
        last = each[-steps:]
        np.testing.assert_array_equal(np.asarray(result.obs)[:, i], np.stack([call.obs for call in last]))
        np.testing.assert_array_equal(np.asarray(result.actions)[:, i], [call.action for call in last])
        np.testing.assert_array_equal(np.asarray(result.rewards)[:, i], [call.reward for call in last])


@both
def test_episodes_are_booked_whole(script, tmp_path):
    """Returns and lengths are right where episodes cross the end of a rollout."""
    flags = ("--num-envs", 2, "--num-steps", 4, "--total-timesteps", 160, "--update-epochs", 1, "--num-minibatches", 1)
    train(script, "Terminated", tmp_path / "run", *flags)
    events, _ = read_events(tmp_path / "run")
    assert {value for _, value in events["charts/episodic_return"]} == {3.0}
    assert {value for _, value in events["charts/episodic_length"]} == {3.0}


def advantages_by_hand(agent, calls, gamma, gae_lambda):
    """Generalized advantage estimates of consecutive steps of one environment, straight from their definition."""
    with torch.no_grad():
        before = agent.value(torch.as_tensor(np.stack([call.obs for call in calls]))).tolist()
        after = agent.value(torch.as_tensor(np.stack([call.after for call in calls]))).tolist()
    advantages = []
    for start in range(len(calls)):
        total, factor = 0.0, 1.0
        for call, value, next_value in list(zip(calls, before, after, strict=True))[start:]:
            total += factor * (call.reward + (0.0 if call.terminated else gamma * next_value) - value)
            if call.terminated or call.truncated:
                break
            factor *= gamma * gae_lambda
        advantages.append(total)
    return advantages


@both
@pytest.mark.parametrize("seed", [1, 2])
def test_losses_by_hand(script, seed, tmp_path):
    """With frozen weights the first update's losses follow from the environments' own record of what happened.

    They are means over all minibatches, which the last minibatch's are not; and the value loss, half the mean squared
    advantage here, tells where the critic was asked for the value of the next state and where the sum was cut.
    """
    flags = ("--num-envs", 3, "--num-steps", 32, "--total-timesteps", 96, "--num-minibatches", 8, "--update-epochs", 2)
    flags += ("--gamma", 0.9, "--gae-lambda", 0.8, "--no-norm-adv", "--seed", seed, *FROZEN)
    agent = train(script, "Clock", tmp_path / "run", *flags).agent
    calls = steps_by_env()
    ends = [(call.terminated, call.truncated) for each in calls for call in each]
    assert ends.count((True, False)) > 3 < ends.count((False, True))
    advantages = np.concatenate([advantages_by_hand(agent, each, 0.9, 0.8) for each in calls])
    with torch.no_grad():
        logprobs = agent.logits(torch.as_tensor(np.stack([call.obs for each in calls for call in each]))).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean().item()
    events, _ = read_events(tmp_path / "run")
    assert events["losses/value_loss"] == [(96, pytest.approx(np.square(advantages).mean() / 2, rel=1e-4))]
    assert events["losses/policy_loss"] == [(96, pytest.approx(-advantages.mean(), rel=1e-4))]
    assert events["losses/entropy"] == [(96, pytest.approx(entropy, rel=1e-4))]
    assert events["losses/clipfrac"] == [(96, 0.0)]
    assert events["losses/approx_kl"] == [(96, pytest.approx(0.0, abs=1e-6))]


@both
def test_learning_rate_is_annealed(script, tmp_path):
    """The learning rate falls linearly from its first value, and stays with --no-anneal-lr."""
    train(script, "ConstantReward", tmp_path / "run", *TINY, "--total-timesteps", 128, "--learning-rate", 1e-3)
    events, _ = read_events(tmp_path / "run")
    assert [value for _, value in events["charts/learning_rate"]] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    train(script, "ConstantReward", tmp_path / "run", *TINY, "--learning-rate", 1e-3, "--no-anneal-lr")
    events, _ = read_events(tmp_path / "run")
    assert [value for _, value in events["charts/learning_rate"]] == pytest.approx([1e-3, 1e-3])


# The run's folder


@both
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
    train(script, env_id, None, *TINY, "--seed", 7)
    train(script, env_id, None, *TINY, "--exp-name", "mine")
    first, second = sorted((tmp_path / "runs").iterdir(), key=lambda path: "mine" in path.name)
    assert re.fullmatch(rf"{name}__{script}__7", first.name)
    assert re.fullmatch(rf"{name}__mine__1", second.name)
    assert (first / "progress.csv").is_file()


@both
def test_rerun_replaces_the_run(script, tmp_path):
    """A second run in the same folder leaves nothing of the first."""
    run_dir = tmp_path / "run"
    train(script, "CartPole-v1", run_dir, *TINY, "--save-model", "--seed", 1)
    old = helpers.snapshot(run_dir)
    train(script, "ConstantReward", run_dir, *TINY, "--total-timesteps", 32, "--seed", 2)
    assert len(helpers.event_files(run_dir)) == 1
    assert not (run_dir / "model.pt").exists()
    assert [row["global_step"] for row in read_progress(run_dir)] == ["0", "32"]
    assert "CartPole" not in (run_dir / "run.json").read_text()
    assert not old.items() & helpers.snapshot(run_dir).items()


@both
def test_foreign_folder_is_refused(script, tmp_path):
    """A folder that holds other things is left as it is; an empty one is taken."""
    run_dir = tmp_path / "thesis"
    run_dir.mkdir()
    train(script, "ConstantReward", run_dir, *TINY)
    for name in ("chapter.tex", "run.json", "progress.csv", "events.out.tfevents.1.mine"):
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        (folder / name).write_text("{}")
        before = helpers.snapshot(folder)
        result = run_script(script, "ConstantReward", folder, *TINY)
        assert result.status not in (0, None), name
        assert len(result.stderr.splitlines()) == 1
        assert helpers.snapshot(folder) == before


@both
@pytest.mark.parametrize(
    ("env_id", "wrong"),
    [
        ("CartPole-v1", ("--num-minibatches", 3)),
        ("CartPole-v1", ("--total-timesteps", 1)),
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
    train(script, "ConstantReward", tmp_path / "run", *TINY, "--save-model")
    before = helpers.snapshot(tmp_path / "run")
    assert run_script(script, env_id, tmp_path / "run", *TINY, *wrong).status != 0
    assert helpers.snapshot(tmp_path / "run") == before


def test_too_many_actions_leave_the_old_run(tmp_path):
    """The same for what only ACPG refuses."""
    train("ppo_acpg", "ConstantReward", tmp_path / "run", *TINY)
    before = helpers.snapshot(tmp_path / "run")
    assert run_script("ppo_acpg", "Bandit", tmp_path / "run", *TINY, "--feature-dim", 4).status != 0
    assert helpers.snapshot(tmp_path / "run") == before


@both
def test_run_is_described(script, tmp_path):
    """Hyperparameters, package versions and the git commit are stored with the run."""
    train(script, "ConstantReward", tmp_path / "run", *TINY, "--gamma", 0.83, "--exp-name", "described")
    record = helpers.read_record(tmp_path / "run")
    args = record["args"]
    assert (args["gamma"], args["exp_name"], args["num_steps"], args["learning_rate"]) == (0.83, "described", 16, 2.5e-4)
    text = json.dumps(record)
    for version in (torch.__version__, gym.__version__, np.__version__):
        assert str(version) in text
    commit = subprocess.run(["git", "-C", helpers.ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert commit in text


@both
def test_last_line_says_how_it_went(script, tmp_path):
    """The last line on stdout has the mean return of the last 100 episodes and the folder of the logs."""
    result = train(script, "Terminated", tmp_path / "run", *TINY)
    last = result.stdout.splitlines()[-1]
    assert str(tmp_path / "run") in last
    assert re.search(r"\b3\.0", last)


# The logs


def documented_tags(num_actions):
    """The tags in the tables of docs/metrics.md, which stand in backticks in the first column."""
    tags = set()
    for line in (helpers.ROOT / "docs" / "metrics.md").read_text().splitlines():
        if line.startswith("|"):
            tags.update(tag for tag in re.findall(r"`([^`]+)`", line.split("|")[1]) if "/" in tag)
    families = {tag for tag in tags if "<" in tag}
    each = {re.sub("<.*?>", str(action), family) for family in families for action in range(num_actions)}
    return tags - families | each


@both
def test_tags_are_the_documented_ones(script, tmp_path):
    """The event file and progress.csv hold exactly the tags of docs/metrics.md."""
    train(script, "Bandit", tmp_path / "run", *TINY)
    scalars, texts = read_events(tmp_path / "run")
    assert set(scalars) | texts == documented_tags(num_actions=6)
    assert set(read_progress(tmp_path / "run")[0]) - {"global_step"} == set(scalars)


@both
def test_every_tag_of_the_issue_is_logged(script, tmp_path):
    """CleanRL's tags, and the collapse metrics beside their null, from step 0 on."""
    train(script, "Bandit", tmp_path / "run", *TINY)
    scalars, _ = read_events(tmp_path / "run")
    losses = "value_loss policy_loss entropy approx_kl old_approx_kl clipfrac explained_variance"
    metrics = """nc1 variability_quotient cdnv alignment ncc_agreement means_equinorm means_equiangularity means_max_angle
        weights_equinorm weights_equiangularity weights_max_angle etf_error self_duality mean_weight_cosine classes_present"""
    expected = {f"charts/{name}" for name in ("episodic_return", "episodic_length", "learning_rate", "SPS")}
    expected |= {f"losses/{name}" for name in losses.split()}
    collapse = {f"{group}/{name}" for group in ("collapse", "collapse_null") for name in metrics.split()}
    assert set(scalars) >= expected | collapse
    for tag in scalars:
        assert (scalars[tag][0][0] == 0) == tag.startswith("collapse"), tag
        assert scalars[tag][-1][0] == 64, tag


@both
def test_undefined_metrics_are_logged_as_nan(script, tmp_path):
    """Where the greedy action is always the same, the metrics are there, as NaN."""
    train(script, "ConstantReward", tmp_path / "run", *TINY)
    scalars, _ = read_events(tmp_path / "run")
    for group in ("collapse", "collapse_null"):
        assert [value for _, value in scalars[f"{group}/classes_present"]] == [1.0, 1.0]
        for name in ("nc1", "cdnv", "etf_error", "self_duality", "means_equinorm"):
            assert [math.isnan(value) for _, value in scalars[f"{group}/{name}"]] == [True, True]
            assert math.isnan(float(read_progress(tmp_path / "run")[0][f"{group}/{name}"]))


@both
@pytest.mark.parametrize("batches", [3, 450])
def test_progress_grid(script, batches, tmp_path):
    """progress.csv has at most 200 rows, from step 0 to the last one, and nothing between them is missing."""
    flags = (
        "--num-envs",
        2,
        "--num-steps",
        2,
        "--num-minibatches",
        1,
        "--update-epochs",
        1,
        "--total-timesteps",
        4 * batches + 3,
    )
    train(script, "Terminated", tmp_path / "run", *flags, "--diagnostics-interval", 50)
    rows = read_progress(tmp_path / "run")
    steps = [int(row["global_step"]) for row in rows]
    assert min(batches, 100) < len(rows) <= 200
    assert steps[0] == 0 and steps[-1] == 4 * batches
    assert all(np.diff(steps) > 0)
    assert max(np.diff(steps)) <= max(4, 2 * 4 * batches / 100), "the grid has a hole"
    assert len({len(row) for row in rows}) == 1
    assert all(row["losses/value_loss"] and row["charts/SPS"] for row in rows[1:])
    assert all(math.isfinite(float(row["losses/value_loss"])) for row in rows[1:])
    assert {row["charts/episodic_return"] for row in rows[3:]} <= {"3.0", ""}


# Checkpoints


def plain(value):
    """Whether a checkpoint's content is made of nothing but plain types and tensors."""
    if isinstance(value, dict):
        return all(type(key) is str and plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str, torch.Tensor)


@pytest.mark.parametrize(
    ("script", "more"),
    [
        ("ppo_baseline", ()),
        ("ppo_acpg", ()),
        ("ppo_acpg", ("--action-layer", "learned", "--feature-constraint", "ball", "--etf-scale", 5)),
        ("ppo_acpg", ("--action-layer", "random", "--feature-constraint", "sphere", "--feature-dim", 17)),
        ("ppo_acpg", ("--feature-constraint", "none", "--max-episode-steps", 5)),
    ],
)
@pytest.mark.parametrize("env_id", ["OffsetActions", "DiscreteObservation"])
def test_checkpoint_rebuilds_the_agent(script, more, env_id, tmp_path):
    """model.pt reads with weights_only=True and, with the spaces of one environment, gives the trained agent again."""
    result = train(script, env_id, tmp_path / "run", *TINY, "--save-model", *more)
    checkpoint = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert set(checkpoint) == {"agent", "args", "versions"}
    assert plain(checkpoint["agent"]) and plain(checkpoint["args"]) and plain(checkpoint["versions"])
    assert checkpoint["args"]["env_id"] == f"probe_envs:{env_id}-v0"
    assert str(torch.__version__) in checkpoint["versions"].values()

    env = gym.make(f"probe_envs:{env_id}-v0")
    agent = result.Agent(env.observation_space, env.action_space, SimpleNamespace(**checkpoint["args"]))
    obs = torch.as_tensor(np.stack([env.observation_space.sample() for _ in range(16)]))
    agent.load_state_dict(checkpoint["agent"])
    with torch.no_grad():
        for function in ("features", "logits", "value"):
            assert torch.equal(getattr(agent, function)(obs), getattr(result.agent, function)(obs)), function
        assert agent.features(obs).shape == (16, checkpoint["args"]["feature_dim"])
        assert agent.value(obs).shape == (16,)


@both
def test_no_checkpoint_unless_asked(script, tmp_path):
    """Without --save-model there is no model.pt."""
    train(script, "ConstantReward", tmp_path / "run", *TINY)
    assert not (tmp_path / "run" / "model.pt").exists()


@pytest.mark.parametrize("layer", ["etf", "random"])
def test_fixed_layer_is_never_trained(layer, tmp_path):
    """The layer is a buffer that training and saving leave alone, bit for bit, and the optimiser never sees."""
    flags = ("--learning-rate", 1e-2, "--total-timesteps", 512, "--update-epochs", 4, "--action-layer", layer, "--save-model")
    result = train("ppo_acpg", "Bandit", tmp_path / "run", *TINY, *flags)
    spaces = result.agent.observation_space, gym.make("probe_envs:Bandit-v0").action_space
    fresh = result.Agent(*spaces, result.args)
    frozen = train("ppo_acpg", "Bandit", tmp_path / "frozen", *TINY, *FROZEN, "--action-layer", layer).agent
    saved = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["agent"]

    ((name, buffer),) = result.agent.named_buffers()
    assert buffer.shape == (6, result.args.feature_dim)
    assert torch.equal(buffer, dict(fresh.named_buffers())[name])
    assert torch.equal(buffer, dict(frozen.named_buffers())[name])
    assert torch.equal(buffer, saved[name])
    torch.testing.assert_close(buffer.norm(dim=1), torch.ones(6))
    assert name not in dict(result.agent.named_parameters())
    optimised = [tensor for group in result.optimizer.param_groups for tensor in group["params"]]
    assert sum(tensor.numel() for tensor in optimised) == sum(tensor.numel() for tensor in result.agent.parameters())
    assert all(tensor.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr() for tensor in optimised)
    trained = [key for key in frozen.state_dict() if not torch.equal(frozen.state_dict()[key], saved[key])]
    assert len(trained) == len(saved) - 1  # all the rest did move


def test_learned_layer_starts_at_the_etf_and_is_trained(tmp_path):
    """--action-layer learned: the same first weights as the fixed ETF's, then training moves them."""
    etf = train("ppo_acpg", "Bandit", tmp_path / "etf", *TINY).agent.action_layer.weight
    flags = ("--action-layer", "learned")
    start = train("ppo_acpg", "Bandit", tmp_path / "start", *TINY, *FROZEN, *flags).agent.action_layer.weight
    end = train("ppo_acpg", "Bandit", tmp_path / "end", *TINY, *flags).agent.action_layer.weight
    torch.testing.assert_close(start, etf, rtol=0, atol=1e-20)
    assert not torch.equal(end, etf)
    assert end.requires_grad and not etf.requires_grad


@pytest.mark.parametrize("constraint", ["tanh", "ball", "sphere", "none"])
def test_feature_constraints(constraint, tmp_path):
    """logits = scale W h, with h in the box, in the ball, on the sphere, or anywhere."""
    flags = ("--feature-constraint", constraint, "--etf-scale", 3.5, "--feature-gain", 2)
    agent = train("ppo_acpg", "CartPole-v1", tmp_path / "run", *TINY, *FROZEN, *flags).agent
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
    one, two = (train("ppo_acpg", "Bandit", tmp_path / "run", *TINY, "--seed", s).agent.action_layer.weight for s in (1, 2))
    assert not torch.allclose(one, two, atol=1e-2)
    for weight in (one, two):
        torch.testing.assert_close(weight @ weight.T, 1.2 * torch.eye(6) - 0.2, rtol=0, atol=1e-6)


# Options


@both
def test_video_does_not_change_training(script, tmp_path):
    """--capture-video leaves videos in the run's folder and the same weights as without."""
    pytest.importorskip("moviepy", reason="gymnasium records videos with MoviePy: pip install moviepy")
    silent = train(script, "Clock", tmp_path / "silent", *TINY)
    filmed = train(script, "Clock", tmp_path / "filmed", *TINY, "--capture-video")
    assert same(weights(silent), weights(filmed))
    assert without_speed(read_progress(tmp_path / "silent")) == without_speed(read_progress(tmp_path / "filmed"))
    assert list((tmp_path / "filmed").rglob("*.mp4"))


@both
def test_track_without_wandb(script, tmp_path, monkeypatch):
    """--track without Weights & Biases says so in one line."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = run_script(script, "ConstantReward", tmp_path / "run", *TINY, "--track")
    (line,) = result.stderr.splitlines()
    assert "wandb" in line
    assert result.status == 0 or not (tmp_path / "run").exists()


@both
def test_help_describes_every_argument(script, tmp_path):
    """--help lists the arguments, each with its line of description."""
    names = """env-id total-timesteps learning-rate num-envs num-steps anneal-lr gamma gae-lambda num-minibatches update-epochs
        norm-adv clip-coef clip-vloss ent-coef vf-coef max-grad-norm target-kl exp-name seed cuda track capture-video
        save-model env-kwargs max-episode-steps run-dir diagnostics-interval"""
    acpg_only = "etf-scale feature-constraint feature-gain action-layer"
    result = run_script(script, "CartPole-v1", tmp_path / "run", "--help")
    assert result.status == 0
    assert not (tmp_path / "run").exists()
    for name in names.split():
        assert re.search(rf"--{name}\b", result.stdout), name
    for name in acpg_only.split():
        assert (f"--{name}" in result.stdout) == (script == "ppo_acpg"), name
    source = (helpers.ROOT / f"{script}.py").read_text()
    fields = re.search(r"class Args:\n(.*?)\n\n\n", source, re.DOTALL)[1]
    lines = [line.strip() for line in fields.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert all(re.match(r"\w+: ", line) for line in lines[::2])
    assert all(re.fullmatch(r'""".+"""', line) for line in lines[1::2])


@both
def test_defaults_are_those_of_cleanrl(script, tmp_path):
    """The defaults are ppo.py's."""
    args = vars(train(script, "ConstantReward", tmp_path / "run", "--total-timesteps", 512).args)
    defaults = dict(num_envs=4, num_steps=128, update_epochs=4, num_minibatches=4, learning_rate=2.5e-4, anneal_lr=True)
    defaults |= dict(gamma=0.99, gae_lambda=0.95, norm_adv=True, clip_coef=0.2, clip_vloss=True, ent_coef=0.01, vf_coef=0.5)
    defaults |= dict(max_grad_norm=0.5, target_kl=None, exp_name=script, seed=1, track=False, capture_video=False)
    assert {name: args[name] for name in defaults} == defaults
    source = (helpers.ROOT / f"{script}.py").read_text()
    assert re.search(r"total_timesteps: int = 500_?000\n", source)


@both
def test_progress_bar_on_a_terminal_only(script, tmp_path):
    """A terminal gets a bar with steps and mean return; anything else gets nothing on stderr."""
    shown = run_script(script, "Terminated", tmp_path / "run", *TINY, terminal=True)
    assert "\r" in shown.stderr and "step" in shown.stderr and "3.0" in shown.stderr
    assert train(script, "Terminated", tmp_path / "run", *TINY).stderr == ""
