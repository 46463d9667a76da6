"""studies/imitation.py: its states are balanced and held apart, its control collapses where theory says so."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn

import imitation


class Teacher:
    """Prefers the action at which the observation has its largest entry; the last action is never greedy."""

    def logits(self, obs):
        return torch.cat([5 * obs, torch.full((len(obs), 1), -100.0)], dim=1)


class Corners(gym.Env):
    """Random observations, of which the first entry is seldom the largest."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (3,)), gym.spaces.Discrete(4)

    def draw(self):
        self.steps += 1
        return (self.np_random.normal(size=3) + [-1.5, 0, 0]).round(2).astype(np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.draw(), {}

    def step(self, action):
        return self.draw(), 1.0, self.steps >= 50, False, {}


def test_states_are_balanced_distinct_and_held_apart():
    obs, labels, returns = imitation.gather(Teacher(), Corners(), episodes=30, per_action=20)
    assert returns.tolist() == [49.0] * 30
    half = len(obs) // 2
    assert labels[:half].bincount().tolist() == labels[half:].bincount().tolist() == [20, 20, 20]
    assert (obs.argmax(1) == labels).all() and len(obs.unique(dim=0)) == len(obs) == 120
    obs, labels, _ = imitation.gather(Teacher(), Corners(), episodes=30, per_action=100)
    assert labels.unique().tolist() == [1, 2] and len(obs) == 400  # too few of the first
    with pytest.raises(SystemExit, match="--per-action"):
        imitation.gather(Teacher(), Corners(), episodes=2, per_action=100)


@pytest.mark.parametrize("features", imitation.FEATURES)
@pytest.mark.parametrize("layer", imitation.LAYERS)
def test_students(layer, features):
    """Networks differ by seed; only a learned layer is trained; all logits have one bound."""
    first, second = imitation.students(Corners(), layer, features, 2)
    dim = 4 if layer == "random, d = K" else 64
    assert first.action_layer.weight.shape == (4, dim)
    assert not torch.equal(first.backbone[0].weight, second.backbone[0].weight)
    assert isinstance(first.action_layer.weight, nn.Parameter) == (layer == "learned")
    assert [type(module) for module in first.backbone] == [nn.Linear, nn.Tanh] * 2 + [nn.Linear]
    largest = 1.0 if features == "ball" else math.sqrt(dim)  # norm of the features
    assert first.action_layer.scale * largest == pytest.approx(imitation.SCALE)
    if layer == "learned":
        assert first.action_layer.weight.norm(dim=1).tolist() == pytest.approx([1] * 4)


def test_networks_train_apart():
    """A network's course does not depend on those beside it, nor on the held-out half."""
    torch.manual_seed(0)
    obs, labels = torch.randn(40, 3), torch.arange(40) % 4
    args = SimpleNamespace(steps=20, learning_rate=1e-2)

    def last(count, obs):
        *_, (step, features, logits, weights) = imitation.imitate(
            imitation.students(Corners(), "learned", "ball", count), obs, labels, args
        )
        assert step == 20 and weights.norm(dim=-1).max() <= 1 + 1e-6
        return features[0, :20], logits[0, :20], weights[0]

    other = torch.cat([obs[:20], torch.randn(20, 3)])
    for a, b in zip(last(3, obs), last(1, other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def collapsed(layer, features, steps=2000):
    """The measurements of two networks that imitate four far-apart clusters, trained and untrained."""
    torch.manual_seed(0)
    labels = torch.arange(80) % 4
    obs = 2 * nn.functional.one_hot(labels, 4)[:, :3].float() + 0.6 * torch.randn(80, 3)
    args, found = SimpleNamespace(steps=steps, learning_rate=3e-3), {}
    for step, *parts in imitation.imitate(imitation.students(Corners(), layer, features, 2), obs, labels, args):
        if step in (0, steps):
            found[step] = imitation.measure(
                *(x[:, :40] if i < 2 else x for i, x in enumerate(parts)), labels[:40], torch.Generator()
            )
    return found[0], found[steps]


def test_the_control_collapses():
    """With ball features and a fixed ETF all three come about; the box aligns at .8, random rows need not be one."""
    untrained, trained = collapsed("etf", "ball")
    for before, after in zip(untrained, trained, strict=True):
        assert before["alignment"] < 0.9 and before["variability_quotient"] > 0.3
        assert after["alignment"] > 0.99 and after["variability_quotient"] < 0.01 and after["etf_error"] < 0.05
        assert after["null_alignment"] < 0.6 and after["null_variability_quotient"] > 1 and after["error"] == 0
    assert all(row["mean_weight_cosine"] < 0.9 for row in collapsed("etf", "tanh")[1])
    random = collapsed("random, d = K", "ball")[1]
    assert all(row["alignment"] > 0.99 for row in random) and max(row["etf_error"] for row in random) > 0.05


def test_curves():
    """Means over seeds by step; a metric that is void stays so."""
    row = {"alignment": 0.5, "variability_quotient": 2.0, "etf_error": math.nan}
    row |= {f"null_{name}": value / 2 for name, value in row.items()}
    steps = {0: [row, row], 10: [row, row | {"alignment": 0.7}]}
    rows = list(imitation.curves_of({("t", "etf", "ball", "held out"): steps}))
    assert rows[0] == ("t", "etf", "ball", "held out", 0, "alignment", "0.5", "0.25")
    assert rows[3][4:] == (10, "alignment", "0.6", "0.25") and rows[5][5:] == ("etf_error", "nan", "nan")


def test_two_classes_are_void():
    labels, features = torch.arange(10) % 2, torch.randn(1, 10, 4)
    (row,) = imitation.measure(features, torch.randn(1, 10, 2), torch.randn(1, 2, 4), labels, torch.Generator())
    assert math.isnan(row["etf_error"]) and math.isfinite(row["alignment"])
