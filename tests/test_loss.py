"""The loss and the optimiser's short cuts against the textbook forms they stand for."""

import copy
from types import SimpleNamespace

import gymnasium as gym
import pytest
import torch

import ppo_acpg
import ppo_baseline

SCRIPTS = [ppo_baseline, ppo_acpg]


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
    values = agent.value(obs).detach() + 0.3 * draw(64)
    return agent, (obs, actions, logprobs, draw(64), values + draw(64), values)


def textbook(agent, args, obs, actions, logprobs, advantages, returns, values):
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


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("clip_vloss", [True, False])
def test_loss_and_gradient_are_the_textbook_ones(script, norm_adv, clip_vloss):
    agent, batch = make_agent(script)
    args = SimpleNamespace(norm_adv=norm_adv, clip_vloss=clip_vloss, clip_coef=0.2, ent_coef=0.01, vf_coef=0.5)
    loss, parts, logratio = script.ppo_loss(agent, args, *batch)
    expected, expected_parts = textbook(agent, args, *batch)
    assert 0.1 < ((logratio.exp() - 1).abs() > 0.2).double().mean() < 0.9  # both sides of the clip are tried
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.stack(parts), torch.stack(expected_parts).detach())
    parameters = list(agent.parameters())
    ours, theirs = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    assert not any(part.requires_grad for part in (*parts, logratio))


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_vector_of_parameters_is_optimised_like_the_parameters_it_holds(script):
    agent, batch = make_agent(script)
    twin = copy.deepcopy(agent)
    twin.encode = lambda obs: obs
    args = SimpleNamespace(norm_adv=True, clip_vloss=True, clip_coef=0.2, ent_coef=0.01, vf_coef=0.5)
    flat = script.flatten_parameters(agent)
    assert flat.numel() == sum(parameter.numel() for parameter in twin.parameters())
    optimizers = torch.optim.Adam([flat], lr=1e-2), torch.optim.Adam(twin.parameters(), lr=1e-2)
    for _ in range(5):
        flat.grad.zero_()
        optimizers[1].zero_grad()
        for model in (agent, twin):
            script.ppo_loss(model, args, *batch)[0].backward()
        norms = torch.nn.utils.clip_grad_norm_([flat], 0.1), torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        torch.testing.assert_close(*norms)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(dict(agent.state_dict()), dict(twin.state_dict()))
