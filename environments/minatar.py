"""The five games of MinAtar (Young and Tian 2019, arXiv 1903.03176), for --env-id; pip install minatar.

    python ppo_acpg.py --env-id environments.minatar:MinAtar-Breakout-v0 --num-envs 16

Importing the module registers MinAtar-Asterix-v0, -Breakout-v0, -Freeway-v0, -Seaquest-v0 and -SpaceInvaders-v0.
"""

import gymnasium as gym
import numpy as np

try:
    from minatar import Environment
except ImportError as error:
    raise ImportError(f"environments.minatar needs MinAtar: pip install minatar ({error})") from error

COLOURS = "808080 4060ff ff4040 ffd030 40c060 ff80ff 40d0d0 ff9030 a0a0ff ffffff"  # of the channels, from the back
PALETTE = np.array([tuple(bytes.fromhex(colour)) for colour in ["000000", *COLOURS.split()]], dtype=np.uint8)


class MinAtar(gym.Env):
    """A game of MinAtar. Observations (10, 10, channels), bool, as the game gives them; one channel an object.

    Actions are the minimal set, in MinAtar's order of none, left, up, right, down, fire: what MinAtar's own wrapper
    calls v1, its v0 being all six actions in all games. `sticky_action_prob`: with this probability the last action is
    taken once more instead of the one asked for. `difficulty_ramping`: Asterix, Seaquest and SpaceInvaders get faster
    within an episode. Defaults are the paper's. The same seed gives the same episodes whatever was played before.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, game, sticky_action_prob=0.1, difficulty_ramping=True, render_mode=None):
        self.game = Environment(game, sticky_action_prob, difficulty_ramping)
        self.actions = self.game.minimal_action_set()
        self.observation_space = gym.spaces.Box(0, 1, tuple(self.game.state_shape()), dtype=np.bool_)
        self.action_space = gym.spaces.Discrete(len(self.actions))
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:  # the game has a generator of its own, with seeds below 2**32
            self.game.seed(int(self.np_random.integers(2**32)))
        self.game.reset()
        self.game.last_action = 0  # MinAtar leaves the last episode's, which the first step might repeat
        return self.game.state(), {}

    def step(self, action):
        reward, terminated = self.game.act(self.actions[action])
        return self.game.state(), float(reward), bool(terminated), False, {}

    def render(self):
        """The screen, (160, 160, 3): each cell in the colour of its last channel that is on."""
        state = self.game.state()
        index = (state * np.arange(1, state.shape[2] + 1)).max(2)
        return PALETTE[index].repeat(16, axis=0).repeat(16, axis=1)


# Freeway calls its limit of 2,500 frames an end, one step later; as no observation shows the time, it is a truncation
# here. The other games end by mistakes alone: only play that makes none gets to 10,000.
LIMITS = {"asterix": 10_000, "breakout": 10_000, "freeway": 2_500, "seaquest": 10_000, "space_invaders": 10_000}
for game, limit in LIMITS.items():
    name = f"MinAtar-{game.title().replace('_', '')}-v0"
    gym.register(name, entry_point=MinAtar, kwargs={"game": game}, max_episode_steps=limit)
