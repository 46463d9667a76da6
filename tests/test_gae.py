"""`compute_gae` against tables worked out by hand and against an independent O(T^2) sum.

It is the same source in every script that has it, says test_scripts_agree; one of them is tested.

In the tables: delta_t = reward + gamma * next_value * (0 where terminated) - value, and
A_t = delta_t + gamma * lambda * (0 where an episode ended) * A_{t+1}; targets are A_t + value.
"""

import numpy as np
import pytest

from ppo_acpg import compute_gae


def gae(values, next_values, rewards, terminations, truncations, gamma=0.5, gae_lambda=0.5):
    """Call with lists of one row per step, one column per environment."""
    columns = [np.array(rows, dtype=np.float32) for rows in (values, next_values, rewards, terminations, truncations)]
    return compute_gae(*columns, gamma, gae_lambda)


def check(result, advantages, targets):
    for got, expected in zip(result, (advantages, targets), strict=True):
        assert got.shape == (len(expected), len(expected[0]))
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_running_on():
    result = gae(
        values=[[2], [4], [8]],
        next_values=[[4], [8], [16]],
        rewards=[[1], [2], [4]],
        terminations=[[0], [0], [0]],
        truncations=[[0], [0], [0]],
    )
    # t=2: delta = 4 + .5*16 - 8 = 4                  A = 4
    # t=1: delta = 2 + .5*8 - 4 = 2                   A = 2 + .25*4 = 3
    # t=0: delta = 1 + .5*4 - 2 = 1                   A = 1 + .25*3 = 1.75
    check(result, advantages=[[1.75], [3], [4]], targets=[[3.75], [7], [12]])


def test_terminated_in_the_middle():
    result = gae(
        values=[[2], [4], [8]],
        next_values=[[4], [8], [16]],  # the 8 is the next episode's and must not be looked at
        rewards=[[1], [2], [4]],
        terminations=[[0], [1], [0]],
        truncations=[[0], [0], [0]],
    )
    # t=2: delta = 4 + .5*16 - 8 = 4                  A = 4
    # t=1: delta = 2 + 0 - 4 = -2                     A = -2, cut
    # t=0: delta = 1 + .5*4 - 2 = 1                   A = 1 + .25*(-2) = .5
    check(result, advantages=[[0.5], [-2], [4]], targets=[[2.5], [2], [12]])


def test_truncated_in_the_middle():
    result = gae(
        values=[[2], [4], [8]],
        next_values=[[4], [20], [16]],  # 20 = value of the truncated episode's own last state
        rewards=[[1], [2], [4]],
        terminations=[[0], [0], [0]],
        truncations=[[0], [1], [0]],
    )
    # t=2: delta = 4 + .5*16 - 8 = 4                  A = 4
    # t=1: delta = 2 + .5*20 - 4 = 8                  A = 8, cut
    # t=0: delta = 1 + .5*4 - 2 = 1                   A = 1 + .25*8 = 3
    check(result, advantages=[[3], [8], [4]], targets=[[5], [12], [12]])


def test_both_kinds_in_one_batch():
    result = gae(
        # env 0 terminates at t=1 and is truncated at t=2; env 1 is truncated at t=0, terminates at t=3; env 2 runs on
        values=[[1, 4, 0], [2, 2, 4], [4, 6, 0], [8, 4, 4]],
        next_values=[[2, 10, 4], [4, 6, 0], [12, 4, 4], [6, 16, 8]],
        rewards=[[1, 1, -2], [3, 1, 8], [0, 2, -2], [2, 5, 4]],
        terminations=[[0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0]],
        truncations=[[0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]],
    )
    # env 0, t=3: 2 + .5*6 - 8 = -3                   A = -3
    #        t=2: 0 + .5*12 - 4 = 2, truncated        A = 2
    #        t=1: 3 + 0 - 2 = 1, terminated           A = 1
    #        t=0: 1 + .5*2 - 1 = 1                    A = 1 + .25*1 = 1.25
    # env 1, t=3: 5 + 0 - 4 = 1, terminated           A = 1
    #        t=2: 2 + .5*4 - 6 = -2                   A = -2 + .25*1 = -1.75
    #        t=1: 1 + .5*6 - 2 = 2                    A = 2 + .25*(-1.75) = 1.5625
    #        t=0: 1 + .5*10 - 4 = 2, truncated        A = 2
    # env 2, t=3: 4 + .5*8 - 4 = 4                    A = 4
    #        t=2: -2 + .5*4 - 0 = 0                   A = 0 + .25*4 = 1
    #        t=1: 8 + .5*0 - 4 = 4                    A = 4 + .25*1 = 4.25
    #        t=0: -2 + .5*4 - 0 = 0                   A = 0 + .25*4.25 = 1.0625
    check(
        result,
        advantages=[[1.25, 2, 1.0625], [1, 1.5625, 4.25], [2, -1.75, 1], [-3, 1, 4]],
        targets=[[2.25, 6, 1.0625], [3, 3.5625, 8.25], [6, 4.25, 1], [5, 5, 8]],
    )


