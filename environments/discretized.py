"""Continuous tasks with their actions on a grid (Tang and Agrawal 2020, arXiv 1901.10500), for --env-id.

    python ppo_acpg.py --env-id environments.discretized:Pendulum51-v0

Importing the module registers Pendulum11-v0 and Pendulum51-v0, torques evenly spaced from -2 to 2, and
LunarLander25-v0, five settings of the main engine by five of the side engines, both from -1 to 1. Of the latter -1, -.5
and 0 leave the main engine off, and -.5, 0 and .5 the side engines: the 25 actions have nine different effects.
"""

import math
from functools import partial

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator


class Discretized(gym.ActionWrapper):
    """Discrete actions for a bounded Box: the points of a grid, evenly spaced from low to high, both included.

    `bins` is how many in each dimension, one number for all or one for each; the last dimension varies fastest.
    `table` (actions, *shape of the Box) has the values. Raises ValueError for a Box without bounds, or bins below two.
    """

    def __init__(self, env, bins):
        super().__init__(env)
        box = env.action_space
        if not isinstance(box, gym.spaces.Box) or not box.is_bounded():
            raise ValueError(f"Discretized needs a bounded Box of actions, not {box}")
        bins = (bins,) * math.prod(box.shape) if isinstance(bins, int) else tuple(bins)
        if len(bins) != math.prod(box.shape) or min(bins) < 2:
            raise ValueError(f"bins must be two or more for each of the dimensions of {box}, not {bins}")
        lines = [np.linspace(*ends) for ends in zip(box.low.flat, box.high.flat, bins, strict=True)]
        grid = np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1)
        self.table = grid.reshape(-1, *box.shape).astype(box.dtype)
        self.action_space = gym.spaces.Discrete(len(self.table))

    def action(self, action):
        return self.table[action].copy()


def make(entry_point, bins, **kwargs):
    """The continuous environment that `entry_point` makes, in the wrapper."""
    return Discretized(load_env_creator(entry_point)(**kwargs), bins)


for name, continuous, bins in (
    ("Pendulum11-v0", "Pendulum-v1", 11),
    ("Pendulum51-v0", "Pendulum-v1", 51),
    ("LunarLander25-v0", "LunarLanderContinuous-v3", 5),
):
    spec = gym.spec(continuous)
    limits = {"max_episode_steps": spec.max_episode_steps, "reward_threshold": spec.reward_threshold}
    gym.register(name, entry_point=partial(make, spec.entry_point, bins), kwargs=spec.kwargs, **limits)
