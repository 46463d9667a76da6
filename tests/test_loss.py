"""The losses against the textbook forms they stand for.

Each is the same source in both scripts of a pair, says test_scripts_agree; one of them is tested.
"""

from types import SimpleNamespace

import gymnasium as gym
import pytest
import torch

import a2c_acpg
import ppo_acpg
import reinforce_acpg


def make_agent(script):
    """An agent for three observations and four actions, in float64, and a batch it has not seen."""
    args = SimpleNamespace(
        feature_dim=8, etf_scale=2.0, feature_constraint="ball", feature_gain=1.0, action_layer="etf", activation="tanh"
    )
    torch.manual_seed(0)
    agent = script.Agent(gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(4), args).double()
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    obs, actions = draw(64, 3), torch.randint(4, (64,), generator=g)
    logprobs = agent.logits(obs).log_softmax(-1).gather(1, actions[:, None])[:, 0].detach() + 0.3 * draw(64)
    values = 0.3 * draw(64) + (agent.value(obs).detach() if hasattr(agent, "value") else 0.0)
    return agent, (obs, actions, logprobs, draw(64), values + draw(64), values)


def textbook_ppo(agent, args, obs, actions, logprobs, advantages, returns, values):
    """PPO's loss as Schulman et al. (2017) and CleanRL write it: minima and clips spelled out."""
    pi = torch.distributions.Categorical(logits=agent.logits(obs))
    ratio = (pi.log_prob(actions) - logprobs).exp()
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped = torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    policy = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    new = agent.value(obs)
    errors = (new - returns) ** 2
    if args.clip_vloss:
        errors = torch.maximum(
            errors, (values + torch.clamp(new - values, -args.clip_coef, args.clip_coef) - returns) ** 2
        )
    value, entropy = 0.5 * errors.mean(), pi.entropy().mean()
    parts = {"losses/value_loss": value, "losses/policy_loss": policy, "losses/entropy": entropy}
    return policy - args.ent_coef * entropy + args.vf_coef * value, parts


def textbook_a2c(agent, args, obs, actions, advantages, returns):
    """A2C's loss as Mnih et al. (2016) and Stable-Baselines3 write it, but for the 1/2 of the value loss."""
    pi = torch.distributions.Categorical(logits=agent.logits(obs))
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy = -torch.mean(advantages * pi.log_prob(actions))
    value, entropy = 0.5 * ((returns - agent.value(obs)) ** 2).mean(), pi.entropy().mean()
    parts = {"losses/value_loss": value, "losses/policy_loss": policy, "losses/entropy": entropy}
    return policy - args.ent_coef * entropy + args.vf_coef * value, parts


def textbook_reinforce(agent, args, obs, actions, weights, lengths):
    """REINFORCE, one episode after the other: the mean over episodes of the sum over their steps."""
    policy = entropy_bonus = 0.0
    for each in zip(*(tensor.split(lengths) for tensor in (obs, actions, weights)), strict=True):
        for ob, action, weight in zip(*each, strict=True):
            pi = torch.distributions.Categorical(logits=agent.logits(ob[None])[0])
            policy = policy - weight * pi.log_prob(action) / len(lengths)
            entropy_bonus = entropy_bonus + pi.entropy() / len(lengths)
    parts = {"losses/policy_loss": policy, "losses/entropy": entropy_bonus * len(lengths) / len(obs)}
    return policy - args.ent_coef * entropy_bonus, parts


def check(agent, result, expected):
    """Loss, its parts, and the gradient of each parameter agree; the parts, which are logged, carry no gradient."""
    (loss, parts), (textbook, textbook_parts) = result, expected
    torch.testing.assert_close(loss, textbook)
    for name, part in textbook_parts.items():
        torch.testing.assert_close(parts[name], part.detach())
    parameters = list(agent.parameters())
    ours, theirs = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (loss, textbook))
    torch.testing.assert_close(ours, theirs)
    assert not any(part.requires_grad for part in parts.values())


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("clip_vloss", [True, False])
def test_ppo(norm_adv, clip_vloss):
    agent, batch = make_agent(ppo_acpg)
    args = SimpleNamespace(norm_adv=norm_adv, clip_vloss=clip_vloss, clip_coef=0.2, ent_coef=0.01, vf_coef=0.5)
    loss, stats = ppo_acpg.ppo_loss(agent, args, *batch)
    check(agent, (loss, stats), textbook_ppo(agent, args, *batch))

    # what else is logged: both estimators of KL(old, new), and how often the ratio left the clip's range
    obs, actions, logprobs, *_ = batch
    with torch.no_grad():
        ratios = (agent.logits(obs).log_softmax(-1)[torch.arange(64), actions] - logprobs).exp()
    outside = ((ratios < 0.8) | (ratios > 1.2)).double().mean()
    assert 0.1 < outside < 0.9 and (ratios < 0.8).any() and (ratios > 1.2).any()  # both sides of the clip are tried
    torch.testing.assert_close(stats["losses/clipfrac"], outside)
    torch.testing.assert_close(stats["losses/old_approx_kl"], -ratios.log().mean())
    torch.testing.assert_close(stats["losses/approx_kl"], (ratios - 1 - ratios.log()).mean())


@pytest.mark.parametrize("norm_adv", [True, False])
def test_a2c(norm_adv):
    agent, (obs, actions, _, advantages, returns, _) = make_agent(a2c_acpg)
    args = SimpleNamespace(norm_adv=norm_adv, ent_coef=0.03, vf_coef=0.7)
    result = a2c_acpg.a2c_loss(agent, args, obs, actions, advantages, returns)
    check(agent, result, textbook_a2c(agent, args, obs, actions, advantages, returns))


@pytest.mark.parametrize("lengths", [[64], [1] * 64, [40, 1, 5, 18]])
def test_reinforce(lengths):
    """The loss sums over steps, bonus included, and divides by episodes, however long these are."""
    agent, (obs, actions, _, weights, _, _) = make_agent(reinforce_acpg)
    args = SimpleNamespace(ent_coef=0.03, num_envs=1, num_episodes=len(lengths), num_minibatches=1)
    result = reinforce_acpg.reinforce_loss(agent, args, obs, actions, weights)
    check(agent, result, textbook_reinforce(agent, args, obs, actions, weights, lengths))
    halves = SimpleNamespace(ent_coef=0.03, num_envs=2, num_episodes=len(lengths), num_minibatches=2)
    result = reinforce_acpg.reinforce_loss(agent, halves, obs, actions, weights)
    check(agent, result, textbook_reinforce(agent, args, obs, actions, weights, lengths))
