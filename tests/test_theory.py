"""The statements of docs/action_collapse.md about the layer-peeled problem, in float64."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT
from scipy.optimize import linprog

import theory

K = 4
ETF = {k: theory.simplex_etf(k, 6, torch.Generator().manual_seed(0)).double() for k in (2, 3, 4, 5)}


def gaps(*advantages):
    return max(advantages) - torch.tensor(advantages, dtype=torch.float64)


def best(advantages, scale):
    """The global optimum for one state."""
    return theory.solve_state(ETF[len(advantages)], scale, gaps(*advantages))[0][0]


def test_log_regret_is_the_objective():
    """exp of it is A(a*) - sum pi A."""
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    advantages = torch.tensor([0.3, 2.0, -1.0, 0.0], dtype=torch.float64)
    expected = 2.0 - (logits.softmax(-1) * advantages).sum(-1)
    torch.testing.assert_close(theory.log_regret(logits, 2.0 - advantages).exp(), expected)
    likelihood = 1 - logits.softmax(-1)[:, 1]
    torch.testing.assert_close(theory.log_regret(logits, theory.equal_gaps(2.0 - advantages)).exp(), likelihood)


@pytest.mark.parametrize("scale, degrees", [(0.1, 44.4), (1, 21.9), (3.16, 8.2), (10, 3.7), (100, 0.47)])
def test_angles_of_the_policy_gradient(scale, degrees):
    """A = (1, .5, 0, -1): off the optimal action's weight at every finite scale."""
    assert theory.angle(best((1, 0.5, 0, -1), scale), ETF[4][0]) == pytest.approx(degrees, abs=0.1)


@pytest.mark.parametrize("advantages", [(1, 0.5, 0, -1), (2, 1.9, 0), (0, -3, -1, -0.1, -7)])
def test_the_rate_at_which_the_angle_vanishes(advantages):
    """R tan(angle) tends to the closed form, with an error of order 1 / scale."""
    k = len(advantages)
    for scale in (100, 400):
        r = scale * math.sqrt(k / (k - 1))
        reached = r * math.tan(math.radians(theory.angle(best(advantages, scale), ETF[k][0])))
        assert reached == pytest.approx(theory.asymptote(advantages), rel=15 / scale)
    assert theory.asymptote((1, 0.5, 0, -1)) == pytest.approx(0.980, abs=1e-3)


def test_small_scale_follows_the_advantages():
    """As the scale goes to 0, h tends to the direction of sum_a A_a w_a, linearly."""
    direction = ETF[4].T @ torch.tensor([1, 0.5, 0, -1], dtype=torch.float64)
    off = [theory.angle(best((1, 0.5, 0, -1), scale), direction) for scale in (0.1, 0.01)]
    assert off[0] < 5 and off[1] == pytest.approx(off[0] / 10, rel=0.2)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 50.0])
@pytest.mark.parametrize("advantages", [(1, -2), (1, 0, 0), (0.3, -1, -1, -1), (5, 4.9, 4.9, 4.9, 4.9)])
def test_equal_gaps_collapse_exactly(scale, advantages):
    """Two actions, or equal non-optimal advantages: exact at every scale."""
    assert theory.angle(best(advantages, scale), ETF[len(advantages)][0]) < 1e-3


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 50.0])
def test_likelihood_collapses_exactly(scale):
    """Whatever the advantages: the log-likelihood of a* is the case of equal gaps."""
    h = theory.solve_state(ETF[4], scale, theory.equal_gaps(gaps(1, 0.5, 0, -1)))[0][0]
    assert theory.angle(h, ETF[4][0]) < 1e-3


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_a_tie_sits_midway_at_small_scale(scale):
    """(1, 1, 0): 60 degrees from either vertex."""
    h = best((1, 1, 0), scale)
    assert [theory.angle(h, ETF[3][i]) for i in (0, 1)] == pytest.approx([60, 60], abs=0.1)


def test_a_tie_breaks_at_large_scale_and_never_collapses():
    """It picks one of the two and tends to 30 degrees from it."""
    angles = {
        scale: sorted(theory.angle(best((1, 1, 0), scale), ETF[3][i]) for i in (0, 1)) for scale in (3.0, 30.0, 300.0)
    }
    assert all(low < 59 < high for low, high in angles.values())
    assert angles[300.0][0] == pytest.approx(30, abs=0.5)
    assert abs(angles[30.0][0] - 30) > abs(angles[300.0][0] - 30)


def test_a_spurious_local_maximum():
    """A = (1, .99, 0, -1) at scale 3: besides the optimum a strict local maximum whose greedy action is the second
    best."""
    minima, values = theory.solve_state(ETF[4], 3.0, gaps(1, 0.99, 0, -1), starts=30)
    greedy = [int((ETF[4] @ h).argmax()) for h in minima]
    assert greedy[0] == 0 and 1 in greedy and values[greedy.index(1)] > values[0] + 1e-6
    stuck = minima[greedy.index(1)]
    rng = np.random.default_rng(0)
    for _ in range(50):  # strict: every step along the sphere is worse
        step = stuck + 1e-2 * torch.tensor(rng.normal(size=6))
        shown = (
            ETF[4].T @ torch.linalg.pinv(ETF[4].T) @ step
        )  # its part that the layer sees, which is what has a maximum
        near = theory.log_regret(3.0 * ETF[4] @ (shown / shown.norm()), gaps(1, 0.99, 0, -1)).item()
        assert near > values[greedy.index(1)]


