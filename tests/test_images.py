"""Images and structured observations: what the agent sees of them, and that it learns from it."""

import copy
import importlib
import json
import resource
import subprocess
import sys

import gymnasium as gym
import helpers
import numpy as np
import probe_envs
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
ACTIONS = gym.spaces.Discrete(4)


def image_space(*shape, low=0, high=255, dtype=np.uint8):
    return gym.spaces.Box(low, high, shape, dtype=dtype)


def make_agent(script, space, **overrides):
    """(module, agent) for an observation space and four actions."""
    module = importlib.import_module(script)
    torch.manual_seed(3)
    return module, module.Agent(space, ACTIONS, module.Args(**overrides))


def batch(space, size=6, seed=1):
    """`size` observations of a space, as a tensor."""
    space.seed(seed)
    return torch.as_tensor(np.stack([space.sample() for _ in range(size)]))


# The network


@every
@pytest.mark.parametrize(
    ("shape", "convolutions", "hidden"),
    [
        ((10, 10, 4), [(16, 3, 1)], 128),
        ((5, 5, 3), [(16, 3, 1)], 128),
        ((35, 80, 1), [(16, 3, 1)], 128),
        ((7, 9, 20), [(16, 3, 1)], 128),
        ((36, 36, 3), [(32, 8, 4), (64, 4, 2), (64, 3, 1)], 512),
        ((84, 84, 4), [(32, 8, 4), (64, 4, 2), (64, 3, 1)], 512),
        ((210, 160, 3), [(32, 8, 4), (64, 4, 2), (64, 3, 1)], 512),
    ],
)
def test_layers(script, shape, convolutions, hidden):
    """Convolutions and one hidden layer, then the same last hidden layer to the features as for vectors."""
    space = image_space(*shape)
    _, agent = make_agent(script, space, feature_dim=48)
    for name, last in (("backbone", 48), *((("critic", 64),) if script in WITH_CRITIC else ())):
        layers = [layer for layer in getattr(agent, name) if not isinstance(layer, torch.nn.Tanh)]
        convs = [layer for layer in layers if isinstance(layer, torch.nn.Conv2d)]
        assert [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in convs] == convolutions
        assert convs[0].in_channels == shape[2]
        linears = [layer.out_features for layer in layers if isinstance(layer, torch.nn.Linear)]
        assert linears[:2] == [hidden, last]
        kinds = [type(layer).__name__ for layer in layers]
        assert kinds[: 2 * len(convs) + 3] == ["Conv2d", "ReLU"] * len(convs) + ["Flatten", "Linear", "ReLU"]
        for layer in layers:
            if isinstance(layer, torch.nn.Conv2d):  # orthogonal, as everywhere
                rows = layer.weight.detach().flatten(1)
                gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
                torch.testing.assert_close(gram, 2 * torch.eye(len(gram)), atol=1e-4, rtol=1e-4)
    obs = batch(space)
    with torch.no_grad():
        assert agent.features(obs).shape == (6, 48) and agent.logits(obs).shape == (6, 4)
        if script in WITH_CRITIC:
            assert agent.value(obs).shape == (6,)


@every
def test_pixels_are_where_they_belong(script):
    """The convolution is that of a (C, H, W) image: against torch's own on one that is not square."""
    space = image_space(9, 12, 3)
    _, agent = make_agent(script, space)
    obs, conv = batch(space), agent.backbone[0]
    ours = conv(agent.encode(obs))
    theirs = torch.nn.functional.conv2d(obs.movedim(3, 1) / 255.0, conv.weight, conv.bias)
    torch.testing.assert_close(ours, theirs)


@every
@pytest.mark.parametrize(
    ("low", "high", "dtype", "expected"),
    [
        (0, 255, np.uint8, lambda x: x / 255),
        (0, 1, np.bool_, lambda x: x),
        (-3, 5, np.int64, lambda x: (x + 3) / 8),
        (-1.0, 1.0, np.float64, lambda x: (x + 1) / 2),
        (-np.inf, np.inf, np.float32, lambda x: x),
        (0.0, np.inf, np.float32, lambda x: x),
        (-np.finfo(np.float32).max, np.finfo(np.float32).max, np.float32, lambda x: x),
        (7, 7, np.uint8, lambda x: x),
    ],
)
def test_scaled_by_finite_bounds(script, low, high, dtype, expected):
    """And by nothing else; a copy in float64 too, and nothing of it is in the state that is saved."""
    space = image_space(6, 6, 2, low=low, high=high, dtype=dtype)
    _, agent = make_agent(script, space)
    obs = batch(space) if np.isfinite(space.high).all() and abs(high) < 1e30 else torch.randn(4, 6, 6, 2)
    wanted = expected(obs.double()).movedim(3, 1)
    torch.testing.assert_close(agent.encode(obs), wanted.float(), atol=1e-6, rtol=1e-5)
    double = copy.deepcopy(agent).double()
    torch.testing.assert_close(double.encode(obs), wanted, atol=1e-12, rtol=1e-12)
    assert all(name.split(".")[0] in ("critic", "backbone", "action_layer") for name in agent.state_dict())


