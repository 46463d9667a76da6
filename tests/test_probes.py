"""All scripts on environments whose values and best actions are known."""

import helpers
import numpy as np
import pytest
import torch

every = pytest.mark.parametrize("script", helpers.SCRIPTS)
with_critic = pytest.mark.parametrize("script", helpers.WITH_CRITIC)
GAMMA = 0.9
SETTINGS = {
    "ppo": "--learning-rate 3e-3 --no-anneal-lr --num-steps 32 --num-minibatches 2".split(),
    "a2c": "--learning-rate 3e-3 --anneal-lr --num-envs 4 --num-steps 8".split(),  # a gradient step every 32 steps
    "trpo": "--learning-rate 3e-3 --num-steps 32 --num-minibatches 2 --max-kl 0.05".split(),
    "reinforce": "--learning-rate 1e-2 --num-envs 4 --num-episodes 8".split(),  # a gradient step every 32 episodes
}


def learn(script, tmp_path, env_id, steps, *more):
    """A trained agent."""
    flags = ("--gamma", GAMMA, "--diagnostics-interval", 0, "--total-timesteps", steps, *more)
    return helpers.train(script, env_id, tmp_path / "run", *SETTINGS[helpers.algorithm(script)], *flags).agent


def without_value_clipping(script):
    """PPO's clipped value loss would take too long to reach a value of 10; the others do not clip it."""
    return ("--no-clip-vloss",) if helpers.algorithm(script) == "ppo" else ()


def values(agent, obs):
    """The agent's values of a batch of observations."""
    with torch.no_grad():
        return agent.value(torch.as_tensor(np.array(obs))).tolist()


def greedy(agent, obs):
    """The agent's likeliest action for each of a batch of observations, as an index from 0."""
    with torch.no_grad():
        return agent.logits(torch.as_tensor(np.array(obs))).argmax(-1).tolist()


def certainty(agent, obs):
    """The least of the probabilities with which the agent takes its likeliest actions for a batch of observations."""
    with torch.no_grad():
        return agent.logits(torch.as_tensor(np.array(obs))).softmax(-1).amax(-1).min().item()


@with_critic
def test_constant_reward(script, tmp_path):
    """The value is the constant return."""
    agent = learn(script, tmp_path, "ConstantReward", 4096)
    assert values(agent, np.ones((1, 1), dtype=np.float32)) == pytest.approx([1.0], abs=0.05)


@with_critic
def test_observation_reward(script, tmp_path):
    """The value depends on the observation."""
    agent = learn(script, tmp_path, "ObservationReward", 4096)
    assert values(agent, np.array([[1.0], [-1.0]], dtype=np.float32)) == pytest.approx([1.0, -1.0], abs=0.1)


@with_critic
def test_delayed_reward(script, tmp_path):
    """A reward one step away is discounted once."""
    agent = learn(script, tmp_path, "DelayedReward", 6144)
    assert values(agent, np.eye(2, dtype=np.float32)) == pytest.approx([GAMMA, 1.0], abs=0.05)


@every
def test_action_reward(script, tmp_path):
    """The paying action is found and taken."""
    agent = learn(script, tmp_path, "ActionReward", 4096)
    obs = np.ones((1, 1), dtype=np.float32)
    assert greedy(agent, obs) == [1]
    assert certainty(agent, obs) > 0.85
    assert script not in helpers.WITH_CRITIC or values(agent, obs)[0] > 0.7


@every
def test_delayed_action(script, tmp_path):
    """An action that pays only a step later is found."""
    agent = learn(script, tmp_path, "DelayedAction", 6144)
    obs = np.eye(2, dtype=np.float32)
    assert greedy(agent, obs[:1]) == [1]
    assert certainty(agent, obs[:1]) > 0.85
    assert script not in helpers.WITH_CRITIC or values(agent, obs[1:])[0] > 0.7


