"""What only REINFORCE does: returns-to-go, batches of whole episodes, their weights, and an unbiased estimator."""

import itertools
import math

import numpy as np
import probe_envs
import pytest
import torch
from helpers import FROZEN, PAIRS, read_events, read_progress, read_record, record_gradients, tiny, train
from numpy.testing import assert_allclose

from reinforce_acpg import compute_returns  # the same source in both scripts, says test_scripts_agree

both = pytest.mark.parametrize("script", PAIRS[2])


@pytest.fixture(autouse=True)
def forget_calls():
    """Start each test with no recorded calls."""
    probe_envs.CALLS.clear()


# compute_returns, by hand: R_t = r_t + gamma R_{t+1}, and R_t = r_t where the episode ends


def returns_of(rewards, dones, gamma=0.5):
    """Of one environment, given as lists over its steps."""
    rewards, dones = (np.array(values, dtype=np.float64)[:, None] for values in (rewards, dones))
    return compute_returns(rewards, dones, gamma)[:, 0].tolist()


def test_discounting():
    # 8; 4 + 8/2 = 8; 2 + 8/2 = 6; 1 + 6/2 = 4
    assert returns_of([1, 2, 4, 8], [0, 0, 0, 1]) == [4, 6, 8, 8]
    assert returns_of([1, 2, 4, 8], [0, 0, 0, 1], gamma=1.0) == [15, 14, 12, 8]
    assert returns_of([1, 2, 4, 8], [0, 0, 0, 1], gamma=0.0) == [1, 2, 4, 8]


def test_several_episodes_in_one_column():
    # three episodes: (1, 2), (4), (8, 16, 32); nothing leaks from one into the one before
    assert returns_of([1, 2, 4, 8, 16, 32], [0, 1, 1, 0, 0, 1]) == [2, 2, 4, 24, 32, 32]
    assert returns_of([1, 2, 4, 8, 16, 32], [0, 1, 1, 0, 0, 1], gamma=1.0) == [3, 2, 4, 56, 48, 32]


def test_last_episode_still_running():
    # the second episode, (4, 8), is what was collected so far: nothing stands for what would have followed
    assert returns_of([1, 2, 4, 8], [0, 1, 0, 0]) == [2, 2, 8, 8]


def test_environments_are_columns():
    rewards = np.array([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])
    dones = np.array([[True, False], [False, True], [True, False]])
    expected = np.array([[1.0, 2.0], [4.0, 2.0], [4.0, 4.0]])
    assert_allclose(compute_returns(rewards, dones, 0.5), expected)
    assert rewards.tolist() == [[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]], "the input is left alone"


# The batch, from what the environments recorded


def segments(num_envs):
    """The calls between two updates; the last segment is what came after the last update."""
    parts = [[]]
    for call in probe_envs.CALLS:
        if call.kind == "update":
            parts.append([])
        else:
            parts[-1].append(call)
    for part in parts[:-1]:
        assert [call.kind for call in part[: num_envs + 1]] == ["reset"] * num_envs + ["step"], "not from a reset"
        assert len({call.env for call in part[:num_envs]}) == num_envs
    return parts


def episodes(segment):
    """The episodes of each environment in one segment, as lists of step() calls; the last may be incomplete."""
    found = {}
    for call in segment:
        if call.kind == "reset":
            found.setdefault(call.env, []).append([])
        else:
            found[call.env][-1].append(call)
    return list(found.values())


def ended(episode):
    return bool(episode) and (episode[-1].terminated or episode[-1].truncated)


def first_episodes(segment, count):
    """The first `count` complete episodes of each environment, which must be there; truncated ones are complete."""
    kept = [own[:count] for own in episodes(segment)]
    assert all(len(own) == count and all(ended(episode) for episode in own) for own in kept)
    return [episode for own in kept for episode in own]


def returns_to_go(episode, gamma):
    return [sum(gamma**k * call.reward for k, call in enumerate(episode[t:])) for t in range(len(episode))]


def gradient_by_hand(agent, kept, weights, ent_coef=0.0):
    """The gradient, as one vector, of the loss whose mean is over episodes and whose sum is over steps."""
    steps = [call for episode in kept for call in episode]
    pi = torch.distributions.Categorical(logits=agent.logits(torch.as_tensor(np.stack([call.obs for call in steps]))))
    logprobs = pi.log_prob(torch.tensor([call.action for call in steps]))
    loss = -(torch.tensor(weights) * logprobs).sum() / len(kept) - ent_coef * pi.entropy().sum() / len(kept)
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(agent.parameters()))])