@every
def test_each_channel_has_its_bounds(script):
    """As in MiniGrid, where kinds of objects, colours and states have few values each."""
    high = np.broadcast_to(np.array([10, 5, 2], dtype=np.uint8), (7, 7, 3))
    space = gym.spaces.Box(np.zeros_like(high), high, dtype=np.uint8)
    _, agent = make_agent(script, space)
    encoded = agent.encode(torch.as_tensor(high.copy())[None])
    assert torch.equal(encoded, torch.ones(1, 3, 7, 7))


@pytest.mark.parametrize(("baseline", "acpg"), PAIRS)
@pytest.mark.parametrize("shape", [(10, 10, 4), (40, 40, 2)])
def test_twins_share_their_weights(baseline, acpg, shape):
    """With one seed, all layers are the same numbers, up to the gain of the last hidden layer."""
    agents = [make_agent(script, image_space(*shape))[1] for script in (baseline, acpg)]
    ours, theirs = (dict(agent.state_dict()) for agent in agents)
    gain = [name for name in ours if name.startswith("backbone") and name.endswith("weight")][-1]
    for name in ours:
        if not name.startswith("action_layer"):
            ratio = 0.1 / 2**0.5 if name == gain else 1.0
            torch.testing.assert_close(theirs[name], ours[name] * ratio, rtol=1e-5, atol=1e-7)


# Runs


def solved(script, run_dir, kwargs, *more):
    """Train on the image probe; the share of right actions of the greedy policy, in batches of 300 images."""
    own = {
        "ppo": ("--num-steps", 32, "--learning-rate", 2e-3, "--total-timesteps", 6000),
        "a2c": ("--num-steps", 8, "--learning-rate", 2e-3, "--total-timesteps", 12000),
        "reinforce": ("--num-episodes", 8, "--learning-rate", 5e-3, "--total-timesteps", 12000),
        "trpo": ("--num-steps", 64, "--num-minibatches", 4, "--max-kl", 0.05, "--total-timesteps", 12000),
    }[algorithm(script)]
    result = train(script, "Image", run_dir, "--env-kwargs", json.dumps(kwargs), *own, "--ent-coef", 0, *more)
    env = probe_envs.Image(**kwargs)
    env.reset(seed=5)
    obs, right = [], []
    for _ in range(300):
        obs.append(env.reset()[0])
        right.append(env.state)
    with torch.no_grad():
        greedy = result.agent.logits(torch.as_tensor(np.stack(obs))).argmax(-1)
    return result, (greedy == torch.tensor(right)).double().mean().item()


