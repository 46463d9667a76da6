"""PPO with CleanRL's hyperparameters: the baseline of `ppo_acpg.py`.

    python ppo_baseline.py --env-id CartPole-v1
    python ppo_baseline.py --env-id LunarLander-v3 --learning-rate 2e-3 --seed 2

docs/metrics.md defines what is logged, docs/implementation.md explains why things are done as they are.
"""

import csv
import hashlib
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # seed of everything: weights, environments, action noise, minibatches
    cuda: bool = True  # use the GPU if there is one (networks this small are faster on the CPU)
    torch_threads: int = 1  # CPU threads of torch; more only slow small networks down
    compile: bool = False  # compile the update with torch.compile (needs a C++ compiler and half a minute)
    track: bool = False  # also log to Weights & Biases (pip install wandb)
    wandb_project_name: str = "acpg"  # project at Weights & Biases
    wandb_entity: str | None = None  # entity (team) at Weights & Biases
    capture_video: bool = False  # record videos of environment 0 to the run folder (pip install moviepy)
    save_model: bool = False  # save the trained agent as model.pt in the run folder
    run_dir: str = ""  # the run folder, whose run is replaced; default: runs/<env-id>__<exp-name>__<seed>
    checkpoint_interval: int = 0  # updates between checkpoints, where all episodes begin anew; 0: none
    keep_checkpoints: bool = False  # keep each checkpoint as checkpoints/<step>.pt, for evaluate.py --animate
    resume: bool = False  # go on from the last checkpoint of the same run
    log_interval: int = 4  # updates per entry of the logs, in which losses are averaged over them
    diagnostics_interval: int = 20  # updates between two measurements of collapse/*; 0: never
    # Algorithm specific arguments
    env_id: str = "CartPole-v1"  # id of the environment; `module:EnvId-v0` imports module first
    env_kwargs: str = "{}"  # keyword arguments of the environment, as JSON
    max_episode_steps: int | None = None  # truncate episodes here instead of at the environment's own limit
    total_timesteps: int = 500_000  # environment steps to train for, all environments together
    learning_rate: float = 2.5e-4  # learning rate of the optimizer
    num_envs: int = 4  # environments stepped side by side
    num_steps: int = 128  # steps in each environment per rollout
    anneal_lr: bool = True  # anneal the learning rate linearly to zero
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 4  # passes over each rollout
    norm_adv: bool = True  # normalize the advantages of each minibatch
    clip_coef: float = 0.2  # clipping coefficient of the surrogate
    clip_vloss: bool = True  # clip the value loss too, by the same coefficient
    ent_coef: float = 0.01  # coefficient of the entropy
    vf_coef: float = 0.5  # coefficient of the value loss, which is half the mean squared error
    max_grad_norm: float = 0.5  # largest norm of the gradient, above which it is scaled down
    target_kl: float | None = None  # end an update's epochs once the approximate KL divergence exceeds this
    feature_dim: int = 64  # width of the features h, the input of the action-selection layer
    activation: Literal["tanh", "relu"] = "tanh"  # of hidden layers; convolutions have ReLU
    head_gain: float = 0.001  # gain of the last layer; small, for a first policy that is near uniform


# Network ----------------------------------------------------------------------------------------------------
def layer_init(layer, gain=2**0.5):
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def trunk(space, outputs, activation, gain=2**0.5):
    """The layers up to the last hidden one's output. Images (H, W, C) start with the Nature CNN's convolutions
    (Mnih et al. 2015), or below 36 pixels with those of the MinAtar paper (Young and Tian 2019)."""
    if len(space.shape) == 3:
        (height, width, channels), layers = space.shape, []
        large = min(height, width) >= 36
        for filters, kernel, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)) if large else ((16, 3, 1),):
            layers += [layer_init(nn.Conv2d(channels, filters, kernel, stride)), nn.ReLU()]
            height, width, channels = (height - kernel) // stride + 1, (width - kernel) // stride + 1, filters
        hidden = 512 if large else 128
        layers += [nn.Flatten(), layer_init(nn.Linear(height * width * channels, hidden)), nn.ReLU()]
    else:
        hidden = 64
        layers = [layer_init(nn.Linear(gym.spaces.flatdim(space), hidden)), activation()]
    return [*layers, layer_init(nn.Linear(hidden, outputs), gain)]


