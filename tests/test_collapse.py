"""`collapse_metrics` where its values are known, against plain numpy, and under what must not change it; `diagnose`."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo_acpg
import ppo_baseline
from ppo_acpg import collapse_metrics  # the same source in all scripts, says test_scripts_agree

both = pytest.mark.parametrize("module", [ppo_baseline, ppo_acpg], ids=lambda module: module.__name__)

VARIANCE = ("nc1", "variability_quotient", "cdnv")
MEANS = ("means_equinorm", "means_equiangularity", "means_max_angle", "etf_error")
WEIGHTS = ("weights_equinorm", "weights_equiangularity", "weights_max_angle")
DUALITY = ("self_duality", "mean_weight_cosine")
NAMES = {*VARIANCE, "alignment", "ncc_agreement", *MEANS, *WEIGHTS, *DUALITY, "classes_present"}
CENTRED = NAMES - {"ncc_agreement"}  # what sees the features and the weight only centred


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def etf(num_actions, feature_dim, seed=0):
    """Rows of a simplex ETF in float64: centred and normalised orthonormal rows (so feature_dim >= num_actions)."""
    rows = torch.linalg.qr(randn(feature_dim, num_actions, seed=seed))[0].T
    return torch.nn.functional.normalize(rows - rows.mean(0), dim=1)


def labels(*counts):
    """counts[k] times k, for every k."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def random_case(counts, feature_dim, seed=0, spread=1.0):
    """Features around random class means, their labels, a weight and a bias that have nothing to do with them."""
    actions = labels(*counts)
    means, noise = randn(len(counts), feature_dim, seed=seed), randn(len(actions), feature_dim, seed=seed + 1)
    weight = randn(len(counts), feature_dim, seed=seed + 2) + 0.5
    return means[actions] + 0.3 + spread * noise, actions, weight, randn(len(counts), seed=seed + 3)


def check(metrics, expected, rel=1e-7, abs=1e-9):
    """All names are there, with Python floats, and those in `expected` have its values (NaN equal to NaN)."""
    assert set(metrics) == NAMES
    assert all(type(value) is float for value in metrics.values())
    got = {name: metrics[name] for name in expected}
    assert got == pytest.approx(dict(expected), rel=rel, abs=abs, nan_ok=True)


def only(metrics, names):
    return {name: metrics[name] for name in names}


