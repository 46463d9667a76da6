"""One gradient step: the optimisers against torch's, an agent in float64, and `update` compiled into one graph."""

import copy
import importlib
import os
import shutil

import gymnasium as gym
import pytest
import torch
from helpers import (
    ACPG,
    PAIRS,
    SCRIPTS,
    WITH_CRITIC,
    algorithm,
    read_progress,
    run_script,
    tiny,
    train,
    trained_by_optimizer,
)
from torch._dynamo.backends.registry import lookup_backend

every = pytest.mark.parametrize("script", SCRIPTS)
with_critic = pytest.mark.parametrize("script", WITH_CRITIC)
BOX, DISCRETE = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(5, start=2)
OPTIMIZER = {"ppo": "Adam", "a2c": "RMSprop", "reinforce": "Adam", "trpo": "Adam"}


def setup(script, observation_space=BOX, **overrides):
    """The script as a module, its arguments, and an agent for four actions."""
    module = importlib.import_module(script)
    args = module.Args(seed=3, **overrides)
    torch.manual_seed(3)
    return module, args, module.Agent(observation_space, gym.spaces.Discrete(4), args)


def optimizer(module, agent):
    kind = getattr(module, "Adam" if hasattr(module, "Adam") else "RMSprop")
    return kind(trained_by_optimizer(module.__name__, agent).parameters())


def batches(script, agent, count, size=32, space=BOX):
    """What `update` takes in its batch, `count` times, as the agent's own data might be."""
    g = torch.Generator().manual_seed(1)
    for _ in range(count):
        obs, actions = torch.randn(size, 3, generator=g), torch.randint(4, (size,), generator=g)
        obs = obs if space is BOX else torch.randint(2, 7, (size,), generator=g)
        advantages, noise = torch.randn(2, size, generator=g)
        if algorithm(script) == "reinforce":
            yield obs, actions, advantages
            continue
        with torch.no_grad():
            values = agent.value(obs) + 0.3 * noise
        if algorithm(script) == "trpo":
            yield obs, advantages + values
            continue
        with torch.no_grad():
            logprobs = agent.logits(obs).log_softmax(-1).gather(1, actions[:, None])[:, 0] + 0.3 * noise
        own = (logprobs, advantages, advantages + values, values)
        yield obs, actions, *(own if algorithm(script) == "ppo" else own[1:3])


# A copy in another precision


@every
@pytest.mark.parametrize("space", [BOX, DISCRETE], ids=["box", "discrete"])
def test_double_copy(script, space):
    """copy.deepcopy(agent).double() computes what the agent does, within rounding, and shares nothing with it."""
    constraints = ("tanh", "ball", "sphere", "none") if script in ACPG else (None,)
    for constraint in constraints:
        _, _, agent = setup(script, space, **({"feature_constraint": constraint} if constraint else {}))
        double = copy.deepcopy(agent).double()
        if space is BOX:
            obs = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        else:
            obs = torch.arange(2, 7).repeat(3)
        with torch.no_grad():
            for function in ("features", "logits", *(("value",) if script in WITH_CRITIC else ())):
                expected = getattr(agent, function)(obs)
                assert expected.dtype == torch.float32
                for given in (obs, obs.double()):
                    got = getattr(double, function)(given)
                    assert got.dtype == torch.float64
                    torch.testing.assert_close(got.float(), expected, rtol=1e-4, atol=1e-6)
        assert agent.features(obs.double()).dtype == torch.float32  # the network's precision is what counts
        with torch.no_grad():
            for tensor in double.state_dict().values():
                tensor.add_(1.0)
        original = setup(script, space, **({"feature_constraint": constraint} if constraint else {}))[2].state_dict()
        assert all(torch.equal(tensor, original[name]) for name, tensor in agent.state_dict().items())


@every
def test_double_copy_has_more_digits(script):
    """Not float32 inside: the double copy's logits of inputs that float32 cannot tell apart differ."""
    _, _, agent = setup(script)
    double = copy.deepcopy(agent).double()
    obs = torch.full((1, 3), 0.5, dtype=torch.float64)
    with torch.no_grad():
        difference = (double.logits(obs * (1 + 1e-12)) - double.logits(obs)).abs().max()
    assert 0 < difference < 1e-9


# The optimisers


