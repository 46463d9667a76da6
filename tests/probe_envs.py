"""Tiny environments whose answers are known, for the tests: `--env-id probe_envs:ConstantReward-v0` and so on.

Importing this module registers them. `Clock` and `Silence` also record what was done to them in `CALLS`.
"""

import os
import random
import signal
from collections import namedtuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, Sequence, Text, Tuple

Call = namedtuple("Call", "env kind obs action reward after terminated truncated seed", defaults=(None,) * 6)
CALLS = []  # every reset and step of the recording environments, in order, for as long as nobody clears it


def one_hot(index, size):
    """Vector of `size` zeros with a one at `index`."""
    vector = np.zeros(size, dtype=np.float32)
    vector[index] = 1.0
    return vector


class Probe(gym.Env):
    """An environment of states 0, 1, ...: `begin` is the first, `advance` what an action does, `show` how one looks."""

    observation_space = Box(-1.0, 1.0, (1,), dtype=np.float32)
    action_space = Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode=None):
        self.render_mode, self.state, self.time, self.over = render_mode, 0, 0, True

    def begin(self):
        return 0

    def show(self):
        return np.ones(1, dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.time, self.over = self.begin(), 0, False
        return self.show(), {}

    def step(self, action):
        assert not self.over, "stepped after the episode's end"
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.time += 1
        reward, terminated, truncated = self.advance(int(action))
        self.over = terminated or truncated
        return self.show(), float(reward), terminated, truncated, {}

    def advance(self, action):
        return 1.0, True, False

    def render(self):
        return np.full((64, 64, 3), 40 * (self.time % 6), dtype=np.uint8)


class ConstantReward(Probe):
    """One step, reward 1: the value is 1."""


class ObservationReward(Probe):
    """One step, observation +1 or -1, which is also the reward and the value."""

    def begin(self):
        return 2 * int(self.np_random.integers(2)) - 1

    def show(self):
        return np.array([self.state], dtype=np.float32)

    def advance(self, action):
        return self.state, True, False


class DelayedReward(Probe):
    """Two steps, told apart by the observation, reward 1 at the end: the values are gamma and 1."""

    observation_space = Box(0.0, 1.0, (2,), dtype=np.float32)

    def show(self):
        return one_hot(min(self.time, 1), 2)

    def advance(self, action):
        return float(self.time == 2), self.time == 2, False


class ActionReward(Probe):
    """One step, action 1 pays 1 and action 0 pays -1."""

    def advance(self, action):
        return 2 * action - 1, True, False


class ActionObservationReward(ObservationReward):
    """One step, action 1 is right where the observation is +1 and action 0 where it is -1; right pays 1, wrong -1."""

    def advance(self, action):
        return 1 if action == (self.state > 0) else -1, True, False


class DelayedAction(DelayedReward):
    """Two steps, of which the second pays 1 if the action in the first was 1, else -1."""

    def advance(self, action):
        if self.time == 1:
            self.state = action
            return 0.0, False, False
        return 2 * self.state - 1, True, False


class Stay(Probe):
    """Up to three steps, told apart by the observation: action 0 ends the episode, paying 1, action 1 pays 1/4."""

    observation_space = Box(0.0, 1.0, (3,), dtype=np.float32)

    def show(self):
        return one_hot(min(self.time, 2), 3)

    def advance(self, action):
        return (0.25 if action else 1.0), not action or self.time == 3, False


class Truncated(Probe):
    """Reward 1 at each step, cut off after `length`: the value is 1 / (1 - gamma), since nothing ever ends."""

    def __init__(self, length=3, **kwargs):
        super().__init__(**kwargs)
        self.length = length

    def advance(self, action):
        return 1.0, False, self.time == self.length


class Terminated(Truncated):
    """The same, but over after `length` steps, which the observation counts: the value is the finite sum."""

    observation_space = Box(0.0, 1.0, (4,), dtype=np.float32)

    def show(self):
        return one_hot(min(self.time, 3), 4)

    def advance(self, action):
        return 1.0, self.time == self.length, False


class TruncatedChain(Truncated):
    """State A, paying nothing, then B for ever, paying 1 a step, cut off after `length` steps in all.

    V(B) = 1 / (1 - gamma) and V(A) = gamma V(B), if the cut looks at its own last state (B) and not at the reset (A).
    """

    observation_space = Box(0.0, 1.0, (2,), dtype=np.float32)

    def show(self):
        return one_hot(min(self.time, 1), 2)

    def advance(self, action):
        return float(self.time > 1), False, self.time == self.length


class Endless(Probe):
    """Reward 1 at each step and no end: only --max-episode-steps cuts it off."""

    def advance(self, action):
        return 1.0, False, False


class Bandit(Probe):
    """Contextual bandit: `actions` contexts shown one-hot, each with one action that pays 1; the others pay nothing."""

    start = 0

    def __init__(self, actions=6, **kwargs):
        super().__init__(**kwargs)
        self.observation_space = Box(0.0, 1.0, (actions,), dtype=np.float32)
        self.action_space = Discrete(actions, start=self.start)

    def right(self, context):
        """The paying action: a permutation of the contexts, since the identity might come by itself."""
        return self.start + (5 * context + 2) % int(self.action_space.n)

    def begin(self):
        return int(self.np_random.integers(self.action_space.n))

    def show(self):
        return one_hot(self.state, int(self.action_space.n))

    def advance(self, action):
        return float(action == self.right(self.state)), True, False


class OffsetActions(Bandit):
    """The bandit with actions 5, 6, ...; `step` asserts that it gets one of them."""

    start = 5


class DiscreteObservation(Probe):
    """Observations 2, 3 and 4, worth 0, 1 and 2; one of the three actions is right in each, the others cost 1."""

    observation_space = Discrete(3, start=2)
    action_space = Discrete(3)

    def begin(self):
        return int(self.np_random.integers(3))

    def show(self):
        return 2 + self.state

    def advance(self, action):
        return self.state - float(action != (self.state + 1) % 3), True, False


class Clock(Probe):
    """Observation (time, episode), from which the reward follows; ends at random, by termination or by truncation.

    Each call is recorded, with the observation it was made in.
    """

    observation_space = Box(-np.inf, np.inf, (2,), dtype=np.float32)
    instances = 0

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        Clock.instances += 1
        self.instance, self.episode, self.last = Clock.instances, -1, False

    def begin(self):
        self.episode += 1
        return int(self.np_random.integers(1, 7))  # how long this episode lasts

    def show(self):
        return np.array([self.time, self.episode], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        CALLS.append(Call(self.instance, "reset", obs, seed=seed))
        return obs, info

    def step(self, action):
        before = self.show()
        after, reward, terminated, truncated, info = super().step(action)
        CALLS.append(Call(self.instance, "step", before, int(action), reward, after, terminated, truncated))
        return after, reward, terminated, truncated, info

    def advance(self, action):
        over = self.time == self.state
        truncated = over and self.episode % 2 == 0
        return self.episode % 4 - 1.5 + self.time / 8, over and not truncated, truncated


class Silence(Clock):
    """The observation is always zero, so that untrained logits are zero and the actions are the noise's choice.

    With `draws` it takes random numbers from everybody's generators, as some environments do.
    """

    action_space = Discrete(6)

    def __init__(self, draws=0, **kwargs):
        super().__init__(**kwargs)
        self.draws = draws

    def step(self, action):
        for _ in range(self.draws):
            random.random(), np.random.random(), torch.rand(1)
        return super().step(action)

    def show(self):
        return np.zeros(2, dtype=np.float32)


class NotFinite(Probe):
    """Episodes of 5 steps; every step after the first `after` of an instance has a reward (or observation) of NaN."""

    observation_space = Box(-np.inf, np.inf, (1,), dtype=np.float32)

    def __init__(self, after=40, where="reward", **kwargs):
        super().__init__(**kwargs)
        self.after, self.where, self.steps = after, where, 0

    def show(self):
        broken = self.where == "observation" and self.steps > self.after
        return np.array([np.nan if broken else self.time / 5], dtype=np.float32)

    def advance(self, action):
        self.steps += 1
        broken = self.where == "reward" and self.steps > self.after
        return np.nan if broken else float(action), self.time == 5, False


class Interrupted(Probe):
    """Ctrl-C `times` times in the step number `step` of an instance, or in its first reset: real signals."""

    def __init__(self, step=None, times=1, **kwargs):
        super().__init__(**kwargs)
        self.at, self.times, self.steps = step, times, 0

    def begin(self):
        if self.at is None:
            os.kill(os.getpid(), signal.SIGINT)
        return 0

    def advance(self, action):
        self.steps += 1
        for _ in range(self.times if self.steps == self.at else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return super().advance(action)


class Flux(Exception):
    """What nobody expects, with a message of two lines."""


class Odd(Clock):
    """What users' environments do: infos of all kinds, one array for all observations, rewards that are no floats.

    And what they do wrong: `broken` says what, `where` ("reset", "step", "truncation": the next) and `at` when,
    counted in resets or steps of an instance. CALLS notes it, with the number of steps of that instance.
    """

    numbers = (  # each of which stands for 0.0 or 1.0
        *(float, int, bool, np.float32, np.float64, np.int64, np.bool_, np.array, lambda reward: np.array([reward])),
        *(lambda reward: np.array(reward, dtype=np.float32), lambda reward: np.array([[reward]]), torch.tensor),
    )
    rewards = {
        "float": lambda reward, n: float(reward),
        "mixed": lambda reward, n: Odd.numbers[n % len(Odd.numbers)](reward),
        "None": lambda reward, n: None,
        "shape (2,)": lambda reward, n: np.array([reward, reward]),
        "str": lambda reward, n: "one",
    }
    infos = {
        "": lambda n: {},
        "mixed": lambda n: {
            **{"x": [1.0, None, "a", 7, {}][n % 5], "y": np.zeros(2) if n % 2 else 3},  # types that change
            **{"path": np.zeros(n % 7), "list": [0] * (n % 3), "matrix": np.zeros((n % 4, 2))},  # lengths that do
            **({"a": {"b": {"c": None if n % 2 else n}}} if n % 3 else {"a": n, "d": [{"e": n}]}),  # nested
            **({f"key {n}": n, "now and then": 1} if n % 2 else {}),  # keys that come and go
            **{"final_obs": None, "_final_obs": n, "final_info": {"episode": n}, "episode": n, "_episode": []},
            **{3: n, None: object(), (1, 2): {1, 2}, "dtype": np.array([None, "a"], dtype=object)},  # no names at all
        },
    }

    def __init__(self, infos="", reward="float", shared=False, broken="", where="step", at=1, **kwargs):
        super().__init__(**kwargs)
        self.kinds, self.broken, self.where, self.at = (self.infos[infos], self.rewards[reward]), broken, where, at
        self.shared, self.buffer, self.steps, self.resets = shared, np.zeros(2, dtype=np.float32), 0, 0

    def show(self):
        self.buffer = self.buffer if self.shared else self.buffer.copy()
        self.buffer[:] = self.time / 8, self.episode % 4
        return self.buffer

    def advance(self, action):
        _, terminated, truncated = super().advance(action)
        return action == self.time % 2, terminated, truncated

    def spoilt(self, obs):
        """The observation, spoilt, once it is time."""
        count = self.resets if self.where == "reset" else self.steps
        if not self.broken or count < self.at:
            return obs
        CALLS.append(Call(self.instance, "broken", self.steps))
        self.at = np.inf
        if self.broken == "raise":
            raise Flux("the flux\n   capacitor")
        if self.broken == "KeyError":
            return {}["capacitor"]
        if self.broken == "shape":
            return np.zeros(3, dtype=np.float32)
        return np.array([0.5, float(self.broken)], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed, options=options)
        self.resets += 1
        return self.spoilt(obs) if self.where == "reset" else obs, self.kinds[0](self.resets + self.instance)

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        self.steps += 1
        if self.where == "step" or (self.where == "truncation" and truncated):
            obs = self.spoilt(obs)
        return (
            obs,
            self.kinds[1](reward, self.steps + self.instance),
            terminated,
            truncated,
            self.kinds[0](self.steps + self.instance),
        )


class MultiDiscreteAction(Probe):
    """Two actions at once."""

    action_space = MultiDiscrete([2, 3])


class BoxAction(Probe):
    """Continuous actions."""

    action_space = Box(-1.0, 1.0, (1,), dtype=np.float32)


class DictObservation(Probe):
    """Observations that are a dictionary."""

    observation_space = Dict({"position": Box(-1.0, 1.0, (1,), dtype=np.float32)})

    def show(self):
        return {"position": np.ones(1, dtype=np.float32)}


class MatrixObservation(Probe):
    """Observations that are a matrix."""

    observation_space = Box(-1.0, 1.0, (2, 3), dtype=np.float32)

    def show(self):
        return np.ones((2, 3), dtype=np.float32)


class ScalarObservation(Probe):
    """Observations that are one number, in a box without a dimension."""

    observation_space = Box(-1.0, 1.0, (), dtype=np.float32)

    def show(self):
        return np.float32(1.0)


class MixedObservation(Probe):
    """Dictionary, tuple and the other kinds of spaces that gymnasium flattens."""

    observation_space = Dict(
        {
            "state": Discrete(3, start=1),
            "rest": Tuple((MultiDiscrete([2, 3]), MultiBinary(2), Box(-1.0, 1.0, (2, 2), dtype=np.float64))),
        }
    )

    def show(self):
        rest = (np.array([1, 2]), np.array([0, 1], dtype=np.int8), np.full((2, 2), 0.5))
        return {"state": 1 + self.state % 3, "rest": rest}


class TextObservation(Probe):
    """Observations that are words."""

    observation_space = Text(8)

    def show(self):
        return "word"


class DictTextObservation(Probe):
    """Words beside numbers."""

    observation_space = Dict({"mission": Text(8), "position": Box(-1.0, 1.0, (1,), dtype=np.float32)})

    def show(self):
        return {"mission": "word", "position": np.ones(1, dtype=np.float32)}


class GraphObservation(Probe):
    """Observations that are a graph."""

    observation_space = Graph(Box(-1.0, 1.0, (1,)), None)


class SequenceObservation(Probe):
    """Observations of any length."""

    observation_space = Sequence(Box(-1.0, 1.0, (1,)))


class ChannelsFirst(Probe):
    """An image of three channels, (C, H, W)."""

    observation_space = Box(0, 255, (3, 24, 32), dtype=np.uint8)

    def show(self):
        return np.zeros((3, 24, 32), dtype=np.uint8)


class Image(Probe):
    """An image (size, size, channels) between `low` and `high` in which a column of pixels shows which action is right.

    One action of three is, and pays 1. The second channel is noise, of which no network should make anything.
    """

    action_space = Discrete(3)

    def __init__(self, size=10, dtype="uint8", low=0, high=255, channels=2, **kwargs):
        super().__init__(**kwargs)
        self.observation_space = Box(low, high, (size, size, channels), dtype=np.dtype(dtype).type)
        self.range = low, high

    def begin(self):
        return int(self.np_random.integers(3))

    def show(self):
        low, high = self.range
        image = np.full(self.observation_space.shape, low, dtype=self.observation_space.dtype)
        image[:, self.state, 0] = high
        image[..., 1] = np.where(self.np_random.random(image.shape[:2]) < 0.5, low, high)
        return image

    def advance(self, action):
        return float(action == self.state), True, False


class Plain(Probe):
    """An environment that knows nothing of render modes."""

    def __init__(self):
        super().__init__()


def subclasses(kind):
    """All classes below `kind`."""
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


for probe in subclasses(Probe):
    gym.register(f"{probe.__name__}-v0", entry_point=probe)
gym.register("probes/ConstantReward-v0", entry_point=ConstantReward)