def test_ending_on_the_last_step():
    result = gae(
        # the last step of env 0 terminates, of env 1 truncates, of env 2 runs on, of env 3 terminates at the time limit
        values=[[2, 2, 2, 2], [4, 4, 4, 4]],
        next_values=[[4, 4, 4, 4], [12, 12, 12, 12]],
        rewards=[[1, 1, 1, 1], [2, 2, 2, 2]],
        terminations=[[0, 0, 0, 0], [1, 0, 0, 1]],
        truncations=[[0, 0, 0, 0], [0, 1, 0, 1]],
    )
    # t=1: terminated: 2 + 0 - 4 = -2; otherwise 2 + .5*12 - 4 = 4, for there is nothing after the rollout to cut
    # t=0: 1 + .5*4 - 2 = 1, plus .25*(-2) or .25*4
    check(result, advantages=[[0.5, 2, 2, 0.5], [-2, 4, 4, -2]], targets=[[2.5, 4, 4, 2.5], [2, 8, 8, 2]])


def test_gamma_and_lambda_have_their_own_places():
    result = gae(
        values=[[2], [4]],
        next_values=[[4], [8]],
        rewards=[[1], [2]],
        terminations=[[0], [0]],
        truncations=[[0], [0]],
        gamma=0.5,
        gae_lambda=0.25,
    )
    # t=1: delta = 2 + .5*8 - 4 = 2                   A = 2
    # t=0: delta = 1 + .5*4 - 2 = 1                   A = 1 + .5*.25*2 = 1.25
    check(result, advantages=[[1.25], [2]], targets=[[3.25], [6]])


def random_rollout(num_steps, num_envs, seed):
    """A random rollout in which episodes end in all ways; next_values need not be the next row's values."""
    rng = np.random.default_rng(seed)
    values, next_values, rewards = rng.normal(size=(3, num_steps, num_envs))
    ending = rng.choice(
        4, size=(num_steps, num_envs), p=[0.7, 0.12, 0.12, 0.06]
    )  # goes on, terminated, truncated, both
    return values, next_values, rewards, np.isin(ending, (1, 3)).astype(float), np.isin(ending, (2, 3)).astype(float)


def run(rollout, gamma, gae_lambda):
    return compute_gae(*rollout, gamma, gae_lambda)


@pytest.mark.parametrize("gamma, gae_lambda", [(0.99, 0.95), (0.9, 0.3), (1.0, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (16, 1), (37, 5)])
def test_naive_sum(gamma, gae_lambda, shape):
    """A_t = sum_l (gamma lambda)^l delta_{t+l} up to and with the step that ends t's episode."""
    rollout = random_rollout(*shape, seed=shape[0])
    values, next_values, rewards, terminations, truncations = rollout
    expected = np.zeros(shape)
    for env in range(shape[1]):
        for start in range(shape[0]):
            for t in range(start, shape[0]):
                bootstrap = 0.0 if terminations[t, env] else gamma * next_values[t, env]
                delta = rewards[t, env] + bootstrap - values[t, env]
                expected[start, env] += (gamma * gae_lambda) ** (t - start) * delta
                if terminations[t, env] or truncations[t, env]:
                    break
    advantages, targets = run(rollout, gamma, gae_lambda)
    np.testing.assert_allclose(advantages, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(targets, expected + values, rtol=1e-9, atol=1e-12)


def test_lambda_zero_is_one_step_td():
    rollout = random_rollout(20, 4, seed=1)
    _, next_values, rewards, terminations, _ = rollout
    _, targets = run(rollout, gamma=0.9, gae_lambda=0.0)
    np.testing.assert_allclose(targets, np.where(terminations == 1, rewards, rewards + 0.9 * next_values), rtol=1e-12)


def test_lambda_one_is_the_discounted_return():
    """With next_values[t] = values[t+1] inside an episode, the values in between cancel."""
    values, next_values, rewards, terminations, truncations = random_rollout(25, 4, seed=2)
    inside = (terminations[:-1] == 0) & (truncations[:-1] == 0)
    next_values[:-1] = np.where(inside, values[1:], next_values[:-1])
    expected = np.zeros_like(values)
    for env in range(values.shape[1]):
        future = next_values[-1, env]
        for t in reversed(range(len(values))):
            if truncations[t, env]:
                future = next_values[t, env]
            if terminations[t, env]:
                future = 0.0
            future = rewards[t, env] + 0.9 * future
            expected[t, env] = future
    rollout = (values, next_values, rewards, terminations, truncations)
    _, targets = run(rollout, gamma=0.9, gae_lambda=1.0)
    np.testing.assert_allclose(targets, expected, rtol=1e-9, atol=1e-12)


def test_environments_do_not_mix():
    rollout = random_rollout(30, 6, seed=3)
    advantages, _ = run(rollout, 0.99, 0.95)
    for env in range(6):
        alone, _ = run([array[:, env : env + 1] for array in rollout], 0.99, 0.95)
        np.testing.assert_allclose(advantages[:, env : env + 1], alone, rtol=1e-12)


def test_inputs_are_left_alone():
    rollout = random_rollout(10, 3, seed=4)
    copies = [array.copy() for array in rollout]
    compute_gae(*rollout, 0.99, 0.95)
    for array, copy in zip(rollout, copies, strict=True):
        np.testing.assert_array_equal(array, copy)