@pytest.mark.parametrize("script", [pair[1] for pair in PAIRS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_grad_norm", [1e-3, 0.5, 1e9])
def test_optimizer_is_that_of_torch(script, dtype, max_grad_norm):
    """torch.optim's numbers, after nn.utils.clip_grad_norm_, over updates whose learning rate falls.

    Gradients of some parameters are so small that epsilon, 1e-5, shows, and its place. In float32 the tolerance is that
    of the square root of an average of squares.
    """
    name = OPTIMIZER[algorithm(script)]
    g = torch.Generator().manual_seed(0)
    ours = [torch.randn(shape, generator=g, dtype=dtype) for shape in ((4, 3), (7,), (2, 2, 2), ())]
    theirs = [torch.nn.Parameter(param.clone()) for param in ours]
    start = [param.clone() for param in ours]
    mine = getattr(importlib.import_module(script), name)(ours)
    if dtype == torch.float64:  # its moments have the default dtype
        for key, value in vars(mine).items():
            if isinstance(value, torch.Tensor):
                setattr(mine, key, value.double())
    torchs = getattr(torch.optim, name)(theirs, lr=1.0, eps=1e-5)
    clipped = 0
    for step in range(12):
        lr = 0.03 * (1 - step / 12)
        scale = 10.0 ** torch.randint(-7, 1, (4,), generator=g)
        grads = [s * torch.randn(param.shape, generator=g, dtype=dtype) for s, param in zip(scale, ours, strict=True)]
        copies = [grad.clone() for grad in grads]
        mine.step(grads, torch.tensor(lr, dtype=dtype), max_grad_norm)
        assert all(torch.equal(grad, before) for grad, before in zip(grads, copies, strict=True)), "gradients changed"
        for param, grad in zip(theirs, copies, strict=True):
            param.grad = grad
        clipped += torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm).item() > max_grad_norm
        torchs.param_groups[0]["lr"] = lr
        torchs.step()
        moved = [now - before for now, before in zip(ours, start, strict=True)]
        expected = [now.detach() - before for now, before in zip(theirs, start, strict=True)]
        tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 3e-6}
        torch.testing.assert_close(moved, expected, **tolerance)
    assert {1e-3: 6 < clipped, 0.5: 0 < clipped < 12, 1e9: clipped == 0}[max_grad_norm]


