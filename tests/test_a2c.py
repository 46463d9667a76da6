"""What only A2C does: one RMSprop step per rollout, and entries of the logs that stand for several updates."""

import numpy as np
import probe_envs
import pytest
import torch
from helpers import FROZEN, PAIRS, advantages_by_hand, read_events, steps_by_env, tiny, train

both = pytest.mark.parametrize("script", PAIRS[1])


@pytest.fixture(autouse=True)
def forget_calls():
    """Start each test with no recorded calls."""
    probe_envs.CALLS.clear()


def gradient_by_hand(agent, calls, gamma, gae_lambda, ent_coef, vf_coef):
    """The gradient of A2C's loss of one rollout, as one vector, from what the environments recorded."""
    advantages = torch.tensor([a for each in calls for a in advantages_by_hand(agent, each, gamma, gae_lambda)])
    obs = torch.as_tensor(np.stack([call.obs for each in calls for call in each]))
    actions = torch.tensor([call.action for each in calls for call in each])
    pi, values = torch.distributions.Categorical(logits=agent.logits(obs)), agent.value(obs)
    value_loss = 0.5 * (advantages + values.detach() - values).square().mean()
    loss = -(advantages * pi.log_prob(actions)).mean() - ent_coef * pi.entropy().mean() + vf_coef * value_loss
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(agent.parameters()))])


def vector(agent):
    """The agent's parameters, copied, in one vector."""
    return torch.nn.utils.parameters_to_vector(agent.parameters()).detach().clone()


@both
@pytest.mark.parametrize("max_grad_norm", [0.01, 1e9])
def test_updates_are_rmsprop_steps(script, max_grad_norm, tmp_path):
    """Each rollout moves the weights by lr g / (sqrt(v) + 1e-5), v <- .99 v + .01 g^2, g the gradient once clipped."""
    flags = (
        "--gamma",
        0.9,
        "--gae-lambda",
        0.8,
        "--ent-coef",
        0.03,
        "--vf-coef",
        0.7,
        "--max-grad-norm",
        max_grad_norm,
    )
    agents = [train(script, "Clock", tmp_path / "frozen", *tiny(script), *flags, *FROZEN).agent]
    for updates in (1, 2, 3):
        probe_envs.CALLS.clear()
        run = train(
            script, "Clock", tmp_path / str(updates), *tiny(script, updates=updates), *flags, "--learning-rate", 1e-3
        )
        agents.append(run.agent)
    calls, average = steps_by_env(), 0.0
    assert [len(each) for each in calls] == [48, 48]
    for update, (before, after) in enumerate(zip(agents, agents[1:], strict=False)):
        rollout = [each[16 * update : 16 * (update + 1)] for each in calls]
        gradient = gradient_by_hand(before, rollout, 0.9, 0.8, 0.03, 0.7)
        assert 0.01 < gradient.norm() < 1e9
        gradient *= min(1.0, max_grad_norm / gradient.norm().item())
        average = 0.99 * average + 0.01 * gradient.square()
        step = 1e-3 * gradient / (average.sqrt() + 1e-5)
        torch.testing.assert_close(vector(after) - vector(before), -step, rtol=5e-3, atol=2e-6)
        assert (
            0.01 < ((average.sqrt() > 1e-7) & (average.sqrt() < 1e-4)).float().mean()
        )  # where epsilon shows, and its place


@both
def test_entries_are_means_over_the_log_interval(script, tmp_path):
    """With frozen weights, entries over three updates are the means of those over one; the last may be over fewer."""
    flags = (*tiny(script, updates=7), *FROZEN, "--diagnostics-interval", 3, "--gae-lambda", 1, "--gamma", 0.99)
    train(script, "Clock", tmp_path / "one", *flags, "--log-interval", 1)
    probe_envs.CALLS.clear()
    agent = train(script, "Clock", tmp_path / "three", *flags, "--log-interval", 3).agent
    one, three = (read_events(tmp_path / name)[0] for name in ("one", "three"))
    assert set(one) == set(three)
    windows, ends = [(0, 3), (3, 6), (6, 7)], [96, 192, 224]
    for tag in ("losses/value_loss", "losses/policy_loss", "losses/entropy"):
        assert [step for step, _ in one[tag]] == [32 * (i + 1) for i in range(7)]
        means = [np.mean([value for _, value in one[tag][slice(*window)]]) for window in windows]
        assert three[tag] == [(end, pytest.approx(mean, rel=1e-4)) for end, mean in zip(ends, means, strict=True)]

    # The episodes that ended, the share of variance explained and the states measured in the window as a whole
    calls = steps_by_env()
    assert [step for step, _ in three["collapse/feature_norm"]] == [0, *ends]
    for i, (first, last) in enumerate(windows):
        rollouts = [[each[16 * k : 16 * (k + 1)] for each in calls] for k in range(first, last)]
        steps = [call for rollout in rollouts for each in rollout for call in each]
        advantages = np.concatenate(
            [advantages_by_hand(agent, each, 0.99, 1.0) for rollout in rollouts for each in rollout]
        )
        with torch.no_grad():
            obs = torch.as_tensor(np.stack([call.obs for call in steps]))
            values, norm = agent.value(obs).numpy(), agent.features(obs.unique(dim=0)).norm(dim=1).mean().item()
        explained = 1 - advantages.var() / (advantages + values).var()
        assert three["losses/explained_variance"][i] == (ends[i], pytest.approx(explained, rel=1e-3, abs=1e-4))
        assert three["collapse/feature_norm"][i + 1] == (ends[i], pytest.approx(norm, rel=1e-5))
        lengths = [call.after[0] for call in steps if call.terminated or call.truncated]
        assert three["charts/episodic_length"][i] == (ends[i], pytest.approx(np.mean(lengths)))


@both
@pytest.mark.parametrize("log_interval", [1, 2, 3, 100])
def test_every_episode_is_counted_once(script, log_interval, tmp_path):
    """However many updates an entry stands for, all episodes that ended enter the returns, in order, and none twice."""
    flags = (*tiny(script, updates=7), "--log-interval", log_interval, "--diagnostics-interval", 0)
    result = train(script, "Clock", tmp_path / "run", *flags)
    returns = []
    for each in steps_by_env():
        total = 0.0
        for call in each:
            total += call.reward
            if call.terminated or call.truncated:
                returns.append(total)
                total = 0.0
    assert 20 < len(returns) < 100  # run.returns keeps the last hundred
    assert sorted(result.run.returns) == pytest.approx(sorted(returns))
    assert f"over the last {len(returns)} episodes" in result.stdout


@both
def test_diagnostics_stand_at_their_own_steps(script, tmp_path):
    """collapse/* at step 0, at each multiple of the interval, and at the end, each once."""
    flags = (*tiny(script, updates=7), "--log-interval", 2, "--diagnostics-interval", 4)
    train(script, "Bandit", tmp_path / "run", *flags)
    events, _ = read_events(tmp_path / "run")
    assert [step for step, _ in events["collapse/feature_norm"]] == [0, 128, 224]
    assert [step for step, _ in events["losses/entropy"]] == [64, 128, 192, 224]
    train(script, "Bandit", tmp_path / "run", *flags, "--diagnostics-interval", 0)
    assert not any(tag.startswith("collapse") for tag in read_events(tmp_path / "run")[0])
