"""The scripts take nearly every environment with Discrete actions that the popular packages register."""

import contextlib
import importlib
import io
import re
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import ACPG, algorithm, trained_by_optimizer

PACKAGES = ("popgym", "ale_py", "environments.minatar", "environments.minigrid")


def discrete_ids():
    """(id, environment) of every id with Discrete actions of gymnasium and PACKAGES, of ALE's one a kind of
    observation, through environments/ where a module exists. What needs a package that is not installed is left out."""
    for package in ("minatar", "minigrid", "cv2", *PACKAGES):
        pytest.importorskip(package)
    from environments import atari

    kinds = {}
    for name, spec in list(gym.registry.items()):
        entry = getattr(spec.entry_point, "func", spec.entry_point)
        module = entry if isinstance(entry, str) else entry.__module__
        if re.split(r"[.:]", module)[0] not in ("gymnasium", "popgym", "ale_py", "minigrid", "environments"):
            continue  # registered by other tests
        kind = spec.kwargs.get("obs_type", "rgb") if spec.entry_point == "ale_py.env:AtariEnv" else name
        kinds.setdefault("atari" if spec.entry_point is atari.make else kind, name)
    for name in kinds.values():
        try:
            env = gym.make(name, disable_env_checker=True)
        except (gym.error.DependencyNotInstalled, ImportError):
            continue
        if isinstance(env.action_space, gym.spaces.Discrete):
            yield name, env
        else:
            env.close()


def use(module, env):
    """Build an agent for `env`, act with it for a step, compute the script's loss and its gradient."""
    args = module.Args()
    env = module.adapt(env)
    agent = module.Agent(env.observation_space, env.action_space, args)
    obs, _ = env.reset(seed=1)
    batch = torch.as_tensor(np.stack([obs, obs]))
    with torch.no_grad():
        action = int(agent.logits(batch)[0].argmax())
    after, reward, *_ = env.step(action + env.action_space.start)
    float(reward)
    batch[1] = torch.as_tensor(np.asarray(after))
    name, actions, numbers = algorithm(module.__name__), torch.tensor([action, 0]), torch.tensor([[0.5, -0.5]] * 4)
    if name == "trpo":
        stats = module.update_policy(
            agent, args, batch, actions, agent.logits(batch).log_softmax(-1).detach(), numbers[0]
        )
        assert all(value.isfinite() for value in stats.values())
        value, _ = module.trpo_loss(agent, args, batch, numbers[0])
    else:
        own = numbers[: {"ppo": 4, "a2c": 2, "reinforce": 1}[name]]
        value, _ = getattr(module, f"{name}_loss")(agent, args, batch, actions, *own)
    value.backward()
    trained = trained_by_optimizer(module.__name__, agent).parameters()
    assert value.isfinite() and all(param.grad is not None for param in trained)
    assert env.observation_space.dtype == np.float64 or batch.numpy().dtype == env.observation_space.dtype


def test_at_least_95_of_100_registered_ids():
    """Each script's Agent builds, acts and computes a loss; the rest is refused in a line."""
    modules, taken, refused = [importlib.import_module(script) for script in ACPG], 0, {}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for number, (name, env) in enumerate(discrete_ids()):
            try:
                use(modules[number % len(modules)], env)  # in turn: what they do with an observation is one function
                taken += 1
            except (ValueError, FileNotFoundError) as error:  # minigrid's wheel lacks the pictures of MiniGrid-WFC-*
                assert len(str(error).splitlines()) == 1, (name, error)
                refused[name] = str(error)
            env.close()
    print(f"{taken} taken; refused: {refused}")
    assert taken > 200
    assert taken >= 0.95 * (taken + len(refused)), refused
    own = {name for name in refused if not name.startswith("MiniGrid-WFC-")}
    assert own == {"popgym-ConcentrationMedium-v0"}, refused  # 104 actions, more than --feature-dim 64 takes
