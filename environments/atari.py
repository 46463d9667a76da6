"""The games of the Arcade Learning Environment, for --env-id; pip install ale-py opencv-python-headless.

    python ppo_acpg.py --env-id environments.atari:Pong-v0 --num-envs 8 --clip-coef 0.1

Importing the module registers every single-player game as <Game>-v0, preprocessed as in CleanRL's ppo_atari.py, in
place of the unprocessed games that ale-py calls so. Observations (84, 84, 4), uint8: four grey frames, the newest last.
docs/environments.md lists the settings, and what rewards and returns mean under them.
"""

import warnings

import gymnasium as gym
import numpy as np

try:
    import ale_py  # it registers its games
    import cv2  # noqa: F401  (for AtariPreprocessing)
    from ale_py.env import AtariEnv
except ImportError as error:
    needs = "ale-py and OpenCV: pip install ale-py opencv-python-headless"
    raise ImportError(f"environments.atari needs {needs} ({error})") from error


class EpisodicLife(gym.Wrapper):
    """A lost life ends the episode; the next one goes on in the same game, unless it is over or a seed is given.

    AtariPreprocessing's terminal_on_life_loss would begin a new game, so that nobody sees what comes later in one.
    """

    def __init__(self, env):
        super().__init__(env)
        self.lives, self.lost = 0, False

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        lives = self.unwrapped.ale.lives()
        self.lost = 0 < lives < self.lives and not terminated and not truncated  # Qbert stays at 0 for some frames
        self.lives = lives
        return observation, reward, terminated or self.lost, truncated, info

    def reset(self, *, seed=None, options=None):
        over = not self.lost or seed is not None
        if not over:
            observation, _, terminated, truncated, info = self.env.step(0)
            over = terminated or truncated
        if over:
            observation, info = self.env.reset(seed=seed, options=options)
        self.lives, self.lost = self.unwrapped.ale.lives(), False
        return observation, info


class FireReset(gym.Wrapper):
    """Episodes begin with actions 1, which is fire, and 2: many games wait for it."""

    def reset(self, *, seed=None, options=None):
        observation, info = self.env.reset(seed=seed, options=options)
        for action in (1, 2):
            observation, _, terminated, truncated, info = self.env.step(action)
            if terminated or truncated:
                observation, info = self.env.reset(options=options)
        return observation, info


class ClipReward(gym.RewardWrapper):
    """Rewards become their signs."""

    def reward(self, reward):
        return float(np.sign(reward))


class ChannelsLast(gym.ObservationWrapper):
    """Stacked frames (C, H, W) as an image (H, W, C)."""

    def __init__(self, env):
        super().__init__(env)
        channels, *size = env.observation_space.shape
        self.observation_space = gym.spaces.Box(0, 255, (*size, channels), dtype=np.uint8)

    def observation(self, observation):
        return np.moveaxis(observation, 0, -1)


def make(game, episodic_life=True, clip_rewards=True, **kwargs):
    """The game with these of AtariEnv's arguments, in the wrappers; info["episode"] has a whole game's score."""
    env = AtariEnv(game, frameskip=1, **kwargs)
    meanings = env.get_action_meanings()
    noop_max = 30 if meanings[0] == "NOOP" else 0  # Backgammon and VideoCheckers cannot wait
    env = gym.wrappers.AtariPreprocessing(env, noop_max=noop_max, frame_skip=4, screen_size=84)
    env.metadata = env.metadata | {"render_fps": 15}  # of 60 frames a second every fourth
    env = gym.wrappers.RecordEpisodeStatistics(env)
    if episodic_life:
        env = EpisodicLife(env)
    if meanings[1] == "FIRE":
        env = FireReset(env)
    if clip_rewards:
        env = ClipReward(env)
    return ChannelsLast(gym.wrappers.FrameStackObservation(env, 4))


ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
SETTINGS = {"repeat_action_probability": 0.0, "full_action_space": False, "max_num_frames_per_episode": 108_000}
for spec in list(gym.registry.values()):
    if spec.namespace == "ALE" and spec.version == 5:
        name = f"{spec.name}-v0"
        gym.registry.pop(name, None)  # ale-py's own, to replace it silently
        gym.register(name, entry_point=make, kwargs={"game": spec.kwargs["game"]} | SETTINGS)
        # gymnasium would say that v0 is out of date, meaning that ale-py registers an unprocessed v4
        warnings.filterwarnings("ignore", f".*environment {name} is out of date", DeprecationWarning)
