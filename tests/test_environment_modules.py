"""environments/: what each module registers is what docs/environments.md says, and plays the same from the same seed.

Tests of packages that requirements.txt does not install are skipped without them; .ci/run installs them.
"""

import importlib
import random
import re
import subprocess
import sys

import gymnasium as gym
import numpy as np
import probe_envs
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.utils.env_checker import check_env
from helpers import ROOT, read_record, run_script, tiny, train

from environments.discretized import Discretized

NEEDS = {"minatar": ("minatar",), "minigrid": ("minigrid",), "atari": ("ale_py", "cv2")}
CHANNELS = {"Asterix": 4, "Breakout": 4, "Freeway": 7, "Seaquest": 10, "SpaceInvaders": 6}
ACTIONS = {"Asterix": 5, "Breakout": 3, "Freeway": 3, "Seaquest": 6, "SpaceInvaders": 4}
# what the page says of each: K, shape and dtype of the observations, steps until an episode is cut off
IDS = {
    **{
        f"minatar:MinAtar-{k}-v0": (ACTIONS[k], (10, 10, CHANNELS[k]), "bool", 2_500 if k == "Freeway" else 10_000)
        for k in CHANNELS
    },
    "minigrid:MiniGrid-DoorKey-5x5-v0": (7, (7, 7, 7), "uint8", None),
    "minigrid:BabyAI-GoToObj-v0": (7, (7, 7, 7), "uint8", None),
    "atari:Pong-v0": (6, (84, 84, 4), "uint8", None),
    "atari:Breakout-v0": (4, (84, 84, 4), "uint8", None),
    "discretized:Pendulum11-v0": (11, (3,), "float32", 200),
    "discretized:Pendulum51-v0": (51, (3,), "float32", 200),
    "discretized:LunarLander25-v0": (25, (8,), "float32", 1000),
    "car_racing:CarRacing-v0": (5, (96, 96, 4), "uint8", 1000),
}
SLOW = {"car_racing:CarRacing-v0": 4, "atari:Pong-v0": 40, "atari:Breakout-v0": 80}  # steps that tests can afford
each = pytest.mark.parametrize("env_id", IDS)


def make(env_id, **kwargs):
    """gym.make("environments.<env_id>"); skips the test where its package is missing."""
    for package in NEEDS.get(env_id.partition(":")[0], ()):
        pytest.importorskip(package, reason="pip install -r requirements-environments.txt")
    return gym.make(f"environments.{env_id}", **kwargs)


def play(env, steps, seed=None, plan=0):
    """What resetting and `steps` random steps, the same for each `plan`, give; new episodes begin without a seed."""
    choose = np.random.default_rng(plan)
    seen = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        obs, *outcome, _ = env.step(int(choose.integers(env.action_space.n)))
        seen += [obs, outcome]
        if outcome[1] or outcome[2]:
            seen.append(env.reset()[0])
    return seen


def equal(one, other):
    """Whether two plays are the same."""
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# All modules


@each
def test_spaces(env_id):
    """Actions, shapes, dtypes and limits are the page's, and every observation lies in its space; gymnasium agrees."""
    actions, shape, dtype, limit = IDS[env_id]
    env = make(env_id)
    space = env.observation_space
    assert env.action_space == Discrete(actions)
    assert (space.shape, space.dtype, env.spec.max_episode_steps) == (shape, dtype, limit)
    observations = [seen for seen in play(env, SLOW.get(env_id, 300), seed=0) if not isinstance(seen, list)]
    assert all(space.contains(obs) for obs in observations)
    if space.dtype != np.float32:
        assert any(not np.array_equal(obs, observations[0]) for obs in observations), "nothing moves"
    if env_id not in SLOW:
        check_env(env, skip_render_check=True)


@each
def test_seeds(env_id):
    """A seed gives the same episodes, whatever was played before; other seeds do not; global generators don't count."""
    steps = SLOW.get(env_id, 200)
    random.seed(0)
    np.random.seed(0)
    generators = random.getstate(), np.random.get_state()[1].tolist()
    used = make(env_id)
    first = play(used, steps, seed=5)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == generators
    random.seed(1)
    np.random.seed(1)
    play(used, 3, plan=1)
    assert equal(play(used, steps, seed=5), first)
    fresh = make(env_id)
    assert equal(play(fresh, steps, seed=5), first)
    others = (play(fresh, steps, seed=seed) for seed in range(6, 11))  # Atari's Breakout begins in few ways
    assert not all(equal(other, first) for other in others)
    if steps > 4:
        play(fresh, steps, seed=5)
        assert equal(play(fresh, steps), play(used, steps)), "the generator does not go on"


