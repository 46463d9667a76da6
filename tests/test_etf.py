"""The simplex ETF, the layer that holds it, the constraint on its features, and what the theory says of the three."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo_acpg
import ppo_baseline
from ppo_acpg import ActionLayer, constrain, simplex_etf

KINDS = ("etf", "scaled", "random", "learned", "normalised")
SIZES = [(k, k - 1 + extra) for k in range(2, 10) for extra in range(6)] + [
    (2, 64),
    (4, 64),
    (6, 64),
    (18, 17),
    (18, 512),
]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draws(num_actions, feature_dim, count):
    """`count` ETFs (count, num_actions, feature_dim) from one generator, in float64."""
    generator = seeded(0)
    return torch.stack([simplex_etf(num_actions, feature_dim, generator) for _ in range(count)]).double()


# --- simplex_etf: geometry


@pytest.mark.parametrize("num_actions, feature_dim", SIZES)
def test_geometry(num_actions, feature_dim):
    """Built in float64 and then cast, each entry is off by at most half a unit in the last place (2^-24 of itself)."""
    weight = simplex_etf(num_actions, feature_dim, seeded(1))
    assert weight.shape == (num_actions, feature_dim)
    assert weight.dtype == torch.float32
    weight = weight.double()
    assert (weight.norm(dim=1) - 1).abs().max() < 6.1e-8
    cosines = (weight @ weight.T)[~torch.eye(num_actions, dtype=torch.bool)]
    assert (cosines + 1 / (num_actions - 1)).abs().max() < 1.3e-7
    assert weight.sum(0).abs().max() < 6.1e-8 * num_actions / math.sqrt(num_actions - 1)


def test_spans_num_actions_minus_one_dimensions():
    """Tight: all nonzero singular values are sqrt(K / (K-1))."""
    values = torch.linalg.svdvals(simplex_etf(5, 9, seeded(2)).double())
    torch.testing.assert_close(values[:4], torch.full((4,), math.sqrt(5 / 4), dtype=torch.float64), rtol=0, atol=1e-6)
    assert values[4] < 1e-6


@pytest.mark.parametrize("feature_dim", [1, 2, 3, 64])
def test_two_actions_are_antipodal(feature_dim):
    first, second = simplex_etf(2, feature_dim, seeded(3))
    torch.testing.assert_close(first, -second, rtol=0, atol=1e-7)


@pytest.mark.parametrize("num_actions, feature_dim", [(1, 5), (0, 5), (-1, 5), (2, 0), (3, 1), (4, 2), (18, 16)])
def test_refuses_what_does_not_exist(num_actions, feature_dim):
    with pytest.raises(ValueError):
        simplex_etf(num_actions, feature_dim)


# --- simplex_etf: randomness


def test_same_generator_state_gives_the_same_frame():
    assert torch.equal(simplex_etf(4, 64, seeded(5)), simplex_etf(4, 64, seeded(5)))
    assert not torch.allclose(simplex_etf(4, 64, seeded(5)), simplex_etf(4, 64, seeded(6)))


def test_generator_moves_on():
    generator = seeded(5)
    assert not torch.allclose(simplex_etf(4, 64, generator), simplex_etf(4, 64, generator))


def test_global_random_state_is_not_touched():
    torch.manual_seed(11)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    first = simplex_etf(4, 64, seeded(5))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])
    torch.manual_seed(12)
    assert torch.equal(simplex_etf(4, 64, seeded(5)), first)


def test_without_generator_the_global_one_is_used():
    torch.manual_seed(13)
    first = simplex_etf(4, 64)
    second = simplex_etf(4, 64)
    torch.manual_seed(13)
    assert torch.equal(simplex_etf(4, 64), first)
    assert not torch.allclose(first, second)


def test_both_orientations_of_a_line():
    """K = 2, d = 1: rows are (1, -1) or (-1, 1), each half the time (400 draws: standard error .025)."""
    positive = (draws(2, 1, 400)[:, 0, 0] > 0).double().mean().item()
    assert positive == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("num_actions, feature_dim", [(3, 2), (4, 3), (3, 5), (4, 4)])
def test_every_row_is_uniform_on_the_sphere(num_actions, feature_dim):
    """Mean 0 and second moments I/d for every row (1500 draws: standard errors at most .02)."""
    frames = draws(num_actions, feature_dim, 1500)
    assert frames.mean(0).abs().max() < 0.09
    moments = torch.einsum("nki,nkj->kij", frames, frames) / len(frames)
    assert (moments - torch.eye(feature_dim, dtype=torch.float64) / feature_dim).abs().max() < 0.09


@pytest.mark.parametrize("num_actions", [3, 4])
def test_both_handednesses(num_actions):
    """d = K - 1: the frame and its mirror image are equally likely."""
    right = (torch.linalg.det(draws(num_actions, num_actions - 1, 600)[:, 1:]) > 0).double().mean().item()
    assert right == pytest.approx(0.5, abs=0.1)


def test_no_preferred_direction_in_the_plane():
    """The first row's angle is uniform: E cos(m angle) = E sin(m angle) = 0 (a square would show at m = 4)."""
    frames = draws(2, 2, 1500)
    angle = torch.atan2(frames[:, 0, 1], frames[:, 0, 0])
    for m in range(1, 9):
        assert abs((m * angle).cos().mean().item()) < 0.08
        assert abs((m * angle).sin().mean().item()) < 0.08