class Agent(nn.Module):
    """Actor and critic: vectors (B, D), Discrete (B,), images (B, H, W, C) to logits (B, K), values (B,)."""

    def __init__(self, observation_space, action_space, args):
        super().__init__()
        space, activation = observation_space, nn.ReLU if args.activation == "relu" else nn.Tanh
        self.discrete, self.image = isinstance(space, gym.spaces.Discrete), len(space.shape) == 3
        if self.discrete:
            self.first, self.states = int(space.start), int(space.n)
        elif self.image:  # scaled by its bounds, where they are finite
            low, high = torch.as_tensor(np.stack([space.low, space.high]), dtype=torch.float32)
            known = (high > low) & (high - low < 1e30)
            self.low = nn.Buffer(low.where(known, 0.0), persistent=False)
            self.span = nn.Buffer((high - low).where(known, 1.0), persistent=False)
        self.critic = nn.Sequential(*trunk(space, 64, activation), activation(), layer_init(nn.Linear(64, 1), 1.0))
        self.backbone = nn.Sequential(*trunk(space, args.feature_dim, activation), activation())
        self.action_layer = layer_init(nn.Linear(args.feature_dim, int(action_space.n)), args.head_gain)

    def encode(self, obs):
        if self.discrete:
            obs = F.one_hot(obs.long() - self.first, self.states)
        obs = obs.to(self.action_layer.weight.dtype)
        return ((obs - self.low) / self.span).permute(0, 3, 1, 2) if self.image else obs

    def features(self, obs):
        return self.backbone(self.encode(obs))

    def logits(self, obs):
        return self.action_layer(self.features(obs))

    def value(self, obs):
        return self.critic(self.encode(obs)).squeeze(-1)


# PPO --------------------------------------------------------------------------------------------------------
def compute_gae(values, next_values, rewards, terminations, truncations, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16) where episodes end within the rollout.

    Arrays are (num_steps, num_envs). `next_values` are of the states that the steps led to, before any reset.
    Termination makes that state worth zero; termination or truncation cuts the sum.
    Returns (advantages, returns), the returns being the targets of the values.
    """
    deltas = rewards + gamma * next_values * (1.0 - terminations) - values
    decays = gamma * gae_lambda * (1.0 - np.maximum(terminations, truncations))
    advantages, advantage = np.zeros_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + decays[t] * advantage
    return advantages, advantages + values


def ppo_loss(agent, args, mb_obs, mb_actions, mb_logprobs, mb_advantages, mb_returns, mb_values):
    """(loss, stats) of PPO on a minibatch (Schulman et al. 2017, eq. 7 and 9), all (B,) but mb_obs."""
    newlogprobs = agent.logits(mb_obs).log_softmax(-1)
    entropy = -(newlogprobs.exp() * newlogprobs).sum(-1).mean()
    logratio = newlogprobs.gather(1, mb_actions.unsqueeze(1)).squeeze(1) - mb_logprobs
    ratio = logratio.exp()
    if args.norm_adv:
        mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
    pg_loss1 = -mb_advantages * ratio
    pg_loss2 = -mb_advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(pg_loss1, pg_loss2).mean()
    newvalue = agent.value(mb_obs)
    v_loss = (newvalue - mb_returns) ** 2
    if args.clip_vloss:
        v_clipped = mb_values + (newvalue - mb_values).clamp(-args.clip_coef, args.clip_coef)
        v_loss = torch.max(v_loss, (v_clipped - mb_returns) ** 2)
    v_loss = 0.5 * v_loss.mean()
    loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
    stats = {"value_loss": v_loss, "policy_loss": pg_loss, "entropy": entropy}
    stats |= {"old_approx_kl": -logratio.mean(), "approx_kl": (ratio - 1 - logratio).mean()}
    stats["clipfrac"] = ((ratio - 1).abs() > args.clip_coef).to(ratio.dtype).mean()
    return loss, {f"losses/{name}": value.detach() for name, value in stats.items()}


class Adam:
    """torch.optim.Adam after nn.utils.clip_grad_norm_, on one vector, of which they become views. For
    torch's own, let `update` call zero_grad(), loss.backward(), clip_grad_norm_() and step() as usual."""

    def __init__(self, params):
        self.params = list(params)
        self.vector = torch.cat([param.detach().flatten() for param in self.params])
        self.mean, self.square = self.vector.new_zeros(2, len(self.vector))
        self.steps = self.vector.new_zeros(())
        for param, part in zip(self.params, self.vector.split([p.numel() for p in self.params]), strict=True):
            param.data = part.view_as(param)

    def step(self, grads, lr, max_grad_norm, beta1=0.9, beta2=0.999, eps=1e-5):
        grad = torch.cat([grad.flatten() for grad in grads])
        grad = grad * (max_grad_norm / (grad.norm() + 1e-6)).clamp(max=1.0)
        self.steps += 1
        self.mean.lerp_(grad, 1 - beta1)
        self.square.lerp_(grad.square(), 1 - beta2)
        mean_hat, square_hat = self.mean / (1 - beta1**self.steps), self.square / (1 - beta2**self.steps)
        self.vector.sub_(lr * mean_hat / (square_hat.sqrt() + eps))