@each
def test_limits_and_pictures(env_id):
    """--max-episode-steps truncates, and videos have frames."""
    env = make(env_id, max_episode_steps=3, render_mode="rgb_array")
    env.reset(seed=0)
    frames = [env.render()]
    for _ in range(3):
        *_, terminated, truncated, _ = env.step(1)
        frames.append(env.render())
    assert (terminated, truncated) == (False, True)
    height, width, colours = frames[0].shape
    assert min(height, width) >= 64 and colours == 3 and frames[0].dtype == np.uint8
    assert any(not np.array_equal(frame, frames[0]) for frame in frames), "a still"


@pytest.mark.parametrize(("module", "package"), [(k, package) for k in NEEDS for package in NEEDS[k]])
def test_missing_package(module, package, tmp_path, monkeypatch):
    """One line that says what to install, from the import and from a script."""
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"environments.{module}", raising=False)
    pip = {"minatar": "minatar", "minigrid": "minigrid", "atari": "ale-py opencv-python-headless"}[module]
    with pytest.raises(ImportError, match=f"environments.{module} needs .*: pip install {pip} "):
        importlib.import_module(f"environments.{module}")
    result = run_script("ppo_acpg", f"environments.{module}:Any-v0", tmp_path / "run")
    assert result.status == 1 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ") and f"pip install {pip}" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("env_id", ("atari:Pong-v0", "car_racing:CarRacing-v0"))
def test_nothing_is_printed(env_id):
    """No banner, and no advice to take ale-py's or gymnasium's newer version of the name instead."""
    make(env_id).close()
    code = f"import gymnasium; gymnasium.make('environments.{env_id}')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


TRAINED = (
    ("environments.minatar:MinAtar-Seaquest-v0", "ppo_acpg"),
    ("environments.minigrid:MiniGrid-DoorKey-5x5-v0", "a2c_acpg"),
    ("environments.atari:Pong-v0", "ppo_baseline"),
    ("popgym:popgym-RepeatFirstEasy-v0", "reinforce_acpg"),
    ("environments.discretized:LunarLander25-v0", "reinforce_baseline"),
    ("environments.car_racing:CarRacing-v0", "a2c_baseline"),
)


@pytest.mark.parametrize(("env_id", "script"), TRAINED, ids=lambda value: value.partition(":")[0])
def test_training(env_id, script, tmp_path, monkeypatch):
    """A script trains on one of each kind, and what it saves is an agent for it."""
    module = env_id.partition(":")[0].removeprefix("environments.")
    for package in NEEDS.get(module, (module,) if module == "popgym" else ()):
        pytest.importorskip(package, reason="pip install -r requirements-environments.txt")
    run = train(
        script, env_id, tmp_path, *tiny(script), "--total-timesteps", 1024, "--max-episode-steps", 16, "--save-model"
    )
    assert run.status in (0, None) and read_record(tmp_path)["status"] == "finished"
    state = torch.load(tmp_path / "model.pt", weights_only=True)["agent"]
    assert all(tensor.isfinite().all() for tensor in state.values())


# MinAtar


def paddle(obs):
    """Where Breakout's paddle is."""
    return int(obs[9, :, 0].argmax())


@pytest.mark.parametrize("probability", (0.0, 0.1, 0.5))
def test_sticky_actions(probability):
    """In Breakout the paddle goes on as it went, against what is asked for, as often as the probability says."""
    kwargs = {} if probability == 0.1 else {"sticky_action_prob": probability}
    env = make("minatar:MinAtar-Breakout-v0", **kwargs)
    before, last, stuck = paddle(env.reset(seed=0)[0]), 0, []
    for _ in range(4000):
        obs, _, terminated, _, _ = env.step(1 if last > 0 else 2)  # left if it went right, and the other way round
        moved = paddle(obs) - before
        if last and 0 < before < 9:
            stuck.append(moved == last)
        before, last = paddle(obs), moved or last
        if terminated:
            before, last = paddle(env.reset()[0]), 0
    assert len(stuck) > 2000 and abs(np.mean(stuck) - probability) <= 4 * (probability / len(stuck)) ** 0.5


