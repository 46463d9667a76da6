"""The ETF layer of `ppo_acpg.py` in Stable-Baselines3: its PPO or A2C with a fixed simplex ETF as `action_net`.

    pip install stable-baselines3==2.9.2
    python examples/sb3_acpg.py --env-id CartPole-v1 --total-timesteps 50000

`simplex_etf` and `ActionLayer` are copied from `ppo_acpg.py` word for word, which a test checks. docs/copy.md explains.
"""

import math
import sys
from dataclasses import dataclass

import gymnasium as gym
import torch
import torch.nn as nn
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # id of an environment with Discrete actions
    total_timesteps: int = 50000  # environment steps to train for
    seed: int = 1  # seed of the weights, the environments and the actions
    etf_scale: float = 1.0  # scale of the logits
    feature_gain: float = 0.1  # gain of the last hidden layer; small, for a first policy that is near uniform


def simplex_etf(num_actions, feature_dim, generator=None):
    """A simplex equiangular tight frame: (num_actions, feature_dim), unit rows, cosines -1/(num_actions - 1).

    W = sqrt(K/(K-1)) V Q^T, V an orthonormal basis of the complement of the ones vector in R^K, Q Haar-random
    orthonormal (feature_dim, K-1); it exists for feature_dim >= K-1 (Papyan, Han and Donoho 2020 define the
    frame). Raises ValueError for fewer than two actions, and for a feature_dim that is too small.
    """
    if not 2 <= num_actions <= feature_dim + 1:
        raise ValueError(f"--feature-dim {feature_dim} suits 2 to {feature_dim + 1} actions, not {num_actions}")
    gaussian = torch.randn(feature_dim, num_actions - 1, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal().sign()  # without this the orientation is not Haar-distributed
    v = torch.linalg.qr((torch.eye(num_actions, dtype=torch.float64) - 1 / num_actions)[:, 1:]).Q
    return (math.sqrt(num_actions / (num_actions - 1)) * v @ q.T).float()


class ActionLayer(nn.Module):
    """logits = scale * W h. W (num_actions, feature_dim) is a buffer, saved, not trained, but in the kinds
    `learned` and, with rows kept at unit norm, `normalised`. `scaled` and `normalised` train the scale."""

    def __init__(self, weight, scale=1.0, kind="etf"):
        super().__init__()
        self.scale, self.bias = scale, None  # the layer that ACPG replaces has a bias
        self.weight = nn.Parameter(weight) if kind in ("learned", "normalised") else nn.Buffer(weight)
        if kind == "normalised":
            nn.utils.parametrize.register_parametrization(self, "weight", UnitRows())
        self.theta = nn.Parameter(torch.zeros(())) if kind in ("scaled", "normalised") else None

    def forward(self, h):
        logits = self.scale * nn.functional.linear(h, self.weight)
        if self.theta is None:
            return logits
        return logits * (math.sqrt(h.shape[-1]) * self.theta).exp()  # as fast as a trained layer's norm


class UnitRows(nn.Module):
    def forward(self, weight):
        return nn.functional.normalize(weight, dim=1)


class ACPGPolicy(ActorCriticPolicy):
    """Stable-Baselines3's policy for Discrete actions whose action-selection layer is a fixed simplex ETF."""

    def __init__(self, *args, etf_scale=1.0, feature_gain=0.1, **kwargs):
        self.etf_scale, self.feature_gain = etf_scale, feature_gain
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        last_hidden = [layer for layer in self.mlp_extractor.policy_net if isinstance(layer, nn.Linear)][-1]
        nn.init.orthogonal_(last_hidden.weight, self.feature_gain)
        weight = simplex_etf(int(self.action_space.n), self.mlp_extractor.latent_dim_pi)
        self.action_net = ActionLayer(weight, self.etf_scale)
        # the optimiser that the parent made still holds the layer that has just been replaced
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    if args.env_id not in gym.registry:
        sys.exit(f"error: --env-id {args.env_id} is unknown to gymnasium")
    bounds = {
        "total_timesteps": (1, 1e12),
        "seed": (0, 2**32 - 1),
        "etf_scale": (1e-6, 1e6),
        "feature_gain": (1e-6, 1e6),
    }
    for name, (low, high) in bounds.items():
        if not low <= (value := getattr(args, name)) <= high:
            sys.exit(f"error: --{name.replace('_', '-')} must lie between {low} and {high}, got {value}")
    torch.set_num_threads(1)
    policy_kwargs = {"etf_scale": args.etf_scale, "feature_gain": args.feature_gain}
    envs = make_vec_env(args.env_id, n_envs=4, seed=args.seed)
    model = PPO(
        ACPGPolicy, envs, n_steps=128, batch_size=128, policy_kwargs=policy_kwargs, seed=args.seed, device="cpu"
    )
    etf = model.policy.action_net.weight.clone()
    model.learn(args.total_timesteps)
    assert torch.equal(model.policy.action_net.weight, etf)  # a buffer: no optimiser ever sees it
    mean, std = evaluate_policy(model, make_vec_env(args.env_id, seed=args.seed + 1000), n_eval_episodes=20)
    print(
        f"{args.env_id} seed {args.seed}: greedy return {mean:.1f} +- {std:.1f} (standard deviation) over 20 episodes"
    )