def update(agent, optimizer, args, lr, *minibatch):
    """One gradient step, which --compile makes one graph; `lr` is a tensor. Returns the loss's stats."""
    loss, stats = ppo_loss(agent, args, *minibatch)
    grads = torch.autograd.grad(loss, optimizer.params)
    with torch.no_grad():
        optimizer.step(grads, lr, args.max_grad_norm)
    return stats


# Collapse diagnostics ---------------------------------------------------------------------------------------
COLLAPSE_METRICS = (
    "nc1 variability_quotient cdnv alignment ncc_agreement means_equinorm means_equiangularity "
    "means_max_angle weights_equinorm weights_equiangularity weights_max_angle etf_error self_duality "
    "mean_weight_cosine classes_present"
).split()


def collapse_metrics(features, actions, weight, bias=None):
    """How far features (N, d) have collapsed, with labels `actions` (N,), a layer's weight (K, d), bias (K,).

    Labels are optimal actions where known, else the policy's greedy ones, which flatter. Means are centred on
    their unweighted mean, the weight over classes present. A class of no sample takes no part, one of one
    sample none in AC2. Returns a float for each of COLLAPSE_METRICS, NaN where undefined: docs/metrics.md.
    """
    classes, labels, counts = actions.unique(return_inverse=True, return_counts=True)
    metrics = dict.fromkeys(COLLAPSE_METRICS, math.nan) | {"classes_present": float(len(classes))}
    if (k := len(classes)) < 2:
        return metrics
    features, weight = features.detach().double(), weight.detach().double()
    chosen = F.linear(features, weight, None if bias is None else bias.double()).argmax(1)
    h = features - features[0]  # a shift changes nothing below; features all alike become exactly zero
    average = F.one_hot(labels).to(h.dtype).T / counts[:, None]  # (classes, N): the mean over each class
    means = average @ h
    centred, deviations = means - means.mean(0), h - means[labels]
    # AC1: each activation points where its class mean does
    metrics["alignment"] = F.cosine_similarity(h - means.mean(0), centred[labels], eps=0).mean()
    metrics["ncc_agreement"] = (classes[torch.cdist(h, means).argmin(1)] == chosen).double().mean()
    # AC2: the variability within classes vanishes
    variances, several = average @ deviations.square().sum(1), counts >= 2
    if several.sum() >= 2:
        between = means[several] - means[several].mean(0)
        within = (counts * variances)[several].sum() / counts[several].sum()
        metrics["variability_quotient"] = within / between.square().sum(1).mean()
        _, scales, axes = torch.linalg.svd(between, full_matrices=False)
        rounding = scales[0] * max(between.shape) * torch.finfo(h.dtype).eps
        if rank := int((scales[: len(between) - 1] > rounding).sum()):
            whitened = (deviations[several[labels]] @ axes[:rank].T) / scales[:rank]
            metrics["nc1"] = whitened.square().sum(1).mean()
        i, j = torch.triu_indices(len(between), len(between), 1, device=h.device)
        distances = (between[i] - between[j]).square().sum(1)
        metrics["cdnv"] = ((variances[several][i] + variances[several][j]) / (2 * distances)).mean()
    # AC3: the class means form a simplex ETF, the same one as the weights
    weight, identity = weight[classes] - weight[classes].mean(0), torch.eye(k, dtype=h.dtype, device=h.device)
    for name, vectors in (("means", centred), ("weights", weight)):
        norms = vectors.norm(dim=1)
        cosines = (vectors @ vectors.T / torch.outer(norms, norms))[identity == 0]
        metrics[f"{name}_equinorm"] = norms.std(correction=0) / norms.mean()
        metrics[f"{name}_equiangularity"] = cosines.std(correction=0)
        metrics[f"{name}_max_angle"] = (cosines + 1 / (k - 1)).abs().mean()
    gram, simplex = centred @ centred.T, (identity - 1 / k) / math.sqrt(k - 1)
    metrics["etf_error"] = (gram / gram.norm() - simplex).norm()
    metrics["self_duality"] = (weight / weight.norm() - centred / centred.norm()).square().sum()
    metrics["mean_weight_cosine"] = F.cosine_similarity(centred, weight, eps=0).mean()
    return {name: float(value) if math.isfinite(value) else math.nan for name, value in metrics.items()}