# --- ActionLayer


def test_logits_are_scale_times_weight_times_features():
    weight = torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]])
    logits = ActionLayer(weight, 2.0)(torch.tensor([[1.0, 1.0], [2.0, -4.0]]))
    # row 0: W h = (3, -1, 3.5); row 1: (2 - 8, 4, 6 - 2) = (-6, 4, 4)
    torch.testing.assert_close(logits, torch.tensor([[6.0, -2.0, 7.0], [-12.0, 8.0, 8.0]]))


def test_fixed_layer_is_a_buffer():
    layer = ActionLayer(simplex_etf(4, 8, seeded(0)), 3.0)
    assert list(layer.parameters()) == []
    assert [name for name, _ in layer.named_buffers()] == ["weight"]
    assert list(layer.state_dict()) == ["weight"]


def test_learned_layer_is_a_parameter():
    layer = ActionLayer(simplex_etf(4, 8, seeded(0)), 3.0, "learned")
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert list(layer.state_dict()) == ["weight"]


@pytest.mark.parametrize("learned", [False, True])
def test_training_moves_only_a_learned_weight(learned):
    weight = simplex_etf(4, 8, seeded(0))
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 8), ActionLayer(weight.clone(), 2.0, "learned" if learned else "etf")
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).log_softmax(-1)[:, 0].sum().backward()
        optimizer.step()
    assert torch.equal(model[1].weight, weight) is not learned


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_keep_every_bit(kind, tmp_path):
    layer = ActionLayer(simplex_etf(6, 64, seeded(0)), 1.0, kind)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = ActionLayer(simplex_etf(6, 64, seeded(1)), 1.0, kind)
    assert not torch.equal(other.weight, layer.weight)
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(other.weight, layer.weight)
    copied = copy.deepcopy(layer).double()
    assert copied(torch.ones(1, 64).double()).dtype == torch.float64


@pytest.mark.parametrize("kind, trained", [("scaled", {"theta"}), ("normalised", {"theta", "weight"})])
def test_layers_that_train_their_scale(kind, trained):
    """c = scale exp(sqrt(d) theta), from theta = 0 on; `scaled` keeps its rows, `normalised` their unit norms."""
    weight = simplex_etf(4, 9, seeded(0))
    layer, h = ActionLayer(weight.clone(), 2.0, kind), torch.randn(5, 9, generator=seeded(1))
    torch.testing.assert_close(layer(h), 2.0 * h @ weight.T)
    names = {name.split(".")[-2] if "original" in name else name for name, _ in layer.named_parameters()}
    assert names == trained
    with torch.no_grad():
        layer.theta.fill_(0.1)
    torch.testing.assert_close(layer(h), 2.0 * math.exp(0.3) * h @ weight.T)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (-layer(h).log_softmax(-1)[:, 0].mean()).backward()
        optimizer.step()
    assert layer.theta != 0.1
    assert torch.equal(layer.weight, weight) == (kind == "scaled")
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(4))


# --- ActionLayer: orthonormal rows are an ETF at another scale