@both
@pytest.mark.parametrize(("num_envs", "num_episodes"), [(3, 2), (4, 1), (1, 5)])
def test_batch_is_the_first_episodes_of_every_environment(script, num_envs, num_episodes, tmp_path, monkeypatch):
    """Each update takes the first episodes of every environment from a reset, drops the rest, and counts every step."""
    flags = ("--num-envs", num_envs, "--num-episodes", num_episodes, "--total-timesteps", 400, *FROZEN)
    flags += ("--no-running-baseline", "--gamma", 0.9, "--ent-coef", 0.03, "--max-grad-norm", 1e9)
    gradients = record_gradients(monkeypatch)
    result = train(script, "Clock", tmp_path / "run", *flags)
    *batches, rest = segments(num_envs)
    events, _ = read_events(tmp_path / "run")
    assert len(batches) == len(gradients) > 5
    taken, dropped, all_kept = 0, 0, []
    for i, (segment, gradient) in enumerate(zip(batches, gradients, strict=True)):
        kept = first_episodes(segment, num_episodes)
        all_kept += kept
        taken += sum(call.kind == "step" for call in segment)
        dropped += sum(call.kind == "step" for call in segment) - sum(len(episode) for episode in kept)
        # not a step longer than the slowest environment needs
        assert any(len(own) <= num_episodes + 1 and not any(own[num_episodes:]) for own in episodes(segment))
        weights = [value for episode in kept for value in returns_to_go(episode, 0.9)]
        torch.testing.assert_close(gradient, gradient_by_hand(result.agent, kept, weights, 0.03), rtol=1e-4, atol=1e-5)
        returns = [sum(call.reward for call in episode) for episode in kept]
        assert events["charts/episodic_return"][i] == (taken, pytest.approx(np.mean(returns)))
        assert events["charts/episodic_length"][i] == (
            taken,
            pytest.approx(np.mean([len(episode) for episode in kept])),
        )
    assert (dropped > 0) == (num_envs > 1)
    assert any(episode[-1].truncated for episode in all_kept) and any(episode[-1].terminated for episode in all_kept)

    # every step counts, those of the last, incomplete batch too
    taken += sum(call.kind == "step" for call in rest)
    assert 400 - num_envs < taken <= 400
    assert read_record(tmp_path / "run")["global_step"] == taken
    assert int(read_progress(tmp_path / "run")[-1]["global_step"]) == taken
    assert events["collapse/feature_norm"][-1][0] == taken
    assert len(result.run.returns) == min(100, len(all_kept))


@both
@pytest.mark.parametrize(("flag", "value"), [("--minibatch-size", 7), ("--num-minibatches", 3)])
def test_minibatches(script, flag, value, tmp_path, monkeypatch):
    """Each pass takes every step of the batch once, in parts of about a size, or in so many that each stands for it."""
    flags = ("--num-envs", 2, "--num-episodes", 2, "--total-timesteps", 200, *FROZEN, "--update-epochs", 2, flag, value)
    flags += ("--no-running-baseline", "--gamma", 0.9, "--ent-coef", 0.03, "--max-grad-norm", 1e9)
    gradients = record_gradients(monkeypatch)
    agent = train(script, "Clock", tmp_path / "run", *flags).agent
    probe_envs.CALLS[:] = [
        call
        for call, following in zip(probe_envs.CALLS, [*probe_envs.CALLS[1:], None], strict=True)
        if following is None or not call.kind == following.kind == "update"
    ]
    *batches, _ = segments(2)
    assert len(batches) > 3
    for segment in batches:
        kept = first_episodes(segment, 2)
        steps = sum(map(len, kept))
        parts = math.ceil(steps / value) if flag == "--minibatch-size" else value
        weights = [weight for episode in kept for weight in returns_to_go(episode, 0.9)]
        expected = gradient_by_hand(agent, kept, weights, 0.03) * (value if flag == "--num-minibatches" else 1)
        for _ in range(2):
            total = torch.stack([gradients.pop(0) for _ in range(parts)]).sum(0)
            torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4 * expected.norm().item())
    assert not gradients


@both
def test_last_batch_exactly_in_time(script, tmp_path):
    """A batch that ends with the budget is used, and its diagnostics stand at the end once."""
    train(script, "Terminated", tmp_path / "run", "--num-envs", 2, "--num-episodes", 2, "--total-timesteps", 36)
    events, _ = read_events(tmp_path / "run")
    assert [step for step, _ in events["losses/entropy"]] == [12, 24, 36]
    assert [step for step, _ in events["collapse/feature_norm"]] == [0, 36]
    assert read_record(tmp_path / "run")["status"] == "finished"


@both
def test_incomplete_batch_is_dropped(script, tmp_path):
    """A batch that the budget cuts off changes no weight: the run ends as one did that had no budget for it."""
    flags = (*tiny(script), "--no-anneal-lr", "--num-envs", 2, "--num-episodes", 2, "--total-timesteps")
    exact, more = (train(script, "Terminated", tmp_path / str(steps), *flags, steps) for steps in (36, 46))
    for name, tensor in exact.agent.state_dict().items():
        assert torch.equal(tensor, more.agent.state_dict()[name]), name
    assert exact.run.returns == more.run.returns
    assert [read_record(tmp_path / str(steps))["global_step"] for steps in (36, 46)] == [36, 46]
    assert read_record(tmp_path / "46")["status"] == "finished"


# The weights of the log-probabilities


def normalised(returns):
    return (returns - np.mean(returns)) / (np.std(returns) + 1e-8)


