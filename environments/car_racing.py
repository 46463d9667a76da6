"""gymnasium's CarRacing with its five discrete actions, grey and stacked, for --env-id.

    python ppo_acpg.py --env-id environments.car_racing:CarRacing-v0

Importing the module registers CarRacing-v0: observations (96, 96, 4), uint8, the last four frames in grey, the newest
last. No frames are skipped, none cropped, so that steps and returns are those of CarRacing-v3, slow as it is.
"""

import warnings

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator

SPEC = gym.spec("CarRacing-v3")


class ChannelsLast(gym.ObservationWrapper):
    """Stacked frames (C, H, W) as an image (H, W, C)."""

    def __init__(self, env):
        super().__init__(env)
        low, high = (np.moveaxis(bound, 0, -1) for bound in (env.observation_space.low, env.observation_space.high))
        self.observation_space = gym.spaces.Box(low, high, dtype=env.observation_space.dtype)

    def observation(self, observation):
        return np.moveaxis(observation, 0, -1)


def make(**kwargs):
    """The environment with these of CarRacing-v3's arguments, in the wrappers."""
    env = load_env_creator(SPEC.entry_point)(**kwargs)
    return ChannelsLast(gym.wrappers.FrameStackObservation(gym.wrappers.GrayscaleObservation(env), 4))


limits = {"max_episode_steps": SPEC.max_episode_steps, "reward_threshold": SPEC.reward_threshold}
gym.register("CarRacing-v0", entry_point=make, kwargs={"continuous": False}, **limits)
# gymnasium would say that v0 is out of date, meaning its own CarRacing
warnings.filterwarnings("ignore", ".*environment CarRacing-v0 is out of date", DeprecationWarning)