@torch.no_grad()
def diagnose(agent, obs, seed):
    """collapse/* of distinct observations labelled by the greedy action; collapse_null/*: labels permuted."""
    rows = (obs.reshape(len(obs), -1) + 0).cpu().numpy()  # -0.0 becomes 0.0
    distinct = {hashlib.sha256(row).digest(): i for i, row in enumerate(rows)}  # repeated ones would fake collapse
    features = agent.features(obs[[i for _, i in sorted(distinct.items())]])
    layer, probs = agent.action_layer, agent.action_layer(features).softmax(-1)
    greedy = probs.argmax(-1)
    permutation = torch.randperm(len(greedy), generator=torch.Generator().manual_seed(seed)).to(greedy.device)
    tags = {}
    for group, labels in (("collapse", greedy), ("collapse_null", greedy[permutation])):
        metrics = collapse_metrics(features, labels, layer.weight, layer.bias)
        tags |= {f"{group}/{name}": value for name, value in metrics.items()}
    frequencies = (greedy.bincount(minlength=probs.shape[1]) / len(greedy)).tolist()
    tags |= {f"collapse/action_frequency_{action}": frequency for action, frequency in enumerate(frequencies)}
    tags["collapse/policy_variance"] = probs.var(0, correction=0).sum().item()
    return tags | {"collapse/feature_norm": features.norm(dim=1).mean().item()}


# Arguments, environments, the run's folder ------------------------------------------------------------------
def check_args(args):
    """Raise ValueError, naming the argument, for values that cannot work."""
    zero_ok = "seed diagnostics_interval checkpoint_interval gamma gae_lambda ent_coef vf_coef target_kl".split()
    highest = {"seed": 2**32 - 1, "gamma": 1, "gae_lambda": 1, "torch_threads": 2**10}
    highest |= {"num_envs": 2**16, "feature_dim": 2**16}
    for name, value in vars(args).items():
        low = 0 if name in zero_ok else 1 if type(value) is int else 1e-38
        high = highest.get(name, 1e38)
        if type(value) in (int, float) and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} must lie between {low} and {high}, got {value}")
    batch = args.num_envs * args.num_steps
    if batch % args.num_minibatches or not 2 * args.num_minibatches <= batch <= args.total_timesteps:
        rule = f"must not exceed --total-timesteps {args.total_timesteps}, and --num-minibatches"
        rule += f" {args.num_minibatches} must cut it into equal parts of two steps or more"
        raise ValueError(f"the batch of --num-envs {args.num_envs} x --num-steps {args.num_steps} {rule}")
    if args.capture_video:
        import moviepy  # noqa: F401
    if args.track:
        import wandb  # noqa: F401
    if args.compile and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        raise ValueError("--compile needs a C++ compiler (g++ or clang++); install one or drop --compile")


def adapt(env):
    """`env` with observations for Agent: Discrete, vectors, images (H, W, C), and all else flattened. Raises
    ValueError for what gymnasium cannot flatten, for channels first, for actions that are not Discrete."""
    space = env.observation_space
    if not isinstance(env.action_space, gym.spaces.Discrete):
        raise ValueError(f"actions are {env.action_space}, not Discrete; wrap it as in docs/environments.md")
    size = space.shape if isinstance(space, gym.spaces.Box) else ()
    if len(size) == 3 and 5 <= min(size[1:]) > size[0]:
        raise ValueError(f"its observations {size} have channels first; wrap it in a TransformObservation")
    if isinstance(space, gym.spaces.Discrete) or len(size) == 1 or len(size) == 3 and min(size[:2]) >= 5:
        return env
    with suppress(NotImplementedError):
        flattened = gym.wrappers.FlattenObservation(env)
        if isinstance(flattened.observation_space, gym.spaces.Box) and "Text(" not in str(space):
            return flattened
    raise ValueError(f"its observations {space} cannot be flattened; wrap it in a TransformObservation")