@both
@pytest.mark.parametrize("option", ["--no-running-baseline", "--norm-returns", "--running-baseline"])
def test_weights(script, option, tmp_path, monkeypatch):
    """Returns-to-go as they are, normalised within the batch, or less the mean of earlier batches'."""
    flags = (
        *tiny(script, 6),
        "--total-timesteps",
        500,
        *FROZEN,
        "--gamma",
        0.9,
        "--ent-coef",
        0,
        "--max-grad-norm",
        1e9,
    )
    flags += ("--no-running-baseline", option) if option == "--norm-returns" else (option,)
    gradients = record_gradients(monkeypatch)
    result = train(script, "Clock", tmp_path / "run", *flags)
    *batches, _ = segments(2)
    assert len(batches) == len(gradients) > 15
    baseline = 0.0
    for i, (segment, gradient) in enumerate(zip(batches, gradients, strict=True), start=1):
        kept = first_episodes(segment, 2)
        returns = np.concatenate([returns_to_go(episode, 0.9) for episode in kept])
        weights = {"--norm-returns": normalised(returns), "--running-baseline": returns - baseline}.get(option, returns)
        torch.testing.assert_close(gradient, gradient_by_hand(result.agent, kept, weights), rtol=1e-3, atol=2e-5)
        # the mean of all batches so far, and from the tenth on one that forgets: a batch enters the next one's baseline
        baseline += max(1 / i, 0.1) * (np.mean(returns) - baseline)


@both
def test_the_running_baseline_is_the_default(script, tmp_path):
    """As docs/reinforce.md says, and normalisation is off."""
    args = train(script, "Clock", tmp_path / "run", *tiny(script, 6)).args
    assert (args.norm_returns, args.running_baseline, args.anneal_lr) == (False, True, False)


# The estimator


def expected_return(logits):
    """Of probe_envs.Stay, by enumeration of its trajectories, from the logits (3, 2) of its three observations."""
    logprobs, total, mean_length = logits.log_softmax(-1), 0.0, 0.0
    for actions in itertools.product((0, 1), repeat=3):
        length = actions.index(0) + 1 if 0 in actions else 3
        if any(actions[length:]):
            continue  # the same trajectory as with zeros there
        probability = sum(logprobs[t, actions[t]] for t in range(length)).exp()
        total = total + probability * sum(0.25 if action else 1.0 for action in actions[:length])
        mean_length += probability.item() * length
    return total, mean_length


def flat_gradient(output, agent):
    """Of a scalar with respect to the agent's parameters, as one vector in float64."""
    gradients = torch.autograd.grad(output, list(agent.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def hotelling(samples, truth):
    """n (mean - truth)^T S^-1 (mean - truth), which is chi-squared distributed if `truth` is their mean."""
    difference = samples.mean(0) - truth
    return (len(samples) * difference @ torch.linalg.solve(torch.cov(samples.T), difference)).item()


@pytest.mark.parametrize("script", [PAIRS[2][1], pytest.param(PAIRS[2][0], marks=pytest.mark.slow)])
@pytest.mark.parametrize("option", ["--no-running-baseline", "--running-baseline"])
def test_gradient_is_unbiased(script, option, tmp_path, monkeypatch):
    """At gamma = 1 the mean gradient of many batches is that of the expected return, which enumeration gives.

    In the environment the length of an episode depends on the actions, so that favouring short episodes, or dividing by
    steps, would show. All gradients lie in the span of three vectors, those of the log-odds in the three observations,
    and are compared there: 16.27 is the .999 quantile of chi-squared with three degrees of freedom.
    """
    assert expected_return(torch.zeros(3, 2))[0].item() == pytest.approx(1 / 2 + 1.25 / 4 + 1.5 / 8 + 0.75 / 8)
    flags = ("--num-envs", 4, "--num-episodes", 2, "--total-timesteps", 24_000, "--gamma", 1, "--ent-coef", 0)
    flags += ("--no-norm-returns", option, "--max-grad-norm", 1e9, "--diagnostics-interval", 0, *FROZEN)
    gradients = record_gradients(monkeypatch)
    agent = train(script, "Stay", tmp_path / "run", *flags).agent
    logits = agent.logits(torch.eye(3))
    log_odds = torch.stack([flat_gradient(logit[1] - logit[0], agent) for logit in logits])
    total, mean_length = expected_return(logits)
    truth, samples = (
        flat_gradient(total, agent),
        -torch.stack(gradients).double(),
    )  # the loss descends, the return ascends
    assert len(samples) > 800
    span = torch.linalg.qr(log_odds.T).Q
    torch.testing.assert_close((truth @ span) @ span.T, truth, rtol=0, atol=1e-6)
    torch.testing.assert_close((samples @ span) @ span.T, samples, rtol=0, atol=1e-5)
    samples, truth = samples @ span, truth @ span
    assert hotelling(samples, truth) < 16.27
    # the interval is narrow: it excludes no gradient, a fifth less or more, and what dividing by steps would give
    for wrong in (0.0, 0.8, 1.2, 1 / mean_length):
        assert hotelling(samples, wrong * truth) > 16.27, wrong
