"""The losses and the optimiser's short cuts against the textbook forms they stand for.

Each is the same source in both scripts of a pair, says test_scripts_agree; one of them is tested.
"""

import copy
from types import SimpleNamespace

import gymnasium as gym
import pytest
import torch

import a2c_acpg
import ppo_acpg
import ppo_baseline
import reinforce_acpg


def make_agent(script):
    """An agent for three observations and four actions, in float64, and a batch it has not seen."""
    args = SimpleNamespace(
        seed=1, feature_dim=8, etf_scale=2.0, feature_constraint="ball", feature_gain=1.0, action_layer="etf"
    )
    torch.manual_seed(0)
    agent = script.Agent(gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(4), args).double()
    agent.encode = lambda obs: obs
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
        errors = torch.maximum(errors, (values + torch.clamp(new - values, -args.clip_coef, args.clip_coef) - returns) ** 2)
    value, entropy = 0.5 * errors.mean(), pi.entropy().mean()
    return policy - args.ent_coef * entropy + args.vf_coef * value, (value, policy, entropy)


def textbook_a2c(agent, args, obs, actions, advantages, returns):
    """A2C's loss as Mnih et al. (2016) and Stable-Baselines3 write it, but for the 1/2 of the value loss."""
    pi = torch.distributions.Categorical(logits=agent.logits(obs))
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy = -torch.mean(advantages * pi.log_prob(actions))
    value, entropy = 0.5 * ((returns - agent.value(obs)) ** 2).mean(), pi.entropy().mean()
    return policy - args.ent_coef * entropy + args.vf_coef * value, (value, policy, entropy)


def textbook_reinforce(agent, args, obs, actions, weights, lengths):
    """REINFORCE, one episode after the other: the mean over episodes of the sum over their steps."""
    policy = entropy_bonus = 0.0
    for each in zip(*(tensor.split(lengths) for tensor in (obs, actions, weights)), strict=True):
        for ob, action, weight in zip(*each, strict=True):
            pi = torch.distributions.Categorical(logits=agent.logits(ob[None])[0])
            policy = policy - weight * pi.log_prob(action) / len(lengths)
            entropy_bonus = entropy_bonus + pi.entropy() / len(lengths)
    return policy - args.ent_coef * entropy_bonus, (policy, entropy_bonus * len(lengths) / len(obs))


def check(agent, result, expected):
    """Loss, its parts, and the gradient of each parameter agree; the parts carry no gradient."""
    (loss, parts), (textbook, textbook_parts) = result, expected
    torch.testing.assert_close(loss, textbook)
    torch.testing.assert_close(torch.stack(parts), torch.stack(textbook_parts).detach())
    parameters = list(agent.parameters())
    ours, theirs = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (loss, textbook))
    torch.testing.assert_close(ours, theirs)
    assert not any(part.requires_grad for part in parts)


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("clip_vloss", [True, False])
def test_ppo(norm_adv, clip_vloss):
    agent, batch = make_agent(ppo_acpg)
    args = SimpleNamespace(norm_adv=norm_adv, clip_vloss=clip_vloss, clip_coef=0.2, ent_coef=0.01, vf_coef=0.5)
    *result, logratio = ppo_acpg.ppo_loss(agent, args, *batch)
    assert 0.1 < ((logratio.exp() - 1).abs() > 0.2).double().mean() < 0.9  # both sides of the clip are tried
    assert not logratio.requires_grad
    check(agent, result, textbook_ppo(agent, args, *batch))


@pytest.mark.parametrize("norm_adv", [True, False])
def test_a2c(norm_adv):
    agent, (obs, actions, _, advantages, returns, _) = make_agent(a2c_acpg)
    args = SimpleNamespace(norm_adv=norm_adv, ent_coef=0.03, vf_coef=0.7)
    result = a2c_acpg.a2c_loss(args, agent.logits(obs), agent.value(obs), actions, advantages, returns)
    check(agent, result, textbook_a2c(agent, args, obs, actions, advantages, returns))


@pytest.mark.parametrize("lengths", [[64], [1] * 64, [40, 1, 5, 18]])
def test_reinforce(lengths):
    """The loss sums over steps, bonus included, and divides by episodes, however long these are."""
    agent, (obs, actions, _, weights, _, _) = make_agent(reinforce_acpg)
    args = SimpleNamespace(ent_coef=0.03, batch_episodes=len(lengths))
    result = reinforce_acpg.reinforce_loss(agent, args, obs, actions, weights)
    check(agent, result, textbook_reinforce(agent, args, obs, actions, weights, lengths))


@pytest.mark.parametrize("script", [ppo_baseline, ppo_acpg])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop])
def test_one_vector_of_parameters_is_optimised_like_the_parameters_it_holds(script, optimizer):
    agent, batch = make_agent(script)
    twin = copy.deepcopy(agent)
    twin.encode = lambda obs: obs
    args = SimpleNamespace(norm_adv=True, clip_vloss=True, clip_coef=0.2, ent_coef=0.01, vf_coef=0.5)
    flat = script.flatten_parameters(agent)
    assert flat.numel() == sum(parameter.numel() for parameter in twin.parameters())
    optimizers = optimizer([flat], lr=1e-2), optimizer(twin.parameters(), lr=1e-2)
    for _ in range(5):
        flat.grad.zero_()
        optimizers[1].zero_grad()
        for model in (agent, twin):
            script.ppo_loss(model, args, *batch)[0].backward()
        norms = torch.nn.utils.clip_grad_norm_([flat], 0.1), torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        torch.testing.assert_close(*norms)
        for each in optimizers:
            each.step()
    torch.testing.assert_close(dict(agent.state_dict()), dict(twin.state_dict()))