def test_no_action_sticks_into_the_next_episode():
    """The first step after a reset can repeat nothing, whatever the last episode's last action was."""
    env = make("minatar:MinAtar-Breakout-v0", sticky_action_prob=0.9)
    for seed in range(30):
        start = paddle(env.reset(seed=seed)[0])
        assert paddle(env.step(1)[0]) in (start, start - 1)  # left or, stuck, nothing
        for _ in range(20):
            env.step(2)  # right, until it sticks


@pytest.mark.parametrize("kwargs", ({}, {"difficulty_ramping": False}))
def test_difficulty_ramping(kwargs):
    """Asterix gets faster within an episode unless it is told not to."""
    env = make("minatar:MinAtar-Asterix-v0", **kwargs)
    env.reset(seed=0)
    highest = 0
    for _ in range(3000):
        terminated = env.step(0)[2]
        highest = max(highest, env.unwrapped.game.env.difficulty_ramp())
        if terminated:
            env.reset()
    assert bool(highest) is not bool(kwargs)


def test_freeway_is_truncated():
    """After 2,500 steps, by truncation, where MinAtar says termination."""
    env = make("minatar:MinAtar-Freeway-v0")
    env.reset(seed=0)
    ends = [env.step(0)[2:4] for _ in range(2500)]
    assert ends == [(False, False)] * 2499 + [(False, True)]


# MiniGrid


def test_minigrid_observations():
    """The package's image, the direction as planes, and bounds that are reached, but the agent's 10: it isn't seen."""
    highest = np.zeros(7, dtype=int)
    for name in ("MiniGrid-DoorKey-5x5-v0", "MiniGrid-LavaCrossingS9N1-v0", "BabyAI-GoToObj-v0"):
        env = make(f"minigrid:{name}")
        choose = np.random.default_rng(0)
        obs, _ = env.reset(seed=0)
        for _ in range(300):
            image, direction = (env.unwrapped.gen_obs()[key] for key in ("image", "direction"))
            assert np.array_equal(obs[..., :3], image)
            assert np.array_equal(obs[..., 3:], np.broadcast_to(np.eye(4)[direction], (7, 7, 4)))
            highest = np.maximum(highest, obs.max((0, 1)))
            obs, _, terminated, truncated, _ = env.step(int(choose.integers(4)))
            obs = env.reset()[0] if terminated or truncated else obs
    assert env.observation_space.high[0, 0].tolist() == [10, 5, 2, 1, 1, 1, 1]
    assert highest.tolist() == [9, 5, 2, 1, 1, 1, 1]


def test_every_minigrid_id_is_replaced():
    """All of the package's, with what they had been registered with."""
    make("minigrid:MiniGrid-Empty-5x5-v0")
    names = [name for name in gym.registry if name.startswith(("MiniGrid-", "BabyAI-"))]
    assert len(names) > 150 and sum(name.startswith("BabyAI-") for name in names) > 90
    assert all(gym.spec(name).entry_point.func.__module__ == "environments.minigrid" for name in names)
    assert gym.make("MiniGrid-LavaCrossingS9N1-v0").unwrapped.width == 9
    assert gym.make("MiniGrid-Empty-5x5-v0", size=6).unwrapped.width == 6


@pytest.mark.parametrize("package_first", (True, False))
def test_both_import_orders(package_first):
    """The package's own until our module is imported, whichever was first; then ours."""
    make("minigrid:MiniGrid-Empty-5x5-v0")
    lines = ["import gymnasium as gym", "space = lambda name: type(gym.make(name).observation_space).__name__"]
    plain, ours = "MiniGrid-Empty-5x5-v0", "environments.minigrid:MiniGrid-Empty-5x5-v0"
    if package_first:
        lines += ["import minigrid", f"print(space('{plain}'))"]
    lines += [f"print(space('{ours}'))", "import minigrid", f"print(space('{plain}'), space('{ours}'))"]
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.split() == ["Dict"] * package_first + ["Box"] * 3, result.stderr
    assert result.stderr == ""


