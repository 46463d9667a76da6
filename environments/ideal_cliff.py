"""An environment that is ideal in the sense of Zhou et al. (2025), for --env-id and for studies/emergence.py.

    python ppo_acpg.py --env-id environments.ideal_cliff:IdealCliffWalking-v0 --feature-constraint ball --etf-scale 5

Importing the module registers it with gymnasium.
"""

import gymnasium as gym

STEP, FALL, EXIT = 0.0, -1.0, 1.0  # rewards


class IdealCliffWalking(gym.Env):
    """Four piers in a sea, one for each action: walking outward along the pier leads off it, to the exit.

    A pier is a row of `length` cells pointing up, right, down or left. The outward step from its last cell pays 1 and
    ends the episode; the inward step goes one cell back (from the first cell: stays), or, if `inward` is "falls",
    into the sea; sideways is the sea, which pays -1 and ends it. So the outward action is the only optimal one
    everywhere, each in `length` states. Episodes start in a state drawn uniformly; with --max-episode-steps 1 every
    step does, and the distribution of states is exactly uniform. `lengths` gives the piers different lengths;
    `corners` adds one cell between each two neighbouring piers from which both their outward actions lead to an exit:
    its optimum is tied. Observations are Discrete, actions 0 up, 1 right, 2 down, 3 left. `P` is the transition table
    as gymnasium's toy-text environments have it.
    """

    metadata = {"render_modes": []}

    def __init__(self, length=4, lengths=None, corners=False, inward="back"):
        lengths = tuple(lengths) if lengths else (length,) * 4
        cells = [(pier, k) for pier, n in enumerate(lengths) for k in range(n)]
        index = {cell: i for i, cell in enumerate(cells)}
        self.terminal = len(cells) + (4 if corners else 0)
        self.P = {}
        for (pier, k), i in index.items():
            self.P[i] = {}
            for action in range(4):
                if action == pier:
                    last = k == lengths[pier] - 1
                    step = (self.terminal, EXIT, True) if last else (index[pier, k + 1], STEP, False)
                elif action == (pier + 2) % 4 and inward == "back":
                    step = (index[pier, max(k - 1, 0)], STEP, False)
                else:
                    step = (self.terminal, FALL, True)
                self.P[i][action] = [(1.0, *step)]
        for c in range(self.terminal - len(cells)):
            exits = {c, (c + 1) % 4}
            self.P[len(cells) + c] = {a: [(1.0, self.terminal, EXIT if a in exits else FALL, True)] for a in range(4)}
        self.P[self.terminal] = {a: [(1.0, self.terminal, 0.0, True)] for a in range(4)}
        self.observation_space = gym.spaces.Discrete(self.terminal + 1)
        self.action_space = gym.spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(self.terminal))
        return self.state, {}

    def step(self, action):
        (_, self.state, reward, terminated) = self.P[self.state][int(action)][0]
        return self.state, reward, terminated, False, {}


gym.register("IdealCliffWalking-v0", entry_point=IdealCliffWalking, max_episode_steps=100)
