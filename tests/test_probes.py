"""Both scripts on environments whose values and best actions are known."""

import helpers
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.parametrize("script", helpers.SCRIPTS)
GAMMA = 0.9
SETTINGS = "--learning-rate 3e-3 --no-anneal-lr --num-steps 32 --num-minibatches 2 --diagnostics-interval 0".split()


def learn(script, tmp_path, env_id, steps, *more):
    """A trained agent."""
    return helpers.train(script, env_id, tmp_path / "run", *SETTINGS, "--gamma", GAMMA, "--total-timesteps", steps, *more).agent


def values(agent, obs):
    """The agent's values of a batch of observations."""
    with torch.no_grad():
        return agent.value(torch.as_tensor(np.array(obs))).tolist()


def greedy(agent, obs):
    """The agent's likeliest action for each of a batch of observations, as an index from 0."""
    with torch.no_grad():
        return agent.logits(torch.as_tensor(np.array(obs))).argmax(-1).tolist()


def test_constant_reward(script, tmp_path):
    """The value is the constant return."""
    agent = learn(script, tmp_path, "ConstantReward", 4096)
    assert values(agent, np.ones((1, 1), dtype=np.float32)) == pytest.approx([1.0], abs=0.05)


def test_observation_reward(script, tmp_path):
    """The value depends on the observation."""
    agent = learn(script, tmp_path, "ObservationReward", 4096)
    assert values(agent, np.array([[1.0], [-1.0]], dtype=np.float32)) == pytest.approx([1.0, -1.0], abs=0.1)


def test_delayed_reward(script, tmp_path):
    """A reward one step away is discounted once."""
    agent = learn(script, tmp_path, "DelayedReward", 6144)
    assert values(agent, np.eye(2, dtype=np.float32)) == pytest.approx([GAMMA, 1.0], abs=0.05)


def test_action_reward(script, tmp_path):
    """The paying action is found and taken."""
    agent = learn(script, tmp_path, "ActionReward", 4096)
    obs = np.ones((1, 1), dtype=np.float32)
    assert greedy(agent, obs) == [1]
    assert values(agent, obs)[0] > 0.7


def test_entropy_bonus(script, tmp_path):
    """A large entropy bonus keeps both actions, though one pays and the other costs."""
    agent = learn(script, tmp_path, "ActionReward", 4096, "--ent-coef", 10)
    with torch.no_grad():
        probs = agent.logits(torch.ones(1, 1)).softmax(-1)
    assert 0.2 < probs.min()


def test_action_observation_reward(script, tmp_path):
    """The right action depends on the observation."""
    agent = learn(script, tmp_path, "ActionObservationReward", 6144)
    obs = np.array([[1.0], [-1.0]], dtype=np.float32)
    assert greedy(agent, obs) == [1, 0]
    assert min(values(agent, obs)) > 0.7


@pytest.mark.parametrize("length", [1, 3])
def test_truncation_bootstraps(script, length, tmp_path):
    """Where episodes are only ever cut off, the value is that of going on for ever."""
    kwargs = f'{{"length": {length}}}'
    agent = learn(script, tmp_path, "Truncated", 8192, "--no-clip-vloss", "--env-kwargs", kwargs)
    assert values(agent, np.ones((1, 1), dtype=np.float32)) == pytest.approx([1 / (1 - GAMMA)], abs=0.2)


def test_truncation_bootstraps_from_the_final_observation(script, tmp_path):
    """The value at the cut is that of the episode's own last observation, not of the next episode's first."""
    agent = learn(script, tmp_path, "TruncatedChain", 8192, "--no-clip-vloss")
    expected = [GAMMA / (1 - GAMMA), 1 / (1 - GAMMA)]
    assert values(agent, np.eye(2, dtype=np.float32)) == pytest.approx(expected, abs=0.2)


def test_max_episode_steps_truncates(script, tmp_path):
    """--max-episode-steps ends episodes by truncation, so that they bootstrap too."""
    agent = learn(script, tmp_path, "Endless", 8192, "--no-clip-vloss", "--max-episode-steps", 3)
    assert values(agent, np.ones((1, 1), dtype=np.float32)) == pytest.approx([1 / (1 - GAMMA)], abs=0.2)
    events, _ = helpers.read_events(tmp_path / "run")
    assert {value for _, value in events["charts/episodic_length"]} == {3.0}


def test_termination_does_not_bootstrap(script, tmp_path):
    """The twin of the truncation probe: the values are the finite sums of what is left."""
    agent = learn(script, tmp_path, "Terminated", 6144)
    expected = [1 + GAMMA + GAMMA**2, 1 + GAMMA, 1.0]
    assert values(agent, np.eye(4, dtype=np.float32)[:3]) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("env_id", ["Bandit", "OffsetActions"])
def test_contextual_bandit(script, env_id, tmp_path):
    """Each of six contexts gets its own action; with actions from 5 on, `step` gets those and not 0, 1, ..."""
    agent = learn(script, tmp_path, env_id, 12288)
    contexts = np.eye(6, dtype=np.float32)
    assert greedy(agent, contexts) == [(5 * context + 2) % 6 for context in range(6)]
    assert min(values(agent, contexts)) > 0.7


def test_discrete_observation(script, tmp_path):
    """Numbered observations, not from 0, are told apart."""
    agent = learn(script, tmp_path, "DiscreteObservation", 6144)
    obs = np.array([2, 3, 4])
    assert greedy(agent, obs) == [1, 2, 0]
    assert values(agent, obs) == pytest.approx([0.0, 1.0, 2.0], abs=0.15)