def policy_and_gradient(layer, h):
    """The policy of each row of h, and the gradient of its log-probability of each action with respect to h."""
    h = h.clone().requires_grad_()
    logprobs = layer(h).log_softmax(-1)
    gradients = [torch.autograd.grad(logprobs[:, a].sum(), h, retain_graph=True)[0] for a in range(logprobs.shape[1])]
    return logprobs.detach().exp(), torch.stack(gradients)


@pytest.mark.parametrize("num_actions, feature_dim", [(2, 2), (3, 3), (4, 7), (6, 64)])
@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_orthonormal_rows_are_an_etf_at_a_smaller_scale(num_actions, feature_dim, scale):
    """Softmax ignores the rows' common part: K orthonormal rows at scale c act as an ETF at c * sqrt((K-1)/K)."""
    orthonormal = torch.linalg.qr(torch.randn(feature_dim, num_actions, dtype=torch.float64, generator=seeded(0)))[0].T
    etf = torch.nn.functional.normalize(orthonormal - orthonormal.mean(0), dim=1)
    expected = torch.eye(num_actions, dtype=torch.float64) * (1 + 1 / (num_actions - 1)) - 1 / (num_actions - 1)
    torch.testing.assert_close(etf @ etf.T, expected)  # the centred rows are an ETF indeed

    h = 2 * torch.randn(50, feature_dim, dtype=torch.float64, generator=seeded(1))
    policy, gradient = policy_and_gradient(ActionLayer(orthonormal, scale), h)
    same_policy, same_gradient = policy_and_gradient(
        ActionLayer(etf, scale * math.sqrt((num_actions - 1) / num_actions)), h
    )
    torch.testing.assert_close(same_policy, policy, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(same_gradient, gradient, rtol=1e-10, atol=1e-12)
    other_policy, _ = policy_and_gradient(ActionLayer(etf, scale), h)
    assert not torch.allclose(other_policy, policy, rtol=1e-3)


@pytest.mark.parametrize("num_actions, feature_dim", [(2, 3), (4, 5), (6, 64)])
def test_simplex_etf_is_the_centred_part_of_orthonormal_rows(num_actions, feature_dim):
    """sqrt((K-1)/K) W + 1 u^T / sqrt(K), u a unit vector orthogonal to the rows of W, has orthonormal rows."""
    etf = simplex_etf(num_actions, feature_dim, seeded(0)).double()
    u = torch.linalg.svd(etf)[2][-1]
    shrink = math.sqrt((num_actions - 1) / num_actions)
    orthonormal = shrink * etf + u / math.sqrt(num_actions)
    torch.testing.assert_close(
        orthonormal @ orthonormal.T, torch.eye(num_actions, dtype=torch.float64), rtol=0, atol=1e-6
    )
    h = torch.randn(50, feature_dim, dtype=torch.float64, generator=seeded(1))
    policy, gradient = policy_and_gradient(ActionLayer(orthonormal, 4.0), h)
    same_policy, same_gradient = policy_and_gradient(ActionLayer(etf, 4.0 * shrink), h)
    torch.testing.assert_close(same_policy, policy, rtol=0, atol=1e-9)
    # W reaches along u only through its rounding to float32
    torch.testing.assert_close(same_gradient, gradient, rtol=0, atol=1e-6)


# --- constrain


def test_tanh_is_a_box():
    h = torch.tensor([[0.0, 1.0, -2.0], [30.0, -30.0, 0.5]])
    features = constrain(h, "tanh")
    np.testing.assert_allclose(features.numpy(), np.tanh(h.numpy()), rtol=1e-6)
    assert (features.norm(dim=1) <= math.sqrt(3)).all()


def test_ball_scales_down_only_what_is_outside():
    h = torch.tensor([[0.3, 0.4], [3.0, 4.0], [0.0, -1.0], [0.0, 0.0], [-6.0, 8.0]])
    expected = torch.tensor([[0.3, 0.4], [0.6, 0.8], [0.0, -1.0], [0.0, 0.0], [-0.6, 0.8]])
    torch.testing.assert_close(constrain(h, "ball"), expected)


def test_sphere_keeps_only_the_direction():
    h = torch.tensor([[0.3, 0.4], [3.0, 4.0], [0.0, -0.01], [-6.0, 8.0]])
    expected = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, -1.0], [-0.6, 0.8]])
    torch.testing.assert_close(constrain(h, "sphere"), expected)