@every
def test_entropy_bonus(script, tmp_path):
    """A large entropy bonus keeps both actions, though one pays and the other costs."""
    agent = learn(script, tmp_path, "ActionReward", 4096, "--ent-coef", 10)
    with torch.no_grad():
        probs = agent.logits(torch.ones(1, 1)).softmax(-1)
    assert 0.2 < probs.min()


@every
def test_action_observation_reward(script, tmp_path):
    """The right action depends on the observation."""
    agent = learn(script, tmp_path, "ActionObservationReward", 6144)
    obs = np.array([[1.0], [-1.0]], dtype=np.float32)
    assert greedy(agent, obs) == [1, 0]
    assert certainty(agent, obs) > 0.85
    assert script not in helpers.WITH_CRITIC or min(values(agent, obs)) > 0.7


@with_critic
@pytest.mark.parametrize("length", [1, 3])
def test_truncation_bootstraps(script, length, tmp_path):
    """Where episodes are only ever cut off, the value is that of going on for ever."""
    kwargs = f'{{"length": {length}}}'
    agent = learn(script, tmp_path, "Truncated", 8192, *without_value_clipping(script), "--env-kwargs", kwargs)
    assert values(agent, np.ones((1, 1), dtype=np.float32)) == pytest.approx([1 / (1 - GAMMA)], abs=0.2)


@with_critic
def test_truncation_bootstraps_from_the_final_observation(script, tmp_path):
    """The value at the cut is that of the episode's own last observation, not of the next episode's first."""
    agent = learn(script, tmp_path, "TruncatedChain", 8192, *without_value_clipping(script))
    expected = [GAMMA / (1 - GAMMA), 1 / (1 - GAMMA)]
    assert values(agent, np.eye(2, dtype=np.float32)) == pytest.approx(expected, abs=0.2)


@with_critic
def test_max_episode_steps_truncates(script, tmp_path):
    """--max-episode-steps ends episodes by truncation, so that they bootstrap too."""
    agent = learn(script, tmp_path, "Endless", 8192, *without_value_clipping(script), "--max-episode-steps", 3)
    assert values(agent, np.ones((1, 1), dtype=np.float32)) == pytest.approx([1 / (1 - GAMMA)], abs=0.2)
    events, _ = helpers.read_events(tmp_path / "run")
    assert {value for _, value in events["charts/episodic_length"]} == {3.0}


@with_critic
def test_termination_does_not_bootstrap(script, tmp_path):
    """The twin of the truncation probe: the values are the finite sums of what is left."""
    agent = learn(script, tmp_path, "Terminated", 6144)
    expected = [1 + GAMMA + GAMMA**2, 1 + GAMMA, 1.0]
    assert values(agent, np.eye(4, dtype=np.float32)[:3]) == pytest.approx(expected, abs=0.1)


@every
@pytest.mark.parametrize("env_id", ["Bandit", "OffsetActions"])
def test_contextual_bandit(script, env_id, tmp_path):
    """Each of six contexts gets its own action; with actions from 5 on, `step` gets those and not 0, 1, ..."""
    agent = learn(script, tmp_path, env_id, 12288)
    contexts = np.eye(6, dtype=np.float32)
    assert greedy(agent, contexts) == [(5 * context + 2) % 6 for context in range(6)]
    assert certainty(agent, contexts) > 0.6
    assert script not in helpers.WITH_CRITIC or min(values(agent, contexts)) > 0.7


@every
def test_discrete_observation(script, tmp_path):
    """Numbered observations, not from 0, are told apart."""
    agent = learn(script, tmp_path, "DiscreteObservation", 6144)
    obs = np.array([2, 3, 4])
    assert greedy(agent, obs) == [1, 2, 0]
    assert certainty(agent, obs) > 0.85
    assert script not in helpers.WITH_CRITIC or values(agent, obs) == pytest.approx([0.0, 1.0, 2.0], abs=0.15)