def test_the_order_of_the_actions_is_kept():
    """At the maximum the logits are in the order of the advantages, so greedy is optimal even where nothing
    collapses."""
    rng = np.random.default_rng(0)
    for _ in range(8):
        advantages, scale = rng.uniform(-1, 1, size=5), rng.uniform(0.2, 8)
        logits = ETF[5] @ best(advantages.tolist(), scale)
        assert (np.argsort(logits.numpy()) == np.argsort(advantages)).all()


@pytest.mark.parametrize("scale", [0.3, 2.0, 6.0])
def test_the_maximum_lies_on_the_sphere(scale):
    """So that solving there is solving in the ball: the objective still grows outwards at the optimum."""
    advantages = gaps(1, 0.5, 0, -1)
    h = best((1, 0.5, 0, -1), scale).clone().requires_grad_()
    theory.log_regret(scale * ETF[4] @ h, advantages).backward()
    assert h.grad @ h < 0


@pytest.mark.parametrize("imbalance", [1.0, 20.0])
@pytest.mark.parametrize("layer", ["etf", "learned"])
def test_many_states_under_likelihood(layer, imbalance):
    """A fixed ETF collapses exactly under any imbalance; a learned layer too if classes are balanced, and not
    otherwise."""
    states = theory.draw_gaps(40, K, imbalance, seed=0)
    h, weight, _ = theory.solve_jointly(layer, 2.0, states, "likelihood", 6, steps=3000)
    labels = states.argmin(-1)
    rows = weight - weight.mean(0)
    angles = [theory.angle(x, rows[y]) for x, y in zip(h, labels, strict=True)]
    frame = theory.max_angle_deviation(rows)
    if layer == "etf" or imbalance == 1.0:
        assert max(angles) < 0.1 and frame < 1e-3
    else:
        assert frame > 0.02


@pytest.mark.parametrize("imbalance", [1.0, 10.0])
def test_classes_are_as_many_as_asked(imbalance):
    states = theory.draw_gaps(52, K, imbalance, seed=0)
    counts = states.argmin(-1).bincount(minlength=K)
    assert counts[0] == imbalance * counts[1] and (counts[1:] == counts[1]).all()
    assert ((states > 0).sum(1) == K - 1).all()


def test_negative_weights_repel():
    """Maximising -log pi(a*) moves h to where a* is least likely, away from its weight."""
    h = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    (-(ETF[4] @ h).log_softmax(-1)[0]).backward()
    assert h.grad @ ETF[4][0] < 0


def test_a_random_layer_is_nearly_an_etf_in_high_dimension():
    """Cosines of centred random unit rows, K = 4: far from -1/3 at d = 4, near at d = 64, nearer at d = 4096."""
    generator = torch.Generator().manual_seed(0)
    deviations = []
    for dim in (4, 64, 4096):
        rows = torch.nn.functional.normalize(torch.randn(50, 4, dim, generator=generator, dtype=torch.float64), dim=-1)
        deviations.append(np.mean([theory.max_angle_deviation(x - x.mean(0)) for x in rows]))
    assert deviations[0] > 0.25 and deviations[1] < 0.1 and deviations[2] < 0.015


def test_a_box_cannot_align():
    """The largest w . h in the box [-1, 1]^d is reached at sign(w), at a cosine of about sqrt(2/pi)."""
    w = theory.simplex_etf(4, 4096, torch.Generator().manual_seed(0)).double()
    cosines = (w.sign() * w).sum(1) / w.sign().norm(dim=1)
    assert cosines.numpy() == pytest.approx([math.sqrt(2 / math.pi)] * 4, abs=0.02)


def test_relu_features_cannot_express_every_action():
    """With h >= 0 and d = K - 1 some orientations of the ETF have an action that is greedy nowhere; with d = 64 none
    has."""

    def expressible(weight, action):
        others = (
            np.delete(weight, action, axis=0) - weight[action]
        )  # (w_b - w_a) . h <= -t, maximise t, h >= 0, sum h = 1
        k, d = weight.shape
        bounds = np.hstack([others, np.ones((k - 1, 1))])
        result = linprog(
            [0] * d + [-1], bounds, np.zeros(k - 1), [[1] * d + [0]], [1], [(0, None)] * d + [(None, None)]
        )
        return -result.fun > 1e-9

    missing = {}
    for dim in (3, 64):
        layers = [
            theory.simplex_etf(4, dim, torch.Generator().manual_seed(seed)).double().numpy() for seed in range(30)
        ]
        missing[dim] = sum(not all(expressible(weight, action) for action in range(4)) for weight in layers)
    assert missing[3] > 3 and missing[64] == 0


@pytest.mark.slow
def test_the_command(tmp_path):
    """The table has a line for every scale, with the angles known for these advantages, and the figure is written."""
    command = [
        sys.executable,
        str(ROOT / "studies" / "theory.py"),
        "--scales",
        "0.1",
        "1",
        "10",
        "--states",
        "4",
        "--out",
        str(tmp_path),
    ]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    found = {line[0]: line for line in lines if line[0] in ("0.1", "1", "10")}
    assert {scale: line[3] for scale, line in found.items()} == {"0.1": "44.44", "1": "21.86", "10": "3.74"}
    assert all(float(line[5]) < 0.01 for line in found.values())  # likelihood collapses
    assert sum(line[0] in ("pg", "likelihood") for line in lines) == 18
    assert (tmp_path / "theory.md").read_text() in text
    assert (tmp_path / "theory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, what",
    [
        (["--advantages", "1"], "2 to 9 actions, not 1"),
        (["--feature-dim", "2"], "--feature-dim"),
        (["--scales", "0"], "--scales"),
        (["--states", "2"], "--states"),
    ],
)
def test_bad_input(flags, what, tmp_path):
    command = [sys.executable, str(ROOT / "studies" / "theory.py"), "--out", str(tmp_path / "out"), *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and what in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))