class Envs:
    """`num_envs` environments, stepped in turn; the step that ends an episode also resets it. Ignores infos,
    copies observations at once. `episodes` collects (environment, return, length) of those that end."""

    def __init__(self, args):
        sys.path.append(os.getcwd())  # so that `module:EnvId-v0` is found here too
        try:
            kwargs = json.loads(args.env_kwargs) | ({"render_mode": "rgb_array"} if args.capture_video else {})
            make = partial(gym.make, args.env_id, max_episode_steps=args.max_episode_steps, **kwargs)
            self.envs = [adapt(make(disable_env_checker=True if i else None)) for i in range(args.num_envs)]
        except Exception as error:
            what = f"--env-id {args.env_id} --env-kwargs {args.env_kwargs}: {type(error).__name__}: {error}"
            where = f" (not installed, nor in {os.getcwd()}; pip install)" if isinstance(error, ImportError) else ""
            raise ValueError(what + where) from error
        env = self.envs[0]
        if isinstance(env, gym.wrappers.FlattenObservation):
            print(f"{env.env.observation_space} observations are flattened to {env.observation_space.shape}")
        self.observation_space, self.action_space = space, _ = env.observation_space, env.action_space
        dtype = np.float32 if space.dtype.kind == "f" else space.dtype
        self.obs, self.after = self.buffers = np.zeros((2, args.num_envs, *space.shape), dtype=dtype)
        self.rewards, self.terminations, self.truncations = np.zeros((3, args.num_envs), dtype=np.float32)
        self.steps, self.episodes, self.running = 0, [], [(0.0, 0)] * args.num_envs  # running: return, length

    def reset(self, rng):
        """The first observations (num_envs, ...) of new episodes; `rng` gives the environments' seeds."""
        seeds = rng.integers(2**32, size=len(self.envs))
        for i, env in enumerate(self.envs):
            self.obs[i], _ = env.reset(seed=int(seeds[i]))
            self.running[i] = (0.0, 0)
        self.check()
        return self.obs

    def step(self, actions):
        """(next_obs, rewards, terminations, truncations, after), in arrays that the next step overwrites:
        `after` is the state that the step led to, `next_obs` what to act on (at an end the reset's)."""
        for i, (env, action) in enumerate(zip(self.envs, actions + self.action_space.start, strict=True)):
            obs, reward, terminated, truncated, _ = env.step(action)
            reward = float(reward.item() if isinstance(reward, np.ndarray) else reward)
            self.after[i] = self.obs[i] = obs
            self.rewards[i], self.terminations[i], self.truncations[i] = reward, terminated, truncated
            self.running[i] = (self.running[i][0] + reward, self.running[i][1] + 1)
            if terminated or truncated:
                self.episodes.append((i, *self.running[i]))
                self.running[i] = (0.0, 0)
                self.obs[i], _ = env.reset()
        self.steps += len(self.envs)
        self.check()
        return self.obs, self.rewards, self.terminations, self.truncations, self.after

    def check(self):
        if self.obs.dtype.kind == "f" and not np.isfinite(self.buffers).all():
            raise ValueError("the observation is not finite")


def run_name(env_id, exp_name, seed):
    """The name of a run's folder, encoded where a path needs it; no two environments share one."""
    return "__".join(quote(str(part), safe="=").replace("%", "=") for part in (env_id, exp_name, seed))


def read_run(folder):
    """run.json of a run's folder as a dict, {} if the folder is free, None if it holds anything else."""
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        record = json.loads((folder / "run.json").read_text())
        if record["acpg_run"] == 1 and isinstance(record["args"], dict):
            return record
    files = folder.iterdir() if folder.exists() else ()  # a start that failed leaves empty ones
    return None if any(path.stat().st_size for path in files if path.name != "run.json.tmp") else {}