def test_none_changes_nothing():
    h = 100 * torch.randn(5, 3, generator=seeded(0))
    assert torch.equal(constrain(h, "none"), h)


@pytest.mark.parametrize("kind", ["tanh", "ball", "sphere", "none"])
def test_zero_features_are_finite(kind):
    """An all-zero observation gives a zero hidden layer: features and gradients have to survive it."""
    h = torch.zeros(2, 3, requires_grad=True)
    features = constrain(h, kind)
    features.sum().backward()
    assert features.isfinite().all()
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["tanh", "ball", "sphere", "none"])
def test_rows_are_constrained_on_their_own(kind):
    h = 2 * torch.randn(6, 4, generator=seeded(0))
    alone = torch.cat([constrain(row.unsqueeze(0), kind) for row in h])
    torch.testing.assert_close(constrain(h, kind), alone)


# --- scale bounds the policy


def p_max(num_actions, scale):
    return 1 / (1 + (num_actions - 1) * math.exp(-scale * num_actions / (num_actions - 1)))


@pytest.mark.parametrize("num_actions, reached", [(2, 0.88), (4, 0.56), (6, 0.40), (18, 0.145)])
def test_most_certain_policy_of_unit_features(num_actions, reached):
    """At scale 1 an aligned unit feature reaches these, and no other unit feature reaches more."""
    etf = simplex_etf(num_actions, 32, seeded(0))
    layer = ActionLayer(etf, 1.0)
    aligned = layer(etf).softmax(-1).diagonal()
    assert aligned.mean().item() == pytest.approx(reached, abs=0.005)
    torch.testing.assert_close(aligned, torch.full((num_actions,), p_max(num_actions, 1.0)), rtol=0, atol=1e-6)
    near = etf.repeat(200, 1) + 0.2 * torch.randn(200 * num_actions, 32, generator=seeded(1))
    anywhere = torch.randn(2000, 32, generator=seeded(2))
    others = constrain(torch.cat([near, anywhere]), "sphere")
    assert layer(others).softmax(-1).max() < p_max(num_actions, 1.0)


@pytest.mark.parametrize(
    "num_actions, scale_99, scale_999", [(2, 2.3, 3.5), (4, 4.3, 6.0), (6, 5.2, 7.1), (18, 7.0, 9.2)]
)
def test_scale_that_a_near_certain_policy_needs(num_actions, scale_99, scale_999):
    """p >= .99 needs s = ((K-1)/K) ln(99 (K-1)), and .999 likewise with 999."""
    etf = simplex_etf(num_actions, 32, seeded(0))
    for wanted, odds, rounded in ((0.99, 99, scale_99), (0.999, 999, scale_999)):
        scale = (num_actions - 1) / num_actions * math.log(odds * (num_actions - 1))
        assert scale == pytest.approx(rounded, abs=0.051)
        reached = ActionLayer(etf, scale)(etf).softmax(-1).diagonal()
        torch.testing.assert_close(reached, torch.full((num_actions,), wanted), rtol=0, atol=1e-5)


# --- the layer in the agent


def make_agent(num_actions=4, **overrides):
    torch.manual_seed(3)
    args = ppo_acpg.Args(**overrides)
    return ppo_acpg.Agent(gym.spaces.Box(-1, 1, (3,), np.float32), gym.spaces.Discrete(num_actions), args)


def trained_names(agent):
    return {name for name, _ in agent.named_parameters()}


def test_agent_holds_a_fixed_etf():
    agent = make_agent(feature_dim=5)
    weight = agent.action_layer.weight.double()
    cosines = (torch.eye(4) * 4 / 3 - 1 / 3).double()
    torch.testing.assert_close(weight @ weight.T, cosines, rtol=0, atol=1e-6)
    assert "action_layer.weight" in agent.state_dict()
    assert not any(name.startswith("action_layer") for name in trained_names(agent))


def test_random_control_differs_from_the_etf_in_its_angles_alone():
    """Fixed, centred, of the frame's total norm; rows of any norms and angles."""
    agent = make_agent(feature_dim=5, action_layer="random")
    weight = agent.action_layer.weight
    torch.testing.assert_close(weight.norm(), torch.tensor(2.0))
    torch.testing.assert_close(weight.sum(0), torch.zeros(5))
    assert (weight @ weight.T)[~torch.eye(4, dtype=torch.bool)].std() > 0.05
    assert not any(name.startswith("action_layer") for name in trained_names(agent))