@every
def test_update_is_a_step_of_torchs_optimizer(script):
    """`update` against loss.backward(), clip_grad_norm_ and torch's optimiser, on the agent's own parameters."""
    module, args, agent = setup(script, max_grad_norm=0.05, learning_rate=1e-2)
    twin = copy.deepcopy(agent)
    mine = optimizer(module, agent)
    own, others = (trained_by_optimizer(script, each) for each in (agent, twin))
    assert [id(param) for param in mine.params] == [id(param) for param in own.parameters()]
    torchs = getattr(torch.optim, OPTIMIZER[algorithm(script)])(others.parameters(), lr=1e-2, eps=1e-5)
    loss_of = getattr(module, f"{algorithm(script)}_loss")
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    for batch in batches(script, copy.deepcopy(agent), 6):
        stats = module.update(agent, mine, args, torch.tensor(1e-2), *batch)
        loss, expected = loss_of(twin, args, *batch)
        torchs.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(others.parameters(), 0.05) > 0.05
        torchs.step()
        assert set(stats) == set(expected) and not any(value.requires_grad for value in stats.values())
        torch.testing.assert_close(stats, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dict(agent.state_dict()), dict(twin.state_dict()), rtol=1e-3, atol=2e-5)
    moved = {name for name, tensor in agent.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(moved) == len(list(own.parameters())) and moved <= {name for name, _ in agent.named_parameters()}


@every
def test_weights_come_and_go_after_the_optimizer_was_made(script):
    """Loading a checkpoint into a trained agent, and training a copy of one, do what they look like."""
    module, args, agent = setup(script)
    mine, (batch,) = optimizer(module, agent), batches(script, copy.deepcopy(agent), 1)
    saved = copy.deepcopy(agent.state_dict())
    stats = module.update(agent, mine, args, torch.tensor(1e-2), *batch)
    trained = copy.deepcopy(agent)
    frozen = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    agent.load_state_dict(saved)
    mine = optimizer(module, agent)
    torch.testing.assert_close(module.update(agent, mine, args, torch.tensor(1e-2), *batch), stats, rtol=0, atol=0)
    torch.testing.assert_close(dict(agent.state_dict()), frozen, rtol=0, atol=0)
    module.update(agent, mine, args, torch.tensor(1e-2), *batch)
    torch.testing.assert_close(dict(trained.state_dict()), frozen, rtol=0, atol=0)
    module.update(trained, optimizer(module, trained), args, torch.tensor(1e-2), *batch)
    for name, param in trained_by_optimizer(script, trained).named_parameters():
        old = frozen[name] if name in frozen else frozen[f"critic.{name}"]
        assert not torch.equal(param, old), name


# Compiled


@pytest.fixture
def graphs():
    """The graphs that torch.compile found, of a backend that needs no compiler; nothing of other tests' is left."""
    torch._dynamo.reset()
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    with torch._dynamo.config.patch(trace_autograd_ops=True):  # as the scripts do
        yield found, backend
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("script", "space", "overrides"),
    [
        *((script, space, {}) for script in WITH_CRITIC for space in (BOX, DISCRETE)),
        (
            *("ppo_acpg", BOX),
            {"action_layer": "learned", "feature_constraint": "ball", "norm_adv": False, "clip_vloss": False},
        ),
        ("ppo_acpg", BOX, {"feature_constraint": "sphere"}),
        ("a2c_acpg", BOX, {"feature_constraint": "none", "norm_adv": True}),
    ],
)
def test_update_compiles_into_one_graph(script, space, overrides, graphs):
    """Forward, gradient, clipping and step without a break (fullgraph raises at one), the same numbers as without.

    The learning rate changes from update to update and does not make another graph of it.
    """
    found, backend = graphs
    module, args, agent = setup(script, space, max_grad_norm=0.05, **overrides)
    twin = copy.deepcopy(agent)
    eager, compiled = optimizer(module, agent), optimizer(module, twin)
    update = torch.compile(module.update, fullgraph=True, backend=backend)
    for i, batch in enumerate(batches(script, copy.deepcopy(agent), 5, space=space)):
        lr = torch.tensor(1e-2 * (1 - i / 5))
        expected = module.update(agent, eager, args, lr, *batch)
        stats = update(twin, compiled, args, lr, *batch)
        torch.testing.assert_close(stats, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(dict(twin.state_dict()), dict(agent.state_dict()), rtol=1e-4, atol=2e-6)
    assert len(found) == 1, "it was compiled again"
    calls = " ".join(str(node.target) for node in found[0].graph.nodes)
    assert ("log_softmax" in calls) == (algorithm(script) != "trpo") and "lerp_" in calls and "sub_" in calls, (
        "the graph is not the whole update"
    )


def has_compiler():
    return bool(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"))


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
@with_critic
def test_compile_trains(script, tmp_path):
    """--compile from end to end: the run that it is without, within rounding, and no graph breaks."""
    torch._dynamo.reset()
    trace = torch._dynamo.config.trace_autograd_ops
    flags = (*tiny(script, updates=4), "--learning-rate", 1e-3, "--save-model")
    try:
        compiled = train(script, "ActionObservationReward", tmp_path / "compiled", *flags, "--compile")
        plain = train(script, "ActionObservationReward", tmp_path / "plain", *flags)
    finally:
        torch._dynamo.config.trace_autograd_ops = trace
        torch._dynamo.reset()
    assert compiled.stderr == ""
    for name, tensor in plain.agent.state_dict().items():
        torch.testing.assert_close(compiled.agent.state_dict()[name], tensor, rtol=1e-2, atol=1e-4)
    rows, expected = read_progress(tmp_path / "compiled"), read_progress(tmp_path / "plain")
    for row, other in zip(rows[1:], expected[1:], strict=True):
        for tag in row:
            if tag.startswith("losses"):
                assert float(row[tag]) == pytest.approx(float(other[tag]), rel=1e-2, abs=1e-4), tag


@with_critic
def test_compile_without_a_compiler(script, tmp_path, monkeypatch):
    """One line, before the run begins."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run_script(script, "ConstantReward", tmp_path / "run", *tiny(script), "--compile")
    assert result.status not in (0, None)
    (line,) = result.stderr.splitlines()
    assert "--compile" in line and "compiler" in line
    assert not (tmp_path / "run").exists()