class Run(AbstractContextManager):
    """The run's folder and progress. As a context manager it leaves all files whole however training ends."""

    def __init__(self, args, agent, optimizer, envs):
        self.args, self.agent, self.optimizer, self.envs = args, agent, optimizer, envs
        self.rows, self.interrupted, self.summary = [], 0, "no episode ended"
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout if shutil.which("git") else ""
        versions = {module.__name__: str(module.__version__) for module in (gym, np, torch)}
        versions |= {"python": sys.version.split()[0], "git_commit": commit.strip()}
        sha256 = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        self.record = {"acpg_run": 1, "status": "running", "argv": sys.argv[1:], "script_sha256": sha256}
        self.record |= {"args": vars(args), "versions": versions}
        self.path, self.file, self.saved = self.claim()
        self.step = envs.steps = self.saved.get("step", 0)
        self.returns = deque(self.saved.get("returns", ()), maxlen=100)
        self.csv = csv.DictWriter(self.file, self.saved["columns"], restval="") if self.saved else None
        if args.track:
            import wandb

            names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": self.path.name}
            wandb.init(**names, config=vars(args), sync_tensorboard=True, save_code=True)
        outdated = ["*.tmp", "model.pt", "evaluation.json", "collapse.png", "collapse.gif"]  # of another model
        outdated += [] if self.saved else ["checkpoint.pt", "checkpoints/*", "*.tfevents.*", "videos/*"]
        for path in (path for pattern in outdated for path in self.path.glob(pattern)):
            path.unlink()
        self.write("run.json", json.dumps(self.record, indent=2).encode())
        self.file.truncate(self.saved.get("csv_length", 0))
        hook = threading.excepthook  # the event file's thread would print a traceback of what `log` raises
        threading.excepthook = lambda thread: None if isinstance(thread.exc_value, OSError) else hook(thread)
        self.writer = SummaryWriter(str(self.path), purge_step=self.step + 1 if self.saved else None)
        text = ["|param|value|", "|-|-|", *(f"|{key}|{value}|" for key, value in vars(args).items())]
        self.writer.add_text("hyperparameters", "\n".join(text))
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit="step", unit_scale=True, disable=None)
        self.start, self.shown = time.perf_counter() - self.saved.get("wall_time", 0.0), 0.0
        for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):  # Windows has no SIGHUP
            if name != "SIGHUP" or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup's stays
                signal.signal(getattr(signal, name), self.interrupt)

    def claim(self):
        """(path, file, saved): the folder, progress.csv in it, locked, what --resume goes on from. The folder
        is --run-dir, or the first of runs/<name>, <name>-2, ... that is free or has the same arguments."""
        args = self.args
        asked = {key: value for key, value in vars(args).items() if key not in ("run_dir", "resume")}
        base = path = Path(args.run_dir or f"runs/{run_name(args.env_id, args.exp_name, args.seed)}")
        for k in itertools.count(2):
            old = read_run(path)
            other = [key for key, value in asked.items() if old and old["args"].get(key, ...) != value]
            if args.run_dir or args.resume or not other and old is not None:
                break
            path = base.with_name(f"{base.name}-{k}")
        if old is None:
            raise ValueError(f"--run-dir {path} holds files of no run; choose another or empty it")
        if args.resume and other:
            raise ValueError(f"--resume: {path} had other {', '.join(other)}; give those or its --run-dir")
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / "progress.csv", "a", newline="", buffering=1)
        with suppress(ImportError, OSError):  # Windows, and some network file systems, have no such locks
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"--run-dir {path}: another run is writing there; choose another") from error
        if path != base:
            print(f"{base} is taken by another run: this one goes to {path}", flush=True)
        return path, file, self.last_checkpoint(path, read_run(path)) if args.resume else {}

    def last_checkpoint(self, path, old):
        """The checkpoint in `path`, put into agent and optimizer, {} without one; run.json there is `old`."""
        if old and old.get("script_sha256") != self.record["script_sha256"]:
            raise ValueError(f"--resume: {path} is of another version of the script; drop it to start over")
        if old.get("status") == "finished":
            print(f"--resume: {path} is finished")
            sys.exit(0)
        if not (checkpoint := path / "checkpoint.pt").exists():
            print(f"--resume: {path} has no checkpoint, so the run starts over", flush=True)
            return {}
        try:
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
            self.agent.load_state_dict(saved["agent"])
            for name, tensor in saved["optimizer"].items():
                getattr(self.optimizer, name).copy_(tensor)
        except Exception as error:
            raise ValueError(f"--resume: {checkpoint} is damaged; drop --resume to start over") from error
        print(f"--resume: {path} goes on at step {saved['step']}", flush=True)
        return saved

    def save(self, name, *loop):
        """Write the agent for torch.load; given the loop's variables, also all else that --resume needs."""
        content = {key: self.record[key] for key in ("args", "versions")} | {"script": Path(__file__).stem}
        content["agent"] = {name: tensor.cpu() for name, tensor in self.agent.state_dict().items()}
        if loop:
            moments = {name: tensor for name, tensor in vars(self.optimizer).items() if name != "params"}
            content |= {"loop": loop, "optimizer": moments, "step": self.step, "returns": list(self.returns)}
            content |= {"columns": self.csv.fieldnames, "csv_length": os.fstat(self.file.fileno()).st_size}
            content["wall_time"] = time.perf_counter() - self.start
        torch.save(content, buffer := io.BytesIO())
        self.write(name, buffer.getvalue())
        if loop and self.args.keep_checkpoints:
            (self.path / "checkpoints").mkdir(exist_ok=True)
            self.write(f"checkpoints/{self.step}.pt", buffer.getvalue())

    def write(self, name, content):
        (self.path / f"{name}.tmp").write_bytes(content)
        (self.path / f"{name}.tmp").replace(self.path / name)

    def log(self, tags, step):
        """Make an entry of the event file and of progress.csv, where None leaves a gap, and show progress."""
        seconds, total, episodes = time.perf_counter() - self.start, self.args.total_timesteps, self.envs.episodes
        if step > 0:
            _, mean, length = np.mean(episodes, axis=0).tolist() if episodes else [None] * 3
            charts = {"charts/episodic_return": mean, "charts/episodic_length": length}
            tags = charts | {"charts/SPS": step / seconds} | tags
        for tag, value in tags.items():
            if value is not None:
                self.writer.add_scalar(tag, value, step)
        self.rows.append({"global_step": step} | tags)
        if step == 0:  # the untrained network's row, which waits for the columns of the first whole one
            return
        if self.csv is None:
            self.csv = csv.DictWriter(self.file, self.rows[-1] | self.rows[0], restval="")
            self.csv.writeheader()
        self.csv.writerows(self.rows)
        self.rows.clear()
        self.returns.extend(episode[1] for episode in episodes)
        episodes.clear()
        if self.returns:
            self.summary = f"mean return {np.mean(self.returns):.1f} over the last {len(self.returns)} episodes"
        self.bar.set_postfix_str(self.summary, refresh=False)
        self.bar.update(step - self.step)
        if self.bar.disable and 10 * step // total > 10 * self.step // total and seconds > self.shown + 10:
            self.shown = seconds  # without a terminal, a line every tenth of the run, no two within 10 s
            print(f"{step} of {total} steps in {seconds:.0f} s: {self.summary}", flush=True)
        self.step = step

    def interrupt(self, number, _):
        if self.interrupted:  # the second time, perhaps amid an update; the first lets it end
            sys.exit(128 + number)
        self.interrupted = number

    def __exit__(self, kind, error, tb):
        status = "interrupted" if self.interrupted else "failed" if kind else "finished"
        self.record |= {"status": status, "error": error and str(error), "global_step": self.envs.steps}
        self.record["wall_time"] = seconds = time.perf_counter() - self.start
        self.record["final_return"] = float(np.mean(self.returns)) if self.returns else None
        self.bar.close()
        try:
            self.writer.close()
            if self.args.save_model or status != "finished":
                self.save("model.pt")
            self.write("run.json", json.dumps(self.record, indent=2).encode())
            if status == "finished":
                (self.path / "checkpoint.pt").unlink(missing_ok=True)
            self.file.close()  # and with it the lock
        except OSError as failure:
            status, error = "failed", error or failure
        who = f"{self.args.env_id} {self.args.exp_name} seed {self.args.seed} {status}: {self.summary}"
        with suppress(OSError):  # the terminal may be gone
            print(f"{who}, {self.envs.steps} steps in {seconds:.1f} s, logs in {self.path}", flush=True)
        for env in self.envs.envs:
            with suppress(Exception):  # whatever an environment does when it is closed
                env.close()
        if isinstance(error, Exception):
            if os.environ.get("ACPG_TRACEBACK"):
                raise error
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            where = "{0.filename}:{0.lineno}".format(traceback.extract_tb(error.__traceback__)[-1])
            sys.exit(f"error: at step {self.envs.steps}: {what} ({where}; ACPG_TRACEBACK=1 shows all)")
        if status == "interrupted":
            sys.exit(128 + self.interrupted)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    try:
        check_args(args)
        random.seed(args.seed)
        np.random.seed(args.seed)
        torch.manual_seed(args.seed)
        torch.set_num_threads(args.torch_threads)
        device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
        envs = Envs(args)
        agent = Agent(envs.observation_space, envs.action_space, args).to(device)
        optimizer = Adam(agent.parameters())
        run = Run(args, agent, optimizer, envs)
    except Exception as error:
        if os.environ.get("ACPG_TRACEBACK"):
            raise
        argument = "--run-dir: " * isinstance(error, OSError)
        sys.exit(f"error: {argument}{' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)
    with run:
        if args.capture_video:
            envs.envs[0] = gym.wrappers.RecordVideo(envs.envs[0], str(run.path / "videos"))
        if args.compile:
            torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad becomes part of the graph
            update = torch.compile(update, fullgraph=True, options={"cpp_wrapper": device.type == "cpu"})
        batch_size, shape = args.num_envs * args.num_steps, (args.num_steps, args.num_envs)
        num_iterations = args.total_timesteps // batch_size

        # Storage of one rollout, on the host, where the environments are: `after` is what the steps led to
        obs, after = np.zeros((2, *shape, *envs.obs.shape[1:]), dtype=envs.obs.dtype)
        logits = np.zeros((*shape, int(envs.action_space.n)), dtype=np.float32)
        actions = np.zeros(shape, dtype=np.int64)
        rewards, terminations, truncations = np.zeros((3, *shape), dtype=np.float32)
        stats = []

        (done,) = run.saved.get("loop", (0,))
        next_obs = envs.reset(np.random.default_rng((args.seed, done)))
        for iteration in range(done + 1, num_iterations + 1):
            rng = np.random.default_rng((args.seed, iteration))  # anew each time, so that twins stay paired
            lr = args.learning_rate * (1.0 - args.anneal_lr * (iteration - 1.0) / num_iterations)

            # Rollout: the maximum of logits plus Gumbel noise is a sample from their softmax
            noise = rng.gumbel(size=logits.shape)
            with torch.inference_mode():
                for t in range(args.num_steps):
                    obs[t] = next_obs
                    logits[t] = agent.logits(torch.from_numpy(obs[t]).to(device)).cpu().numpy()
                    actions[t] = (logits[t] + noise[t]).argmax(-1)
                    next_obs, rewards[t], terminations[t], truncations[t], after[t] = envs.step(actions[t])

            # Advantages, by the network that acted
            tensors = (torch.as_tensor(x, device=device).flatten(0, 1) for x in (obs, after, actions, logits))
            b_obs, b_after, b_actions, b_logits = tensors
            with torch.no_grad():
                b_logprobs = b_logits.log_softmax(-1).gather(1, b_actions.unsqueeze(1)).squeeze(1)
                values, next_values = (agent.value(x).view(shape).cpu().numpy() for x in (b_obs, b_after))
            rollout = (values, next_values, rewards, terminations, truncations)
            advantages, returns = compute_gae(*rollout, args.gamma, args.gae_lambda)
            tensors = (torch.as_tensor(x, device=device).flatten() for x in (advantages, returns, values))
            b_advantages, b_returns, b_values = tensors
            if iteration == 1 and args.diagnostics_interval:  # the untrained network
                run.log(diagnose(agent, b_obs, args.seed), 0)

            # Update
            batch = (b_obs, b_actions, b_logprobs, b_advantages, b_returns, b_values)
            before = optimizer.vector.clone()
            for _ in range(args.update_epochs):
                b_inds = torch.from_numpy(rng.permutation(batch_size)).to(device)
                for minibatch in zip(*(x[b_inds].chunk(args.num_minibatches) for x in batch), strict=True):
                    stats.append(update(agent, optimizer, args, torch.tensor(lr), *minibatch))
                if args.target_kl is not None and stats[-1]["losses/approx_kl"] > args.target_kl:
                    break
            if not torch.isfinite(optimizer.vector.sum()):
                optimizer.vector.copy_(before)
                why = "model.pt has the weights before it; lower --learning-rate, look for nan rewards"
                sys.exit(f"error: non-finite loss at update {iteration} (step {envs.steps}): {why}")

            # Logs: losses are means since the last entry, explained variance and collapse of the last rollout
            last = iteration == num_iterations or run.interrupted
            checkpoint = args.checkpoint_interval and iteration % args.checkpoint_interval == 0
            if iteration % args.log_interval and not checkpoint and not last:
                continue
            tags = {name: torch.stack([s[name] for s in stats]).mean().item() for name in stats[0]}
            explained_variance = 1 - (b_returns - b_values).var(correction=0) / b_returns.var(correction=0)
            tags |= {"losses/explained_variance": explained_variance.item(), "charts/learning_rate": lr}
            if args.diagnostics_interval and (last or iteration % args.diagnostics_interval < args.log_interval):
                tags |= diagnose(agent, b_obs, args.seed)
            run.log(tags, envs.steps)
            stats.clear()
            if last:
                break
            if checkpoint:  # with new episodes in all environments, whose state --resume cannot restore
                run.save("checkpoint.pt", iteration)
                next_obs = envs.reset(np.random.default_rng((args.seed, iteration)))