def test_babyai_prints_nothing(capsys):
    """The package prints a line for each level that it rejects, among them this one's first."""
    make("minigrid:BabyAI-Synth-v0").reset(seed=7)
    assert capsys.readouterr().out == ""


# ALE


def test_every_ale_game():
    """Each that ale-py registers as ALE/<Game>-v5, also those without a no-op."""
    make("atari:Pong-v0")
    games = [name for name in gym.registry if re.fullmatch(r"ALE/\w+-v5", name)]
    assert len(games) > 100
    for game in games:
        spec = gym.spec(f"{game[4:-3]}-v0")
        assert spec.entry_point.__module__ == "environments.atari"
        assert spec.kwargs["game"] == gym.spec(game).kwargs["game"]
    env = make("atari:Backgammon-v0")
    assert env.observation_space.contains(env.reset(seed=0)[0])


def test_frames_are_stacked():
    """Each observation has the last three frames of the one before, and the newest at the end."""
    env = make("atari:Pong-v0")
    before, _ = env.reset(seed=0)
    for _ in range(40):
        after = env.step(2)[0]
        assert np.array_equal(after[..., :3], before[..., 1:])
        before = after
    assert not np.array_equal(before[..., 3], before[..., 2])


def test_lives_and_scores():
    """An episode is a life, rewards are signs, and a game's score comes at its end; each can be turned off."""
    env = make("atari:Breakout-v0")
    obs, _ = env.reset(seed=0)
    game, lives = env.unwrapped, []
    for _ in range(5):
        terminated, total = False, 0.0
        while not terminated:
            _, reward, terminated, _, info = env.step(0)
            total += reward
        lives.append(game.ale.lives())
        assert ("episode" in info) == (lives[-1] == 0)
        env.reset()
    assert lives == [4, 3, 2, 1, 0] and game.ale.lives() == 5
    while not env.step(0)[2]:
        pass
    assert game.ale.lives() == 4
    assert np.array_equal(env.reset(seed=0)[0], obs) and game.ale.lives() == 5, "a seed begins a new game"


def test_rewards_are_signs():
    """SpaceInvaders pays 5 or more for each alien; without clipping returns are the score of the whole game."""
    clipped, scores = (
        make("atari:SpaceInvaders-v0", episodic_life=False, clip_rewards=clip_rewards) for clip_rewards in (True, False)
    )
    outcomes = {}
    for env in (clipped, scores):
        choose = np.random.default_rng(0)
        env.reset(seed=0)
        rewards, terminated = [], False
        while not terminated:
            _, reward, terminated, _, info = env.step(int(choose.integers(env.action_space.n)))
            rewards.append(reward)
        assert env.unwrapped.ale.lives() == 0
        outcomes[env] = np.array(rewards), info["episode"]["r"]
    assert set(outcomes[clipped][0]) == {0, 1}
    assert np.array_equal(np.sign(outcomes[scores][0]), outcomes[clipped][0])
    assert outcomes[scores][0].max() >= 5
    assert outcomes[scores][0].sum() == outcomes[scores][1] == outcomes[clipped][1]


# Discretized


def with_actions(space):
    """An environment with these actions."""
    env = probe_envs.Probe()
    env.action_space = space
    return env


def test_grid():
    """A hand-worked grid, ends included, of the last dimension varying fastest."""
    env = Discretized(with_actions(Box(np.float32([[-1, 0]]), np.float32([[1, 30]]))), (3, 2))
    assert env.action_space == Discrete(6)
    assert [env.action(k).tolist() for k in range(6)] == [[[a, b]] for a in (-1, 0, 1) for b in (0, 30)]
    assert all(env.env.action_space.contains(env.action(k)) for k in range(6))
    env = Discretized(with_actions(Box(-2, 2, (1,))), 5)
    assert [env.action(np.int64(k)).tolist() for k in range(5)] == [[-2], [-1], [0], [1], [2]]


@pytest.mark.parametrize(
    ("space", "bins"),
    ((Discrete(3), 5), (Box(-np.inf, 1, (2,)), 5), (Box(-1, 1, (2,)), 1), (Box(-1, 1, (2,)), (5, 5, 5))),
)
def test_what_has_no_grid(space, bins):
    """Other spaces, missing bounds, and numbers of bins that make none."""
    with pytest.raises(ValueError, match=re.escape(str(space))):
        Discretized(with_actions(space), bins)


