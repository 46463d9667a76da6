"""MiniGrid and BabyAI (Chevalier-Boisvert et al. 2023) without text, for --env-id; pip install minigrid.

    python ppo_acpg.py --env-id environments.minigrid:MiniGrid-Empty-5x5-v0

Importing the module replaces what the package registers as MiniGrid-* and BabyAI-* by the same environments with
observations that are one image. Where nobody imports it those ids are the package's own.
"""

from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator

try:
    import minigrid  # noqa: F401  (it registers its environments)
    from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX
except ImportError as error:
    raise ImportError(f"environments.minigrid needs minigrid: pip install minigrid ({error})") from error


class ImageAndDirection(gym.ObservationWrapper):
    """Observations (7, 7, 7), uint8: object, colour and state of the cells in view, then the direction, one-hot.

    The direction, 0 to 3, takes four planes, each all 0 or all 1: an image for convolutions, to which a number would
    say that 3 and 0 are far apart. Bounds are those of the package's constants, 10, 5, 2, not the 255 of its own space,
    by which the values would be scaled to nearly nothing. The mission is left out: where it varies from episode to
    episode (most of BabyAI, MiniGrid's Fetch, GoToDoor, GoToObject, PutNear) the agent isn't told what to do.
    """

    def __init__(self, env):
        super().__init__(env)
        highest = [max(index.values()) for index in (OBJECT_TO_IDX, COLOR_TO_IDX, STATE_TO_IDX)]
        high = np.broadcast_to([*highest, 1, 1, 1, 1], (*env.observation_space["image"].shape[:2], 7))
        self.observation_space = gym.spaces.Box(0, high.astype(np.uint8), dtype=np.uint8)

    def reset(self, *, seed=None, options=None):
        with redirect_stdout(None):  # BabyAI prints a line for each level that it draws and rejects
            return super().reset(seed=seed, options=options)

    def observation(self, observation):
        image = np.zeros(self.observation_space.shape, dtype=np.uint8)
        image[..., :3] = observation["image"]
        image[..., 3 + observation["direction"]] = 1
        return image


def make(entry_point, **kwargs):
    """The package's environment that `entry_point` makes, in the wrapper."""
    return ImageAndDirection(load_env_creator(entry_point)(**kwargs))


for spec in list(gym.registry.values()):
    if str(spec.entry_point).startswith("minigrid."):
        gym.registry[spec.id] = replace(spec, entry_point=partial(make, spec.entry_point))