def test_learned_control_starts_at_the_same_etf():
    fixed, learned = make_agent(seed=7), make_agent(seed=7, action_layer="learned")
    assert torch.equal(fixed.action_layer.weight, learned.action_layer.weight)
    assert trained_names(learned) - trained_names(fixed) == {"action_layer.weight"}


@pytest.mark.parametrize("kind", KINDS)
def test_arms_share_all_else(kind):
    """Backbone and critic are the same numbers whatever the layer; the baseline's, up to the gain of the features."""
    etf, other = make_agent(seed=7), make_agent(seed=7, action_layer=kind)
    torch.manual_seed(3)
    spaces = gym.spaces.Box(-1, 1, (3,), np.float32), gym.spaces.Discrete(4)
    base = ppo_baseline.Agent(*spaces, ppo_baseline.Args()).state_dict()
    for name, tensor in etf.state_dict().items():
        if not name.startswith("action_layer"):
            assert torch.equal(tensor, other.state_dict()[name])
            last = name == "backbone.2.weight"
            torch.testing.assert_close(tensor, base[name] * (0.1 / math.sqrt(2) if last else 1.0))


def expressible(constraint, feature_dim, num_actions=4):
    """The actions that some features make the greedy ones, under the frame of a seed."""
    weight = simplex_etf(num_actions, feature_dim, seeded(0))
    h = ppo_acpg.constrain(torch.randn(20_000, feature_dim, generator=seeded(1)), constraint)
    return set((h @ weight.T).argmax(1).tolist())


def test_relu_features_cannot_express_all_actions():
    """With d = K - 1 no features of the orthant favour a row that points away from it; signed features favour any."""
    assert expressible("tanh", 3) == expressible("none", 3) == {0, 1, 2, 3}
    assert len(expressible("relu", 3)) < 4
    assert expressible("relu", 64) == {0, 1, 2, 3}


@pytest.mark.parametrize("module", [ppo_acpg, ppo_baseline])
@pytest.mark.parametrize("activation, kind", [("tanh", torch.nn.Tanh), ("relu", torch.nn.ReLU)])
def test_activation(module, activation, kind):
    """Of all hidden layers of vectors; images keep ReLU in their trunk."""
    args = module.Args(activation=activation)
    for space in (gym.spaces.Box(-1, 1, (3,), np.float32), gym.spaces.Box(0, 1, (8, 8, 2), np.float32)):
        agent = module.Agent(space, gym.spaces.Discrete(4), args)
        trunk = {type(layer) for layer in (*agent.critic[:-2], *agent.backbone[:3])} & {torch.nn.Tanh, torch.nn.ReLU}
        assert trunk == {torch.nn.ReLU if len(space.shape) == 3 else kind}
        assert type(agent.critic[-2]) is kind
        if module is ppo_baseline:
            assert type(agent.backbone[-1]) is kind


def test_head_gain():
    """The baseline's last layer is orthogonal with this gain."""
    spaces = gym.spaces.Box(-1, 1, (3,), np.float32), gym.spaces.Discrete(4)
    for gain in (0.01, 1.5):
        weight = ppo_baseline.Agent(*spaces, ppo_baseline.Args(head_gain=gain)).action_layer.weight
        torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(4), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("constraint", ["tanh", "relu", "ball", "sphere", "none"])
def test_agent_logits_are_scale_times_etf_times_features(constraint):
    agent = make_agent(feature_constraint=constraint, etf_scale=3.0)
    obs = torch.randn(10, 3, generator=seeded(0))
    torch.testing.assert_close(agent.logits(obs), 3.0 * agent.features(obs) @ agent.action_layer.weight.T)


@pytest.mark.parametrize("constraint", ["ball", "sphere"])
def test_agent_is_never_more_certain_than_its_scale_allows(constraint):
    agent = make_agent(feature_constraint=constraint, etf_scale=2.0, feature_gain=100.0, feature_dim=3)
    probs = agent.logits(torch.randn(2000, 3, generator=seeded(0))).softmax(-1)
    assert p_max(4, 2.0) - 0.05 < probs.max() <= p_max(4, 2.0) + 1e-6