@pytest.mark.parametrize(
    ("name", "continuous", "kwargs", "values"),
    (
        ("Pendulum51-v0", "Pendulum-v1", {}, {k: [-2 + 4 * k / 50] for k in range(51)}),
        (
            "LunarLander25-v0",
            "LunarLanderContinuous-v3",
            {"wind_power": 5.0, "enable_wind": True},
            {5 * i + j: [-1 + i / 2, -1 + j / 2] for i in range(5) for j in range(5)},
        ),
    ),
)
def test_discretized_steps(name, continuous, kwargs, values):
    """Each action does what the continuous task does at its values."""
    env, reference = make(f"discretized:{name}", **kwargs), gym.make(continuous, **kwargs)
    assert np.array_equal(env.reset(seed=3)[0], reference.reset(seed=3)[0])
    for action, value in values.items():
        one, other = env.step(action), reference.step(np.array(value, dtype=np.float32))
        assert np.allclose(one[0], other[0], atol=1e-6) and np.isclose(one[1], other[1])
        assert one[2:4] == other[2:4] == (False, False)
    assert env.spec.reward_threshold == reference.spec.reward_threshold


# The page


class Pairs(probe_envs.Probe):
    """Pays for a pair of actions its first number and a hundredth of its second."""

    action_space = MultiDiscrete([2, 3], start=[0, 5])

    def step(self, action):
        assert self.action_space.contains(action)
        return self.show(), float(action[0] + action[1] / 100), True, False, {}


gym.register("Pairs-v0", entry_point=Pairs)


def blocks():
    """The modules that docs/environments.md shows, by name."""
    text = (ROOT / "docs" / "environments.md").read_text()
    return dict(zip(("my_tasks", "one_number"), re.findall(r"```python\n(.*?)```", text, re.DOTALL), strict=True))


@pytest.fixture
def documented(tmp_path, monkeypatch):
    """The page's modules, in a folder that Python imports from."""
    for name, code in blocks().items():
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)


def test_documented_wrapped_task(documented):
    """An action lasts for two steps, or as many as one says, and --max-episode-steps holds in both directions."""
    reference, env = gym.make("CartPole-v1"), gym.make("my_tasks:SlowCartPole-v0")
    check_env(env, skip_render_check=True)
    reference.reset(seed=0)
    env.reset(seed=0)
    reference.step(1)
    obs, reward, *_ = env.step(1)
    assert reward == 2 and np.array_equal(obs, reference.step(1)[0])
    env = gym.make("my_tasks:SlowCartPole-v0", max_episode_steps=2, repeat=1, render_mode="rgb_array")
    env.reset(seed=0)
    assert [env.step(k)[3] for k in (0, 1)] == [False, True] and env.render().ndim == 3


def test_documented_multi_discrete(documented, tmp_path):
    """Every combination is one number, and a script trains on it."""
    env = gym.make("one_number:OneNumber-v0", env_id="Pairs-v0")
    check_env(env, skip_render_check=True)
    rewards = [env.reset() and env.step(action)[1] for action in range(env.action_space.n)]
    assert rewards == [first + second / 100 for first in (0, 1) for second in (5, 6, 7)]
    flags = ("--env-kwargs", '{"env_id": "Pairs-v0"}', "--total-timesteps", 64, "--num-envs", 2, "--num-steps", 16)
    result = run_script("ppo_acpg", "one_number:OneNumber-v0", tmp_path / "run", *flags)
    assert result.status == 0, result.stderr


def test_table():
    """Each id that the tests above know is in the page's table, with its number of actions."""
    text = (ROOT / "docs" / "environments.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for env_id, (actions, shape, dtype, _) in IDS.items():
        if env_id.startswith(("minatar", "discretized", "car_racing")):
            module, _, name = env_id.partition(":")
            row = next(r for r in rows if r.startswith(f"| `{module}:") and name.split("MinAtar")[-1] in r)
            assert str(actions) in row.split("|")[2] and str(shape[-1]) in row.split("|")[3] and dtype in row
