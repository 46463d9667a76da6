"""TRPO: its parts against their definitions, and what holds in each update of a run."""

import importlib

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import read_progress, tiny, train
from torch.nn.utils import parameters_to_vector

SCRIPTS = ("trpo_baseline", "trpo_acpg")
each = pytest.mark.parametrize("script", SCRIPTS)


def setup(script, size=64, **overrides):
    """The script, its arguments, a small agent in float64, and what update_policy takes in its batch."""
    module = importlib.import_module(script)
    args = module.Args(feature_dim=5, **overrides)
    torch.manual_seed(0)
    agent = module.Agent(gym.spaces.Box(-1, 1, (3,), np.float32), gym.spaces.Discrete(4), args).double()
    with torch.no_grad():  # away from the uniform policy
        for param in actor(agent):
            param.add_(0.3 * torch.randn_like(param))
    g = torch.Generator().manual_seed(1)
    obs, actions = torch.randn(size, 3, generator=g).double(), torch.randint(4, (size,), generator=g)
    with torch.no_grad():
        logprobs = agent.logits(obs).log_softmax(-1)
    return module, args, agent, (obs, actions, logprobs, torch.randn(size, generator=g).double())


def actor(agent):
    return [*agent.backbone.parameters(), *agent.action_layer.parameters()]


def fisher_matrix(agent, obs):
    """Mean over states and actions of the outer products of the gradients of the log-probabilities."""
    params = actor(agent)
    logprobs = agent.logits(obs).log_softmax(-1)
    matrix = 0
    for row in logprobs:
        for logprob in row:
            grad = torch.cat([g.flatten() for g in torch.autograd.grad(logprob, params, retain_graph=True)])
            matrix = matrix + logprob.exp().detach() * torch.outer(grad, grad) / len(obs)
    return matrix


@each
def test_fisher_product(script):
    module, args, agent, batch = setup(script)
    _, kl, _ = module.trpo_objective(agent, args, *batch)
    assert kl.abs() < 1e-12
    product = module.fisher_product(kl, actor(agent), 0.3)
    matrix = fisher_matrix(agent, batch[0])
    matrix = matrix + 0.3 * torch.eye(len(matrix), dtype=matrix.dtype)
    for seed in range(3):
        v = torch.randn(len(matrix), generator=torch.Generator().manual_seed(seed)).double()
        torch.testing.assert_close(product(v), matrix @ v, rtol=1e-8, atol=1e-10)


def test_conjugate_gradients():
    """In exact arithmetic n iterations solve n equations; fewer come near; nothing of nothing is nothing."""
    module = importlib.import_module("trpo_acpg")
    root = torch.randn(12, 12, generator=torch.Generator().manual_seed(0)).double()
    matrix, b = root @ root.T + torch.eye(12), torch.arange(12.0).double()
    product = lambda v: matrix @ v  # noqa: E731
    exact = torch.linalg.solve(matrix, b)
    errors = [float((module.conjugate_gradients(product, b, n, 0.0) - exact).norm()) for n in (1, 4, 8, 12, 20)]
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-6 and errors[4] < 1e-6
    assert module.conjugate_gradients(product, 0 * b, 10).tolist() == [0.0] * 12
    loose = module.conjugate_gradients(product, b, 100, 1e-2)
    assert ((matrix @ loose - b) @ (matrix @ loose - b)) <= 1e-2 * (b @ b)


@each
def test_the_first_step_tried_is_the_natural_gradient(script):
    """With a KL that is quadratic up to it, along F^-1 g, of the length at which KL is max_kl."""
    module, args, agent, batch = setup(script, max_kl=1e-8, damping=1e-3, cg_iterations=200)
    surrogate, _, _ = module.trpo_objective(agent, args, *batch)
    grad = module.flat_grad(surrogate, actor(agent))
    matrix = fisher_matrix(agent, batch[0])
    matrix = matrix + 1e-3 * torch.eye(len(matrix), dtype=matrix.dtype)
    direction = torch.linalg.solve(matrix, grad)
    before = parameters_to_vector(actor(agent)).detach().clone()
    stats = module.update_policy(agent, args, *batch)
    step = parameters_to_vector(actor(agent)).detach() - before
    assert stats["losses/line_search_failed"] == 0 and stats["losses/kl"] <= 1e-8
    cosine = step @ direction / step.norm() / direction.norm()
    assert cosine > 0.999
    full = (2e-8 / (direction @ matrix @ direction)).sqrt() * direction.norm()
    powers = [float(step.norm() / full / 0.8**k) for k in range(3)]
    assert any(abs(ratio - 1) < 0.01 for ratio in powers), powers


@each
def test_a_failed_search_undoes_the_step(script, monkeypatch):
    """Bit for bit: where no step improves the surrogate, and where none keeps to the bound."""
    module, args, agent, batch = setup(script, line_search_steps=3)
    before = [param.detach().clone() for param in agent.parameters()]
    stats = module.update_policy(agent, args, *batch[:3], torch.zeros(64).double())
    assert stats["losses/line_search_failed"] == 1 and stats["losses/kl"] == 0
    assert all(torch.equal(*pair) for pair in zip(before, agent.parameters(), strict=True))
    objective, tried = module.trpo_objective, []

    def beyond(*args):
        surrogate, kl, entropy = objective(*args)
        tried.append(kl if not tried else kl + 1.0)
        return surrogate, tried[-1], entropy

    monkeypatch.setattr(module, "trpo_objective", beyond)
    stats = module.update_policy(agent, args, *batch)
    assert stats["losses/line_search_failed"] == 1 and stats["losses/kl"] == 0 and len(tried) == 1 + 3
    assert all(torch.equal(*pair) for pair in zip(before, agent.parameters(), strict=True))


@each
def test_the_step_improves_the_surrogate_within_the_bound(script):
    module, args, agent, batch = setup(script, size=256)
    surrogate, _, _ = module.trpo_objective(agent, args, *batch)
    critic = [param.detach().clone() for param in agent.critic.parameters()]
    stats = module.update_policy(agent, args, *batch)
    after, kl, entropy = module.trpo_objective(agent, args, *batch)
    assert after > surrogate and 0 < kl <= args.max_kl
    known = {"policy_loss": -after, "kl": kl, "entropy": entropy, "line_search_failed": 0.0}
    for name, value in known.items():
        assert float(stats[f"losses/{name}"]) == pytest.approx(float(value)), name
    assert all(torch.equal(*pair) for pair in zip(critic, agent.critic.parameters(), strict=True))


@each
@pytest.mark.parametrize("max_kl", (0.003, 0.05))
def test_kl_in_a_run(script, max_kl, tmp_path):
    """On every update at most 1.5 times the bound; the policy moves."""
    flags = ("--num-steps", 64, "--num-minibatches", 4, "--total-timesteps", 128 * 20, "--max-kl", max_kl)
    train(script, "CartPole-v1", tmp_path, *tiny(script), *flags)
    kls = [float(row["losses/kl"]) for row in read_progress(tmp_path)[1:]]
    assert len(kls) == 20 and all(0 <= kl <= 1.5 * max_kl for kl in kls)
    assert np.mean(kls) > 0.3 * max_kl


@each
def test_only_the_critic_has_an_optimizer(script, tmp_path):
    """--learning-rate moves the critic alone."""
    slow, fast = (
        train(script, "CartPole-v1", tmp_path / rate, *tiny(script, updates=1), "--learning-rate", rate).agent
        for rate in ("1e-4", "1e-2")
    )
    for name, tensor in slow.state_dict().items():
        same = torch.equal(tensor, fast.state_dict()[name])
        assert same == (not name.startswith("critic")), name