@every
@pytest.mark.parametrize(
    "kwargs",
    [
        {"size": 8},
        pytest.param({"size": 6, "dtype": "bool", "high": 1}, marks=pytest.mark.slow),
        pytest.param({"size": 5, "dtype": "float64", "low": -40, "high": 2}, marks=pytest.mark.slow),
    ],
    ids=["uint8", "bool", "float64"],
)
def test_learns_from_images(script, kwargs, tmp_path):
    """Which column is bright, whatever the noise in the other channel; stored in the observation's own dtype."""
    result, share = solved(script, tmp_path / "run", kwargs)
    assert share > 0.95
    assert result.envs.obs.dtype == np.dtype(
        "float32" if kwargs.get("dtype") == "float64" else kwargs.get("dtype", "uint8")
    )
    assert result.b_obs.dtype == torch.from_numpy(result.envs.obs).dtype
    last = read_progress(tmp_path / "run")[-1]
    assert 0 < float(last["collapse/feature_norm"]) and float(last["collapse/classes_present"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("script", ACPG)
def test_learns_from_large_images(script, tmp_path):
    """Through the Nature CNN, at rates for it: at those above both arms of A2C and REINFORCE end with one action,
    and one seed of PPO in five with two."""
    rates = {"ppo": 5e-4, "a2c": 2.5e-4, "reinforce": 1e-3}
    rate = ("--learning-rate", rates[algorithm(script)]) if algorithm(script) in rates else ()
    assert solved(script, tmp_path / "run", {"size": 36}, *rate)[1] > 0.95


@every
def test_resume_with_images(script, tmp_path):
    """A run that was stopped goes on to the same end."""
    more = (*tiny(script, 1, 8), "--checkpoint-interval", 3, "--save-model", "--diagnostics-interval", 2)
    whole = train(script, "Image", tmp_path / "whole", *more)
    with pytest.MonkeyPatch.context() as patch:

        def stop(module):
            log = module.Run.log

            def stops(self, tags, step):
                log(self, tags, step)
                self.interrupted = 2 * (step >= 5 * 32)

            module.Run.log = stops

        patch.setattr(helpers, "patch_script", stop)
        assert run_script(script, "Image", tmp_path / "cut", *more).status == 130
    cut = train(script, "Image", tmp_path / "cut", *more, "--resume")
    assert cut.run.saved
    for name, tensor in whole.agent.state_dict().items():
        assert torch.equal(cut.agent.state_dict()[name], tensor)


@pytest.mark.parametrize("script", WITH_CRITIC)
@pytest.mark.parametrize("shape", [(10, 10, 4), (36, 36, 3)])
def test_update_compiles_into_one_graph(script, shape):
    """--compile on images: no break, the same numbers."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    space = image_space(*shape)
    module, agent = make_agent(script, space)
    twin, args = copy.deepcopy(agent), module.Args()
    kind = module.Adam if hasattr(module, "Adam") else module.RMSprop
    g = torch.Generator().manual_seed(1)
    numbers = torch.randn(4, 16, generator=g)
    own = numbers if algorithm(script) == "ppo" else numbers[:2]
    minibatch = (batch(space, 16), torch.randint(4, (16,), generator=g), *own)
    if algorithm(script) == "trpo":
        minibatch = minibatch[0], numbers[0]
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(module.update, fullgraph=True, backend=backend)
        stats = compiled(
            twin, kind(trained_by_optimizer(script, twin).parameters()), args, torch.tensor(1e-3), *minibatch
        )
    expected = module.update(
        agent, kind(trained_by_optimizer(script, agent).parameters()), args, torch.tensor(1e-3), *minibatch
    )
    torch._dynamo.reset()
    assert len(graphs) == 1
    torch.testing.assert_close(stats, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("script", ["ppo_acpg", "ppo_baseline"])
def test_diagnose_counts_frames_once(script):
    """Frames seen often are one sample, in any order."""
    space = image_space(20, 20, 3)
    module, agent = make_agent(script, space)
    obs = batch(space, 60)
    repeated = torch.cat([obs, obs[:20], obs[:20]])[torch.randperm(100, generator=torch.Generator().manual_seed(2))]
    expected = module.diagnose(agent, obs, 0)
    assert module.diagnose(agent, repeated, 0) == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ppo_acpg"])
def test_memory(script, tmp_path):
    """8 environments x 128 steps of 84 x 84 x 4 bytes within 1.5 GiB, all of the process."""
    kwargs = json.dumps({"size": 84, "channels": 4})
    flags = helpers.flags("Image", tmp_path / "run", "--env-kwargs", kwargs, "--num-envs", 8, "--num-steps", 128)
    command = [sys.executable, str(helpers.ROOT / f"{script}.py"), *flags, "--total-timesteps", "2048"]
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    environment = {**helpers.os.environ, "PYTHONPATH": str(helpers.ROOT / "tests")}
    result = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    kilobytes = int(result.stdout.split()[-1])
    assert resource.RUSAGE_CHILDREN and 200_000 < kilobytes < 1.5 * 2**20


# Structured observations


@every
def test_flattened(script, tmp_path):
    """What gymnasium flattens is flattened as gymnasium does it, and a line says so; the rest is left alone."""
    result = train(script, "MixedObservation", tmp_path / "run", *tiny(script))
    space = probe_envs.MixedObservation.observation_space
    assert "are flattened" in result.stdout and str(gym.spaces.flatdim(space)) in result.stdout
    flat = gym.spaces.flatten(space, probe_envs.MixedObservation().show())
    obs = result.b_obs
    assert obs.shape[1:] == (gym.spaces.flatdim(space),)
    torch.testing.assert_close(obs[0].double(), torch.as_tensor(flat).double())
    assert "are flattened" not in train(script, "ConstantReward", tmp_path / "other", *tiny(script)).stdout


@every
@pytest.mark.parametrize("env_id", ["DictObservation", "MatrixObservation", "ScalarObservation", "Blackjack-v1"])
def test_trains_on_structured_observations(script, env_id, tmp_path):
    """Dictionary, matrix, scalar, tuple."""
    result = train(script, env_id, tmp_path / "run", *tiny(script))
    assert "are flattened" in result.stdout


def test_small_boxes_of_three_dimensions_are_vectors():
    """Below five pixels there is nothing to convolve."""
    import ppo_acpg

    class Small(probe_envs.Probe):
        observation_space = image_space(4, 4, 3)

        def show(self):
            return np.zeros((4, 4, 3), dtype=np.uint8)

    assert ppo_acpg.adapt(Small()).observation_space.shape == (48,)
    for shape in ((5, 5, 3), (10, 10, 10), (5, 5, 30)):
        env = Small()
        env.observation_space = image_space(*shape)
        assert ppo_acpg.adapt(env) is env
    for shape in ((3, 5, 5), (1, 84, 84), (3, 210, 160)):
        env.observation_space = image_space(*shape)
        with pytest.raises(ValueError, match="channels first"):
            ppo_acpg.adapt(env)