def numpy_metrics(features, actions, weight, bias=None):
    """The formulas one by one, with loops, after ../shared/acpg.md section 4."""
    h, y, w = (tensor.detach().double().numpy() for tensor in (features, actions, weight))
    y = y.astype(int)
    present = sorted(set(y.tolist()))
    out = {"classes_present": float(len(present))}
    means = {k: h[y == k].mean(0) for k in present}
    centre = sum(means.values()) / len(present)
    c = np.stack([means[k] - centre for k in present])  # rows are the columns of C
    w_present = w[present] - w[present].mean(0)

    def cos(a, b):
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    out["alignment"] = np.mean([cos(x - centre, means[k] - centre) for x, k in zip(h, y, strict=True)])
    agree = []
    for x in h:
        nearest = min(present, key=lambda k: np.linalg.norm(x - means[k]))
        agree.append(nearest == np.argmax(w @ x + (0 if bias is None else bias.numpy())))
    out["ncc_agreement"] = np.mean(agree)
    for name, rows in (("means", c), ("weights", w_present)):
        norms = [np.linalg.norm(row) for row in rows]
        cosines = [cos(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        out[f"{name}_equinorm"] = np.std(norms) / np.mean(norms)
        out[f"{name}_equiangularity"] = np.std(cosines)
        out[f"{name}_max_angle"] = np.mean([abs(cosine + 1 / (len(rows) - 1)) for cosine in cosines])
    k_eff = len(present)
    target = (np.eye(k_eff) - np.ones((k_eff, k_eff)) / k_eff) / np.sqrt(k_eff - 1)
    gram = c @ c.T
    out["etf_error"] = np.linalg.norm(gram / np.linalg.norm(gram) - target)
    out["self_duality"] = np.linalg.norm(w_present / np.linalg.norm(w_present) - c / np.linalg.norm(c)) ** 2
    out["mean_weight_cosine"] = np.mean([cos(a, b) for a, b in zip(c, w_present, strict=True)])

    # The metrics of variance, without classes of one sample
    several = [k for k in present if (y == k).sum() > 1]
    if len(several) < 2:
        return out | dict.fromkeys(VARIANCE, math.nan)
    centre = sum(means[k] for k in several) / len(several)
    within = np.zeros((h.shape[1], h.shape[1]))
    for x, k in zip(h, y, strict=True):
        if k in several:
            within += np.outer(x - means[k], x - means[k])
    within /= sum((y == k).sum() for k in several)
    between = sum(np.outer(means[k] - centre, means[k] - centre) for k in several) / len(several)
    variance = {k: np.mean([np.sum((x - means[k]) ** 2) for x in h[y == k]]) for k in several}
    # all but the rank's eigenvalues are rounding; np.linalg.pinv's cut-off is relative to the largest
    out["nc1"] = np.trace(within @ np.linalg.pinv(between, rcond=1e-13, hermitian=True)) / len(several)
    out["variability_quotient"] = np.trace(within) / np.trace(between)
    pairs = [(i, j) for i in several for j in several if i < j]
    out["cdnv"] = np.mean([(variance[i] + variance[j]) / (2 * np.sum((means[i] - means[j]) ** 2)) for i, j in pairs])
    return out


# --- worked out by hand


def hand_made_case():
    """Class means (6, 0), (0, 6), (0, 0), with 2, 2 and 4 samples around them: an ordinary, bad geometry."""
    features = [(5, 0), (7, 0), (0, 4), (0, 8), (1, 0), (-1, 0), (0, 1), (0, -1)]
    weight = [(1, 0), (0, 1), (-1, -1)]
    return torch.tensor(features).double(), labels(2, 2, 4), torch.tensor(weight).double()


def test_hand_worked_values():
    # mu_G = (2, 2) unweighted, C = (4, -2), (-2, 4), (-2, -2), of squared norms 20, 20, 8.
    # Sigma_B = [[24, -12], [-12, 24]] / 3 = [[8, -4], [-4, 8]], inverse [[2, 1], [1, 2]] / 12, trace 16.
    # Variances v = 1, 4, 1. Sigma_W = (2 diag(1, 0) + 2 diag(0, 4) + 4 diag(.5, .5)) / 8 = diag(.5, 1.25), trace 1.75.
    # Squared distances of the means: 72, 36, 36. Cosines of C: -16/20, -4/sqrt(160) twice. Sum of C_k . w_k = 12.
    # Of the last four samples the layer sends (1, 0) to action 0 and (0, 1) to action 1: agreement 6/8.
    cosines = np.array([-0.8, -4 / math.sqrt(160), -4 / math.sqrt(160)])
    norms = np.sqrt([20, 20, 8])
    alignments = [
        *(16 / math.sqrt(13 * 20), 24 / math.sqrt(29 * 20), 12 / math.sqrt(8 * 20), 28 / math.sqrt(40 * 20)),
        *(6 / math.sqrt(5 * 8), 10 / math.sqrt(13 * 8), 6 / math.sqrt(5 * 8), 10 / math.sqrt(13 * 8)),
    ]
    expected = {
        "nc1": (0.5 / 6 + 1.25 / 6) / 3,
        "variability_quotient": 1.75 / 16,
        "cdnv": (5 / 144 + 2 / 72 + 5 / 72) / 3,
        "alignment": sum(alignments) / 8,
        "ncc_agreement": 0.75,
        "means_equinorm": norms.std() / norms.mean(),
        "means_equiangularity": cosines.std(),
        "means_max_angle": (0.3 + 2 * (0.5 - 4 / math.sqrt(160))) / 3,
        # rows of W have norms 1, 1, sqrt(2) and cosines 0, -1/sqrt(2), -1/sqrt(2)
        "weights_equinorm": np.std([1, 1, math.sqrt(2)]) / np.mean([1, 1, math.sqrt(2)]),
        "weights_equiangularity": np.std([0, 0.5**0.5, 0.5**0.5]),
        "weights_max_angle": (0.5 + 2 * (0.5**0.5 - 0.5)) / 3,
        # |C^T C|_F^2 = 1440; its product with M* is tr(C^T C) / sqrt(2) = 48 / sqrt(2)
        "etf_error": math.sqrt(2 - 2 * 48 / math.sqrt(2 * 1440)),
        # 2 - 2 * 12 / (|W| |C|) = 2 - 24 / (2 sqrt(48))
        "self_duality": 2 - math.sqrt(3),
        "mean_weight_cosine": (4 / math.sqrt(20) + 4 / math.sqrt(20) + 1) / 3,
        "classes_present": 3.0,
    }
    assert set(expected) == NAMES
    check(collapse_metrics(*hand_made_case()), expected)


def test_bias_enters_only_the_agreement():
    """Of the hand-made case: with 3 for the last action, the layer keeps all its four samples and no other."""
    features, actions, weight = hand_made_case()
    without = collapse_metrics(features, actions, weight)
    biased = collapse_metrics(features, actions, weight, torch.tensor([0.0, 0.0, 3.0]).double())
    check(biased, only(without, CENTRED))
    assert biased["ncc_agreement"] == 1.0


def test_two_actions_by_hand():
    # means 1 and 6, mu_G = 3.5, C = -2.5, 2.5, Sigma_B = 6.25; Sigma_W = (2 * 1 + 4 * .5) / 6 = 2/3
    features = torch.tensor([[0.0], [2.0], [5.0], [6.0], [7.0], [6.0]])
    expected = {"nc1": 2 / 3 / 6.25 / 2, "variability_quotient": 2 / 3 / 6.25, "cdnv": 1.5 / 50, "alignment": 1.0}
    metrics = collapse_metrics(features, labels(2, 4), torch.tensor([[-1.0], [1.0]]))
    check(metrics, expected | {"mean_weight_cosine": 1.0, "self_duality": 0.0, "classes_present": 2.0})
    metrics = collapse_metrics(features, labels(2, 4), torch.tensor([[1.0], [-1.0]]))
    check(metrics, expected | {"mean_weight_cosine": -1.0, "self_duality": 4.0})


def test_two_actions_say_nothing_about_the_frame():
    """K = 2: centred means are antipodal and of one length, whatever the features and the weight."""
    metrics = collapse_metrics(*random_case((7, 30), 5)[:3])
    check(metrics, dict.fromkeys([*MEANS, *WEIGHTS], 0.0), abs=1e-7)
    assert 0.01 < metrics["nc1"] and abs(metrics["mean_weight_cosine"]) < 0.99


# --- collapse, and its absence

COLLAPSED = dict.fromkeys([*VARIANCE, *MEANS, *WEIGHTS, "self_duality"], 0.0)
COLLAPSED |= dict.fromkeys(["alignment", "ncc_agreement", "mean_weight_cosine"], 1.0)


@pytest.mark.parametrize("num_actions, feature_dim", [(2, 2), (3, 8), (4, 64), (6, 6), (18, 64)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_collapsed_features(num_actions, feature_dim, dtype, tolerance):
    """Features that are their action's row, stretched and shifted: every error 0, every alignment 1."""
    weight = etf(num_actions, feature_dim)
    actions = labels(*range(2, 2 + num_actions))
    features = 3 * weight[actions]
    metrics = collapse_metrics(features.to(dtype), actions, weight.to(dtype))
    check(metrics, COLLAPSED | {"classes_present": float(num_actions)}, abs=tolerance)
    shifted = collapse_metrics((features + 0.01 * weight[0]).to(dtype), actions, weight.to(dtype))
    check(shifted, COLLAPSED, abs=tolerance)


def test_features_at_bad_class_means():
    """Without variance within the classes AC2 reads 0 and the alignment 1, though the frame is no ETF."""
    actions, means = labels(3, 5, 2, 9), randn(4, 6)
    metrics = collapse_metrics(means[actions], actions, randn(4, 6, seed=1))
    check(metrics, dict.fromkeys(VARIANCE, 0.0) | {"alignment": 1.0})
    assert min(only(metrics, [*MEANS, *WEIGHTS, "self_duality"]).values()) > 0.01


@pytest.mark.parametrize("samples", [50, 200])
def test_gaussian_null(samples):
    """Features without any structure, d = 64, K = 4: AC3 looks good, AC2 does not (mean of 40 draws).

    Plain numpy on 5000 draws of four Gaussian means gives a max-angle of .0895 and an ETF error of .212, with standard
    deviations of .036 and .066 (acpg.md says about .08 and .20).
    """
    actions = labels(*[samples] * 4)
    draws = [collapse_metrics(randn(len(actions), 64, seed=i), actions, randn(4, 64, seed=99)) for i in range(40)]
    mean = {name: np.mean([metrics[name] for metrics in draws]) for name in NAMES}
    assert mean["means_max_angle"] == pytest.approx(0.0895, abs=0.02)
    assert mean["etf_error"] == pytest.approx(0.212, abs=0.036)
    assert mean["nc1"] == pytest.approx(3 * samples / 64, rel=0.15)
    assert abs(mean["mean_weight_cosine"]) < 0.1
    assert mean["self_duality"] == pytest.approx(2.0, abs=0.2)
    assert mean["alignment"] < 0.3


def test_heavy_imbalance_leaves_the_frame_alone():
    """ETF means at frequencies .97/.01/.01/.01 are an ETF still, for the centre is the unweighted mean."""
    actions, weight = labels(970, 10, 10, 10), etf(4, 16)
    across = torch.linalg.svd(weight)[2][-1]  # a unit vector orthogonal to the frame
    sign = torch.tensor([1.0, -1.0]).double().repeat(500).unsqueeze(1)
    size = torch.where(actions == 0, 0.1, 0.2).double().unsqueeze(1)
    metrics = collapse_metrics(weight[actions] + sign * size * across, actions, weight)
    # v = .01 and three times .04. tr Sigma_B = 1, tr Sigma_W = .97 * .01 + .03 * .04; orthogonal to Sigma_B: NC1 = 0.
    # |mu_i - mu_j|^2 = 2 * 4/3, so CDNV averages three pairs .05 * 3/16 and three pairs .08 * 3/16.
    expected = {
        "variability_quotient": 0.0109,
        "cdnv": 0.0121875,
        "nc1": 0.0,
        "mean_weight_cosine": 1.0,
        "ncc_agreement": 1.0,
    }
    # cos(h - mu_G, mu - mu_G) = 1 / sqrt(1 + size^2)
    expected["alignment"] = 0.97 / math.sqrt(1.01) + 0.03 / math.sqrt(1.04)
    check(metrics, expected | dict.fromkeys([*MEANS, *WEIGHTS, "self_duality"], 0.0))


# --- what is undefined, and what is left out


@pytest.mark.parametrize("action", [0, 2])
def test_one_action_only(action):
    features, _, weight, bias = random_case((10, 10, 10), 5)
    metrics = collapse_metrics(features, torch.full((30,), action), weight, bias)
    check(metrics, dict.fromkeys(NAMES, math.nan) | {"classes_present": 1.0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 123.4])
def test_constant_features(dtype, value):
    """All states look the same: nothing of the features' geometry is defined, least of all as 0."""
    features = torch.full((15, 6), value, dtype=dtype)
    metrics = collapse_metrics(features, labels(3, 5, 7), randn(3, 6).to(dtype))
    undefined = dict.fromkeys([*VARIANCE, *MEANS, *DUALITY, "alignment"], math.nan)
    check(metrics, undefined | {"classes_present": 3.0})
    assert all(math.isfinite(metrics[name]) for name in WEIGHTS)


@pytest.mark.parametrize("row", [0.0, 0.1])
def test_weight_without_a_frame(row):
    """Equal rows make a uniform policy: the weight's side is undefined, the features' side is not."""
    features, actions, weight, _ = random_case((6, 5, 7), 4)
    metrics = collapse_metrics(features.float(), actions, torch.full((3, 4), row))
    expected = collapse_metrics(features.float(), actions, weight.float())
    check(metrics, only(expected, [*VARIANCE, *MEANS, "alignment"]) | dict.fromkeys([*WEIGHTS, *DUALITY], math.nan))


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_missing_action(missing):
    """K - 1 vertices of an ETF, centred anew, are an ETF of K - 1 actions, and dual to those rows of the weight."""
    weight = etf(4, 16)
    counts = [2, 3, 4, 5]
    counts[missing] = 0
    actions = labels(*counts)
    metrics = collapse_metrics(weight[actions] * 2, actions, weight)
    check(metrics, COLLAPSED | {"classes_present": 3.0})


def test_missing_actions_leave_two():
    weight = etf(5, 8)
    actions = labels(0, 4, 0, 0, 2)
    check(collapse_metrics(weight[actions], actions, weight), COLLAPSED | {"classes_present": 2.0})


def test_missing_action_is_the_same_as_no_such_action():
    """All but the agreement, which the layer may still give to an absent action."""
    features, actions, weight, bias = random_case((8, 0, 12, 5, 0, 30), 7)
    metrics = collapse_metrics(features, actions, weight, bias)
    renamed = torch.tensor([0, -1, 1, 2, -1, 3])[actions]
    smaller = collapse_metrics(features, renamed, weight[[0, 2, 3, 5]], bias[[0, 2, 3, 5]])
    check(metrics, only(smaller, CENTRED))
    other_weight = weight.clone()
    other_weight[[1, 4]] += 10 * randn(2, 7, seed=9)
    check(collapse_metrics(features, actions, other_weight, bias), only(smaller, CENTRED))


def test_agreement_compares_actions_not_positions():
    """Labels 1 and 3 of four actions: the nearest centre's own label is compared with the layer's choice."""
    features = torch.tensor([[1.0, 0.0], [1.1, 0.0], [0.0, 1.0], [0.0, 1.1]])
    actions = torch.tensor([1, 1, 3, 3])
    weight = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    assert collapse_metrics(features, actions, weight)["ncc_agreement"] == 1.0
    assert collapse_metrics(features, actions, weight[[1, 0, 3, 2]])["ncc_agreement"] == 0.0
    absent_wins = torch.tensor([5.0, 0.0, 0.0, 0.0])
    assert collapse_metrics(features, actions, weight, absent_wins)["ncc_agreement"] == 0.0


@pytest.mark.parametrize("counts", [(9, 1, 14, 6), (1, 9, 14, 1), (5, 8, 1)])
def test_singleton_class_leaves_the_metrics_of_variance(counts):
    features, actions, weight, bias = random_case(counts, 5)
    metrics = collapse_metrics(features, actions, weight, bias)
    several = torch.tensor(counts)[actions] > 1
    without = collapse_metrics(features[several], actions[several], weight, bias)
    check(metrics, only(without, VARIANCE) | {"classes_present": float(len(counts))})
    expected = numpy_metrics(features, actions, weight, bias)
    check(metrics, only(expected, NAMES - set(VARIANCE)))
    assert metrics["means_max_angle"] != pytest.approx(without["means_max_angle"], abs=1e-3)


@pytest.mark.parametrize("counts", [(9, 1, 1), (1, 1, 1)])
def test_too_few_classes_with_a_variance(counts):
    features, actions, weight, _ = random_case(counts, 5)
    metrics = collapse_metrics(features, actions, weight)
    check(metrics, dict.fromkeys(VARIANCE, math.nan) | {"classes_present": 3.0})
    assert all(math.isfinite(metrics[name]) for name in NAMES - set(VARIANCE))


# --- against plain numpy


@pytest.mark.parametrize(
    "counts, feature_dim",
    [
        ((10, 10), 3),
        ((2, 50), 64),
        ((20, 20, 20), 2),
        ((5, 40, 11, 3), 64),
        ((200, 2, 2, 2), 8),
        ((12, 0, 7, 30), 6),
        ((0, 4, 1, 9, 0, 6), 10),
        ((8, 8, 8, 8, 8, 8), 5),
        ((15, 9, 20, 8, 11), 2),  # fewer dimensions than an ETF needs: Sigma_B has full rank
        ((3,) * 18, 64),
        ((30, 20, 10, 5), 1),
    ],
)
@pytest.mark.parametrize("seed", [0, 100])
def test_plain_numpy(counts, feature_dim, seed):
    case = random_case(counts, feature_dim, seed)
    check(collapse_metrics(*case), numpy_metrics(*case), rel=1e-8, abs=1e-10)
    check(collapse_metrics(*case[:3]), numpy_metrics(*case[:3]), rel=1e-8, abs=1e-10)


def test_single_precision_input_costs_no_precision():
    """Nearly collapsed float32 features far from the origin: what is left of them is worked out in float64."""
    features, actions, weight, _ = random_case((30, 5, 9, 16), 12, spread=1e-3)
    features, weight = (features + 50).float(), weight.float()
    check(collapse_metrics(features, actions, weight), numpy_metrics(features, actions, weight), rel=1e-6)


def test_nc1_keeps_small_eigenvalues_of_the_right_number():
    # Means (1, 0), (-1, 0), (0, 3e-6) in the plane of K_eff - 1 = 2 dimensions, turned within eight: Sigma_B has
    # eigenvalues 2/3 and (1 + 1 + 4) 1e-12 / 3 = 2e-12, and six of rounding. Sigma_W = 5e-7 I, outside that plane too.
    means = torch.zeros(3, 8, dtype=torch.float64)
    means[0, 0], means[1, 0], means[2, 1] = 1.0, -1.0, 3e-6
    offsets = torch.cat([torch.eye(8), -torch.eye(8)]).double() * 2e-3  # variance 2 * 4e-6 / 16 = 5e-7 along each axis
    features = (means.unsqueeze(1) + offsets).reshape(48, 8)
    turn = torch.linalg.qr(randn(8, 8))[0]
    metrics = collapse_metrics(features @ turn, labels(16, 16, 16), randn(3, 8, seed=1))
    assert metrics["nc1"] == pytest.approx(5e-7 * (3 / 2 + 1 / 2e-12) / 3, rel=0.02)


# --- invariance

CASE = random_case((25, 6, 0, 11, 40), 9)


def test_rotation():
    features, actions, weight, bias = CASE
    turn = torch.linalg.qr(randn(9, 9, seed=5))[0]
    metrics = collapse_metrics(features @ turn, actions, weight @ turn, bias)
    check(metrics, collapse_metrics(*CASE))


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
def test_scale_of_the_features(scale):
    features, actions, weight, _ = CASE
    check(collapse_metrics(scale * features, actions, weight), collapse_metrics(*CASE[:3]))


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
def test_scale_of_the_weight(scale):
    features, actions, weight, bias = CASE
    check(collapse_metrics(features, actions, scale * weight, scale * bias), collapse_metrics(*CASE))


def test_sign_of_the_weight_matters():
    features, actions, weight, _ = CASE
    metrics, turned = collapse_metrics(*CASE[:3]), collapse_metrics(features, actions, -weight)
    assert turned["mean_weight_cosine"] == pytest.approx(-metrics["mean_weight_cosine"])
    assert turned["self_duality"] == pytest.approx(4 - metrics["self_duality"])


def test_shift_of_the_features():
    """The agreement changes with the logits, so it too stays as it is where the bias undoes the shift."""
    features, actions, weight, bias = CASE
    shift = randn(9, seed=6)
    expected = collapse_metrics(*CASE)
    check(collapse_metrics(features + shift, actions, weight, bias), only(expected, CENTRED))
    check(collapse_metrics(features + shift, actions, weight, bias - weight @ shift), expected)


def test_common_row_of_the_weight():
    """Softmax does not see it, and neither does a metric."""
    features, actions, weight, bias = CASE
    metrics = collapse_metrics(features, actions, weight + 3 * randn(9, seed=7), bias)
    check(metrics, only(collapse_metrics(*CASE), CENTRED))


def test_order_of_the_samples():
    features, actions, weight, bias = CASE
    order = torch.randperm(len(actions), generator=seeded(8))
    check(collapse_metrics(features[order], actions[order], weight, bias), collapse_metrics(*CASE))


def test_names_of_the_actions():
    """Renaming the actions, in the labels and in the rows of the layer, changes nothing."""
    features, actions, weight, bias = CASE
    rename = torch.tensor([3, 0, 4, 1, 2])
    back = rename.argsort()
    metrics = collapse_metrics(features, rename[actions], weight[back], bias[back])
    check(metrics, collapse_metrics(*CASE))


def test_every_sample_twice():
    """Population moments: a batch said twice reads the same (but for singletons, of which there are none here)."""
    features, actions, weight, bias = CASE
    metrics = collapse_metrics(features.repeat(2, 1), actions.repeat(2), weight, bias)
    check(metrics, collapse_metrics(*CASE))


def test_inputs_are_left_alone_and_may_carry_gradients():
    features, actions, weight, bias = (tensor.clone() for tensor in CASE)
    features.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    check(collapse_metrics(features, actions, weight, bias), collapse_metrics(*CASE))
    for tensor, original in zip((features, actions, weight, bias), CASE, strict=True):
        assert torch.equal(tensor, original)


# --- diagnose


def make_agent(module, observation_space=None, num_actions=4, start=0, **overrides):
    torch.manual_seed(3)
    space = gym.spaces.Box(-5, 5, (3,), np.float32) if observation_space is None else observation_space
    return module.Agent(space, gym.spaces.Discrete(num_actions, start=start), module.Args(seed=3, **overrides))


def observations(count=300):
    return torch.randn(count, 3, generator=seeded(4))


def group(tags, prefix):
    """The collapse metrics among the tags under one prefix."""
    return {name: tags[f"{prefix}/{name}"] for name in NAMES}


@both
def test_diagnose_names(module):
    tags = module.diagnose(make_agent(module), observations(), 0)
    wanted = {f"{prefix}/{name}" for prefix in ("collapse", "collapse_null") for name in NAMES}
    wanted |= {f"collapse/action_frequency_{action}" for action in range(4)} | {"collapse/policy_variance"}
    assert wanted <= set(tags)
    assert {tag.split("/")[0] for tag in tags} == {"collapse", "collapse_null"}
    assert "collapse/action_frequency_4" not in tags
    assert all(type(value) is float for value in tags.values())


@both
def test_diagnose_labels_with_the_greedy_action(module):
    agent, obs = make_agent(module), observations()
    if agent.action_layer.bias is not None:
        with torch.no_grad():
            size = agent.action_layer.weight.norm(dim=1).mean()  # what the features add to a logit is of this size too
            agent.action_layer.bias.copy_(size * torch.tensor([0.0, 1.0, -1.0, 0.5]))
    tags = module.diagnose(agent, obs, 0)
    with torch.no_grad():
        greedy = agent.logits(obs).argmax(-1)
        expected = module.collapse_metrics(
            agent.features(obs), greedy, agent.action_layer.weight, agent.action_layer.bias
        )
        probs = agent.logits(obs).softmax(-1)
    check(group(tags, "collapse"), expected, rel=1e-4, abs=1e-6)
    frequencies = [tags[f"collapse/action_frequency_{action}"] for action in range(4)]
    assert frequencies == pytest.approx([(greedy == action).double().mean().item() for action in range(4)])
    assert len(set(greedy.tolist())) > 1
    assert 0 < tags["collapse/policy_variance"] <= probs.var(0, correction=0).sum().item() * (1 + 1e-4)


@both
def test_diagnose_null_has_the_same_labels_on_other_states(module):
    agent, obs = make_agent(module), observations()
    tags = module.diagnose(agent, obs, 0)
    metrics, null = group(tags, "collapse"), group(tags, "collapse_null")
    check(null, only(metrics, ("classes_present", *WEIGHTS)))
    assert null["nc1"] > 5 * metrics["nc1"]
    assert null["variability_quotient"] > 5 * metrics["variability_quotient"]
    assert null["alignment"] < 0.5 * metrics["alignment"]
    # and the permutation is all the randomness there is, and comes from the seed
    state = torch.get_rng_state()
    assert module.diagnose(agent, obs, 0) == pytest.approx(tags, rel=1e-5, abs=1e-9)
    assert torch.equal(torch.get_rng_state(), state)
    other = module.diagnose(agent, obs, 1)
    check(group(other, "collapse"), metrics, rel=1e-5)
    assert other["collapse_null/nc1"] != pytest.approx(null["nc1"], rel=1e-4)


@both
def test_diagnose_null_keeps_the_number_of_each_label(module):
    """Permuted, not drawn anew: of two states with two labels, both labels remain."""
    agent, obs = make_agent(module), observations()
    with torch.no_grad():
        greedy = agent.logits(obs).argmax(-1)
    two = obs[[0, int((greedy != greedy[0]).nonzero()[0, 0])]]
    for seed in range(12):
        assert module.diagnose(agent, two, seed)["collapse_null/classes_present"] == 2.0


@both
def test_diagnose_counts_repeated_observations_once(module):
    agent, obs = make_agent(module), observations()
    repeated = torch.cat([obs, obs[:40].repeat(9, 1)])[torch.randperm(660, generator=seeded(2))]
    expected = module.diagnose(agent, obs, 0)
    assert module.diagnose(agent, repeated, 0) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@both
def test_diagnose_discrete_observations(module):
    """Twelve states, each seen often, are twelve samples."""
    agent = make_agent(module, gym.spaces.Discrete(12, start=5), start=2)
    obs = torch.arange(5, 17).float()
    expected = module.diagnose(agent, obs, 0)
    repeated = obs.repeat(20)[torch.randperm(240, generator=seeded(2))]
    assert module.diagnose(agent, repeated, 0) == pytest.approx(expected, rel=1e-5, abs=1e-7, nan_ok=True)
    frequencies = [expected[f"collapse/action_frequency_{action}"] for action in range(4)]
    assert sum(frequencies) == pytest.approx(1)
    assert [12 * frequency for frequency in frequencies] == pytest.approx(
        [round(12 * frequency) for frequency in frequencies]
    )


@both
def test_diagnose_constant_policy(module):
    """Policy collapse: one action everywhere, no variance, and NaN for the rest."""
    agent = make_agent(module)
    with torch.no_grad():
        agent.backbone[2].weight.zero_()
        agent.backbone[2].bias.fill_(0.3)
    tags = module.diagnose(agent, observations(), 0)
    check(group(tags, "collapse"), dict.fromkeys(NAMES, math.nan) | {"classes_present": 1.0})
    check(group(tags, "collapse_null"), dict.fromkeys(NAMES, math.nan) | {"classes_present": 1.0})
    assert tags["collapse/policy_variance"] == pytest.approx(0, abs=1e-12)
    assert sorted(tags[f"collapse/action_frequency_{action}"] for action in range(4)) == [0, 0, 0, 1]


def test_diagnose_measures_features_after_the_constraint():
    """What enters the action-selection layer counts: here features that the ball keeps at norm 1 at most."""
    agent = make_agent(ppo_acpg, feature_constraint="ball", feature_gain=100.0, etf_scale=5.0)
    obs = observations()
    tags = ppo_acpg.diagnose(agent, obs, 0)
    with torch.no_grad():
        features = agent.features(obs)
        greedy = agent.logits(obs).argmax(-1)
    assert features.norm(dim=1).max() < 1.001
    check(group(tags, "collapse"), numpy_metrics(features, greedy, agent.action_layer.weight), rel=1e-4, abs=1e-6)
