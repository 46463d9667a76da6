"""PPO with a learnable action-selection layer: the twin that `ppo_acpg.py` is compared with.

    python ppo_baseline.py --env-id CartPole-v1
    python ppo_baseline.py --env-id LunarLander-v3 --learning-rate 2e-3 --seed 2
    python ppo_baseline.py --env-id CliffWalking-v1 --max-episode-steps 200
    python ppo_baseline.py --env-id my_package:MyEnv-v0 --env-kwargs '{"size": 5}'
    tensorboard --logdir runs

Proximal Policy Optimization (Schulman et al. 2017) for Discrete actions and flat Box or Discrete observations, with
the defaults of CleanRL's ppo.py. docs/metrics.md explains every number this script logs; `diff` it with
`ppo_acpg.py` to see the method.
"""

import csv
import hashlib
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.optim.adam import adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-5, "weight_decay": 0.0, "amsgrad": False, "maximize": False, "fused": True}


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of this experiment, part of the run folder's name"""
    seed: int = 1
    """seed of the experiment: weights, environments, action noise and shuffling all derive from it"""
    cuda: bool = True
    """run on the GPU if there is one (networks this small are faster on the CPU)"""
    torch_threads: int = 1
    """CPU threads of torch; more only slow networks of this size down"""
    compile: bool = False
    """compile the loss with torch.compile (needs a C++ compiler; pays off in long runs)"""
    track: bool = False
    """also log to Weights & Biases (needs `pip install wandb`)"""
    wandb_project_name: str = "acpg"
    """the Weights & Biases project to log to"""
    wandb_entity: str | None = None
    """the Weights & Biases entity (team) to log to"""
    capture_video: bool = False
    """record videos of environment 0 to the run folder (needs `pip install moviepy`)"""
    save_model: bool = False
    """save the trained agent as model.pt in the run folder"""
    run_dir: str = ""
    """folder for this run's files; empty means runs/<env-id>__<exp-name>__<seed>"""
    diagnostics_interval: int = 20
    """updates between two measurements of collapse/*; 0 turns them off"""

    # Algorithm specific arguments
    env_id: str = "CartPole-v1"
    """id of the environment; `module:EnvId-v0` imports module first"""
    env_kwargs: str = "{}"
    """keyword arguments of the environment, as JSON"""
    max_episode_steps: int | None = None
    """truncate episodes after so many steps, instead of the environment's own limit"""
    total_timesteps: int = 500000
    """environment steps to train for, all environments together"""
    learning_rate: float = 2.5e-4
    """learning rate of the optimiser"""
    num_envs: int = 4
    """environments stepped side by side"""
    num_steps: int = 128
    """steps in each environment per rollout"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to zero over the run"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation"""
    num_minibatches: int = 4
    """minibatches per epoch"""
    update_epochs: int = 4
    """passes over each rollout"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    clip_coef: float = 0.2
    """how far the probability ratio may move before its surrogate is clipped"""
    clip_vloss: bool = True
    """clip the value loss too, by the same coefficient"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss (which is half the mean squared error)"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient, above which it is scaled down"""
    target_kl: float | None = None
    """end an update's epochs once the approximate KL divergence exceeds this"""
    feature_dim: int = 64
    """width of the actor's last hidden layer, the input of the action-selection layer"""

    # to be filled in runtime
    batch_size: tyro.conf.Suppress[int] = field(default=0)
    """num_envs * num_steps"""
    minibatch_size: tyro.conf.Suppress[int] = field(default=0)
    """batch_size / num_minibatches"""
    num_iterations: tyro.conf.Suppress[int] = field(default=0)
    """total_timesteps // batch_size"""


def check_args(args):
    """Fill in the derived sizes. Raises ValueError, naming the argument, for values that can't work."""
    counts = ("total_timesteps", "num_envs", "num_steps", "num_minibatches", "update_epochs", "feature_dim")
    for name, least in [*((count, 1) for count in counts), ("torch_threads", 1), ("seed", 0), ("diagnostics_interval", 0)]:
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if args.max_episode_steps is not None and args.max_episode_steps < 1:
        raise ValueError(f"--max-episode-steps must be at least 1, got {args.max_episode_steps}")
    for name in ("learning_rate", "max_grad_norm", "clip_coef"):
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} must lie between 0 and 1, got {getattr(args, name)}")
    args.batch_size = args.num_envs * args.num_steps
    if args.batch_size % args.num_minibatches:
        raise ValueError(
            f"--num-minibatches {args.num_minibatches} does not divide the batch of {args.batch_size} steps "
            f"(--num-envs {args.num_envs} x --num-steps {args.num_steps}); choose one that does"
        )
    args.minibatch_size = args.batch_size // args.num_minibatches
    if args.compile and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        raise ValueError("--compile needs a C++ compiler (g++ or clang++); install one or drop --compile")
    if args.norm_adv and args.minibatch_size < 2:
        raise ValueError("--norm-adv needs minibatches of at least 2 steps; lower --num-minibatches or use --no-norm-adv")
    args.num_iterations = args.total_timesteps // args.batch_size
    if args.num_iterations < 1:
        raise ValueError(
            f"--total-timesteps {args.total_timesteps} is below one batch of {args.batch_size} steps "
            f"(--num-envs {args.num_envs} x --num-steps {args.num_steps}); raise it or shrink the batch"
        )


def make_env(args, index, video_dir=None):
    """Return a function that builds environment `index`; environment 0 records to `video_dir` if that is given."""

    def thunk():
        record = video_dir is not None and index == 0
        kwargs = json.loads(args.env_kwargs) | ({"render_mode": "rgb_array"} if record else {})
        unchecked = index > 0  # gymnasium's checks of the first steps slow down all that follow; one environment has them
        env = gym.make(args.env_id, max_episode_steps=args.max_episode_steps, disable_env_checker=unchecked, **kwargs)
        return gym.wrappers.RecordVideo(env, str(video_dir)) if record else env

    return thunk


def check_env(args):
    """Build one environment to learn its spaces, before anything is written.

    Returns (observation_space, action_space) of a single environment. Raises ValueError in one line for an unknown
    or uninstalled environment, wrong keyword arguments, and spaces these scripts don't support.
    """
    try:
        kwargs = json.loads(args.env_kwargs)
    except json.JSONDecodeError as error:
        raise ValueError(f"--env-kwargs is not JSON ({error}): {args.env_kwargs!r}; try '{{\"name\": 1}}'") from error
    if not isinstance(kwargs, dict):
        raise ValueError(f"--env-kwargs must be a JSON object such as '{{\"name\": 1}}', got {args.env_kwargs!r}")
    try:
        env = make_env(args, 0)()
    except Exception as error:  # anything can go wrong in somebody else's environment
        hint = ""
        if isinstance(error, ModuleNotFoundError) and error.name:
            hint = f"; pip install {error.name}"
        elif isinstance(error, gym.error.NamespaceNotFound):
            hint = " pip install it and put its module in front, as in ale_py:ALE/Pong-v5"
        raise ValueError(f"--env-id {args.env_id} cannot be made: {' '.join(str(error).split())}{hint}") from error
    observation_space, action_space = env.observation_space, env.action_space
    env.close()
    if not isinstance(action_space, gym.spaces.Discrete):
        raise ValueError(f"--env-id {args.env_id} has actions {action_space}; choose an environment with Discrete actions")
    if not (
        isinstance(observation_space, gym.spaces.Discrete)
        or (isinstance(observation_space, gym.spaces.Box) and len(observation_space.shape) == 1)
    ):
        raise ValueError(
            f"--env-id {args.env_id} has observations {observation_space}; choose an environment with flat Box or "
            "Discrete observations, or wrap it with gymnasium's FlattenObservation"
        )
    return observation_space, action_space


def make_generator(seed, stream):
    """torch.Generator of its own for one use of randomness, so that uses don't disturb each other and twins stay paired."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, stream)).generate_state(1)[0]))


def layer_init(layer, std=2**0.5, generator=None):
    """Orthogonal weights with gain `std` and zero bias."""
    nn.init.orthogonal_(layer.weight, std, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def linear(layer, x):
    """W x + b of an nn.Linear, without the overhead of calling a module, which at these sizes is as large as the product."""
    return nn.functional.linear(x, layer.weight, layer.bias)


class Agent(nn.Module):
    """Actor and critic with separate trunks.

    Observations are batches of the environment's own, (B, obs_dim) for a Box and (B,) for a Discrete space, which is
    encoded one-hot. `features` (B, feature_dim) is what enters the action-selection layer, `logits` (B, num_actions)
    what leaves it, `value` is (B,).
    """

    def __init__(self, observation_space, action_space, args):
        super().__init__()
        self.observation_space = observation_space
        obs_dim, num_actions = gym.spaces.flatdim(observation_space), int(action_space.n)
        self.critic_hidden1 = layer_init(nn.Linear(obs_dim, 64))
        self.critic_hidden2 = layer_init(nn.Linear(64, 64))
        self.critic_out = layer_init(nn.Linear(64, 1), std=1.0)
        self.actor_hidden1 = layer_init(nn.Linear(obs_dim, 64))
        self.actor_hidden2 = layer_init(nn.Linear(64, args.feature_dim))
        generator = make_generator(args.seed, stream=1)
        self.action_layer = layer_init(nn.Linear(args.feature_dim, num_actions), std=0.01, generator=generator)

    def encode(self, obs):
        if isinstance(self.observation_space, gym.spaces.Discrete):
            index = obs.long() - int(self.observation_space.start)
            return nn.functional.one_hot(index, int(self.observation_space.n)).float()
        return obs.float()

    def features(self, obs):
        h = linear(self.actor_hidden1, self.encode(obs)).tanh()
        return linear(self.actor_hidden2, h).tanh()

    def logits(self, obs):
        return linear(self.action_layer, self.features(obs))

    def value(self, obs):
        h = linear(self.critic_hidden1, self.encode(obs)).tanh()
        return linear(self.critic_out, linear(self.critic_hidden2, h).tanh()).squeeze(-1)


def flatten_parameters(module):
    """Move all parameters of `module` into one vector, and their gradients into another, keeping the module's own as views.

    Returns the vector, to be optimised in the parameters' stead: clipping, the optimiser and the snapshot then cost a few
    kernels each instead of a few per tensor. The module must be on its device already.
    """
    parameters = list(module.parameters())
    flat = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach().clone())
    flat.grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, data, grad in zip(parameters, flat.data.split(sizes), flat.grad.split(sizes), strict=True):
        parameter.data, parameter.grad = data.view_as(parameter), grad.view_as(parameter)
    for part in module.modules():  # so that attributes are found at once, without nn.Module's slow __getattr__
        vars(part).update(part._parameters | part._modules | part._buffers)
    return flat


def compute_gae(values, next_values, rewards, terminations, truncations, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16) over rollouts in which episodes may end.

    All arrays are (num_steps, num_envs) and speak of the same step t: `values` is V(s_t), `next_values` V of the state
    that the step led to (where the episode was truncated, its own last state and not the reset that follows), `rewards`
    what the step paid, `terminations` and `truncations` 1 where the step ended the episode. Termination makes the next
    state worth zero; either cuts the chain. Returns (advantages, returns), the returns being the targets for V(s_t).
    """
    deltas = rewards + gamma * next_values * (1.0 - terminations) - values
    decays = gamma * gae_lambda * (1.0 - np.maximum(terminations, truncations))
    advantages, advantage = np.zeros_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + decays[t] * advantage
    return advantages, advantages + values


def ppo_loss(agent, args, mb_obs, mb_actions, mb_logprobs, mb_advantages, mb_returns, mb_values):
    """PPO's clipped loss of one minibatch (Schulman et al. 2017, eq. 7 and 9), all arguments (B,) but mb_obs.

    Returns (loss, (value_loss, policy_loss, entropy), logratio (B,)); all but the loss are detached.
    """
    logprobs = agent.logits(mb_obs).log_softmax(-1)
    entropy = (logprobs.exp() * logprobs).sum() / -len(mb_obs)
    logratio = logprobs.gather(1, mb_actions.unsqueeze(1)).squeeze(1) - mb_logprobs
    ratio = logratio.exp()
    if args.norm_adv:
        std, mean = torch.std_mean(mb_advantages)
        mb_advantages = (mb_advantages - mean) / (std + 1e-8)
    # min(A ratio, A clip(ratio)): where the clipped ratio counts, it makes the constant A + clip_coef |A|
    bound = mb_advantages.add(mb_advantages.abs(), alpha=args.clip_coef)
    pg_loss = -torch.min(mb_advantages * ratio, bound).mean()
    newvalue = agent.value(mb_obs)
    if args.clip_vloss:  # of the value and the clipped value the one with the larger error; clipped, it is a constant
        with torch.no_grad():
            clipped = newvalue.clamp(mb_values - args.clip_coef, mb_values + args.clip_coef)
            worse = (clipped - mb_returns).abs() > (newvalue - mb_returns).abs()
        newvalue = torch.where(worse, clipped, newvalue)
    v_loss = 0.5 * nn.functional.mse_loss(newvalue, mb_returns)
    loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
    return loss, (v_loss.detach(), pg_loss.detach(), entropy.detach()), logratio.detach()


COLLAPSE_METRICS = (
    *("nc1", "variability_quotient", "cdnv", "alignment", "ncc_agreement"),
    *("means_equinorm", "means_equiangularity", "means_max_angle"),
    *("weights_equinorm", "weights_equiangularity", "weights_max_angle"),
    *("etf_error", "self_duality", "mean_weight_cosine", "classes_present"),
)


def frame_geometry(vectors):
    """How far K centred vectors (K, d) are from a simplex ETF: (equinorm, equiangularity, max_angle), 0 for an ETF.

    std/mean of the norms, std of the pairwise cosines, and mean |cosine + 1/(K-1)| (Papyan, Han and Donoho 2020).
    """
    norms = vectors.norm(dim=1)
    cosines = (vectors @ vectors.T) / torch.outer(norms, norms)
    cosines = cosines[~torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)]
    max_angle = (cosines + 1 / (len(vectors) - 1)).abs().mean()
    return norms.std(correction=0) / norms.mean(), cosines.std(correction=0), max_angle


def collapse_metrics(features, actions, weight, bias=None):
    """How far `features` (N, d) have collapsed with respect to `actions` (N,) and the action-selection layer.

    `actions` (integers) are the labels: true optimal actions where they are known, else the policy's greedy ones, which
    flatter. `weight` (K, d) and `bias` (K,) are the layer's. Returns a float for every name in COLLAPSE_METRICS, NaN where
    a metric is undefined. Formulas and sources are in docs/metrics.md: NC1 to NC4 of Papyan, Han and Donoho (2020), CDNV
    of Galanti et al. (2022), the quotient of Tirer et al. (2023), the ETF error of Zhu et al. (2021).
    The class means are centred on their unweighted mean, and so is the weight over the classes present; a class
    without samples takes no part; a class with one sample has no variance and takes no part in the first three metrics.
    """
    classes, labels, counts = actions.unique(return_inverse=True, return_counts=True)
    num_classes = len(classes)
    if num_classes < 2:
        return dict.fromkeys(COLLAPSE_METRICS, math.nan) | {"classes_present": float(num_classes)}
    features, weight = features.double(), weight.double()
    chosen = nn.functional.linear(features, weight, None if bias is None else bias.double()).argmax(1)
    h = features - features[0]  # every metric but `chosen` ignores a shift; features all alike become exactly zero
    members = nn.functional.one_hot(labels).to(h.dtype).T / counts[:, None]  # (classes, N): averages over each class
    means = members @ h
    centre = means.mean(0)
    centred = means - centre
    deviations = h - means[labels]

    # AC2, variability, over the classes that have a variance
    variances = members @ deviations.square().sum(1)
    several = counts >= 2
    nc1 = quotient = cdnv = means.new_tensor(math.nan)
    if several.sum() >= 2:
        between = means[several] - means[several].mean(0)
        within_trace = (counts * variances)[several].sum() / counts[several].sum()
        quotient = within_trace / (between.square().sum() / len(between))
        _, scales, axes = torch.linalg.svd(between, full_matrices=False)
        rank = int((scales[: len(between) - 1] > scales[0] * max(between.shape) * torch.finfo(h.dtype).eps).sum())
        if rank:
            nc1 = ((deviations[several[labels]] @ axes[:rank].T) / scales[:rank]).square().sum(1).mean()
        i, j = torch.triu_indices(len(between), len(between), 1, device=h.device)
        cdnv = ((variances[several][i] + variances[several][j]) / (2 * (between[i] - between[j]).square().sum(1))).mean()

    # AC1, alignment of each activation with its class mean
    shifted, target = h - centre, centred[labels]
    alignment = ((shifted * target).sum(1) / (shifted.norm(dim=1) * target.norm(dim=1))).mean()
    agreement = (classes[torch.cdist(h, means).argmin(1)] == chosen).double().mean()

    # AC3, the frame of the class means, that of the weights, and how they fit
    weight = weight[classes] - weight[classes].mean(0)
    gram = centred @ centred.T
    simplex = torch.eye(num_classes, dtype=h.dtype, device=h.device) - 1 / num_classes
    etf_error = (gram / gram.norm() - simplex / math.sqrt(num_classes - 1)).norm()
    self_duality = (weight / weight.norm() - centred / centred.norm()).square().sum()
    cosine = ((centred * weight).sum(1) / (centred.norm(dim=1) * weight.norm(dim=1))).mean()
    values = torch.stack(
        (nc1, quotient, cdnv, alignment, agreement)
        + (*frame_geometry(centred), *frame_geometry(weight), etf_error, self_duality, cosine)
    ).tolist()
    values = [value if math.isfinite(value) else math.nan for value in values]
    return dict(zip(COLLAPSE_METRICS, [*values, float(num_classes)], strict=True))


@torch.no_grad()
def diagnose(agent, b_obs, generator):
    """The collapse/* and collapse_null/* tags on a batch of observations, labelled by the policy's greedy action.

    Repeated observations count once, since their identical features would fake collapse. collapse_null/* has the same
    labels permuted among the observations by `generator`: what the metrics read when features and labels are unrelated.
    """
    features = agent.features(b_obs.unique(dim=0))
    probs = agent.action_layer(features).softmax(-1)
    greedy = probs.argmax(-1)
    permuted = greedy[torch.randperm(len(greedy), generator=generator).to(greedy.device)]
    layer = agent.action_layer
    tags = {}
    for group, actions in (("collapse", greedy), ("collapse_null", permuted)):
        metrics = collapse_metrics(features, actions, layer.weight, layer.bias)
        tags |= {f"{group}/{name}": value for name, value in metrics.items()}
    frequencies = greedy.bincount(minlength=probs.shape[1]) / len(greedy)
    tags |= {f"collapse/action_frequency_{action}": value for action, value in enumerate(frequencies.tolist())}
    tags["collapse/policy_variance"] = probs.var(0, correction=0).sum().item()
    tags["collapse/feature_norm"] = features.norm(dim=1).mean().item()
    return tags


class Run:
    """The run's folder: event file, progress.csv, run.json, model.pt and videos; also the progress bar.

    `Run(args, agent)` takes over the folder, replacing an earlier run's files; a folder that holds anything but a run is
    refused with a ValueError. As a context manager it flushes and closes everything however training ends, and saves the
    agent if --save-model asks for it. Ctrl-C ends the run after the update in progress, with exit status 130; a second one
    at once.
    """

    ROWS = 200  # at most so many rows in progress.csv

    def __init__(self, args, agent):
        name = f"{args.env_id}__{args.exp_name}__{args.seed}"
        self.args, self.agent, self.path = args, agent, Path(args.run_dir or Path("runs") / re.sub(r"[^\w.=-]+", "_", name))
        script = {"argv": sys.argv[1:], "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
        self.record = {"acpg_run": 1, "status": "running"} | script | {"args": vars(args), "versions": self.versions()}
        if args.track:
            self.track()
        if args.capture_video:
            try:
                import moviepy  # noqa: F401
            except ImportError as error:
                raise ValueError("--capture-video needs MoviePy: pip install moviepy") from error
        try:
            self.take_over()
        except OSError as error:
            raise ValueError(f"--run-dir {self.path} cannot be written: {error.strerror}; choose another") from error
        self.writer = SummaryWriter(str(self.path))
        table = "\n".join(f"|{key}|{value}|" for key, value in vars(args).items())
        self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
        self.file = open(self.path / "progress.csv", "w", newline="", buffering=1)
        self.csv, self.window, self.waiting, self.grid = None, {}, [], 0
        self.returns, self.step, self.interrupted = deque(maxlen=100), 0, False
        self.bar = tqdm(total=args.total_timesteps, unit="step", unit_scale=True, disable=None)
        self.start = time.perf_counter()

    def track(self):
        try:
            import wandb

            where = {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity}
            wandb.init(**where, name=self.path.name, config=vars(self.args), sync_tensorboard=True, save_code=True)
        except ImportError as error:
            raise ValueError("--track needs Weights & Biases: pip install wandb") from error
        except Exception as error:  # not logged in, no network, no such entity
            raise ValueError(f"--track: Weights & Biases did not start: {' '.join(str(error).split())}") from error

    @staticmethod
    def versions():
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            commit = ""
        modules = {"gymnasium": gym.__version__, "numpy": np.__version__, "torch": str(torch.__version__)}
        return {"python": platform.python_version(), **modules, "git_commit": commit}

    def take_over(self):
        marker = self.path / "run.json"
        if self.path.exists() and any(self.path.iterdir()):
            try:
                ours = "acpg_run" in json.loads(marker.read_text())
            except (OSError, ValueError, TypeError):
                ours = False
            if not ours:
                raise ValueError(f"--run-dir {self.path} holds other files than a run's; choose another or empty it")
            for old in (*self.path.glob("events.out.tfevents.*"), self.path / "progress.csv", self.path / "model.pt"):
                old.unlink(missing_ok=True)
            shutil.rmtree(self.path / "videos", ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_record()

    def write_record(self):
        temporary = self.path / "run.json.tmp"
        temporary.write_text(json.dumps(self.record, indent=2) + "\n")
        temporary.replace(self.path / "run.json")

    def log(self, tags, step):
        """Write each tag's value, or the mean of a list of values, at `step`; an empty list leaves a gap."""
        summary = Summary()  # one for all tags, since add_scalar takes its time for each
        for tag, values in tags.items():
            values = values if isinstance(values, list) else [values]
            self.window.setdefault(tag, []).extend(values)
            if values:
                summary.value.add(tag=tag, simple_value=sum(values) / len(values))
        self.writer.file_writer.add_summary(summary, step)

    def advance(self, step):
        """Move the progress bar to `step` and write a row of progress.csv where its grid of steps says so."""
        self.bar.update(step - self.step)
        self.step = step
        if self.returns:
            self.bar.set_postfix_str(f"return {np.mean(self.returns):.1f}", refresh=False)
        grid = step * (self.ROWS - 1) // self.args.total_timesteps
        if grid > self.grid or step == 0:
            self.grid = grid
            self.end_row()
            if step > 0:  # which columns there are is known after the first update only
                self.write_rows()
        if self.interrupted:
            raise KeyboardInterrupt

    def end_row(self):
        row = {tag: sum(values) / len(values) if values else "" for tag, values in self.window.items()}
        self.waiting.append({"global_step": self.step} | row)
        self.window = {tag: [] for tag in self.window}

    def write_rows(self):
        if self.csv is None:
            self.csv = csv.DictWriter(self.file, list(self.waiting[-1]), restval="")
            self.csv.writeheader()
        self.csv.writerows(self.waiting)
        self.waiting = []

    def save(self):
        """Write model.pt: agent (state dict), args and versions, all of plain types."""
        state = {name: tensor.cpu().clone() for name, tensor in self.agent.state_dict().items()}
        checkpoint = {"agent": state, "args": dict(vars(self.args)), "versions": dict(self.record["versions"])}
        torch.save(checkpoint, self.path / "model.pt.tmp")
        (self.path / "model.pt.tmp").replace(self.path / "model.pt")

    def interrupt(self, *_):
        """On Ctrl-C. Raising here could leave an update half done, or the event writer waiting for itself for ever."""
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __enter__(self):
        self.old_handler = signal.signal(signal.SIGINT, self.interrupt)
        return self

    def __exit__(self, kind, error, traceback):
        seconds = time.perf_counter() - self.start
        self.bar.close()
        if any(self.window.values()):
            self.end_row()
        if self.waiting:
            self.write_rows()
        self.file.close()
        self.writer.close()
        if self.args.save_model:
            self.save()
        status = "finished" if kind is None else "interrupted" if kind is KeyboardInterrupt else "failed"
        final = float(np.mean(self.returns)) if self.returns else None
        self.record |= {"status": status, "global_step": self.step, "wall_time": seconds, "final_return": final}
        self.write_record()
        signal.signal(signal.SIGINT, self.old_handler)
        mean = f"mean return {final:.1f} over the last {len(self.returns)} episodes" if self.returns else "no episode ended"
        print(f"{self.args.env_id} {self.args.exp_name} seed {self.args.seed} {status}: {mean}, ", end="")
        print(f"{self.step} steps in {seconds:.1f} s, logs in {self.path}", flush=True)
        if kind is KeyboardInterrupt:
            raise SystemExit(130) from error


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    try:
        check_args(args)
        observation_space, action_space = check_env(args)
        random.seed(args.seed)
        np.random.seed(args.seed)
        torch.manual_seed(args.seed)
        torch.set_num_threads(args.torch_threads)
        device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
        agent = Agent(observation_space, action_space, args).to(device)
        parameters = flatten_parameters(agent)
        # torch.optim.Adam as a function, without the bookkeeping of the class, which takes longer than the step: running
        # means of gradient and square, none of their maximum, and the number of steps
        adam_state = [[torch.zeros_like(parameters.data)] for _ in range(2)] + [[], [torch.zeros((), device=device)]]
        learning_rate = args.learning_rate
        loss_function = torch.compile(ppo_loss) if args.compile else ppo_loss
        run = Run(args, agent)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)

    # SAME_STEP: the step that ends an episode also resets it, so every step is a real one.
    # copy=False: the observations live in one buffer, which is copied out before the next step.
    video_dir = run.path / "videos" if args.capture_video else None
    env_fns = [make_env(args, i, video_dir) for i in range(args.num_envs)]
    with run, closing(SyncVectorEnv(env_fns, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)) as envs:
        # A list: reset(seed=s) would give environment i seed s + i, and runs with neighbouring seeds shared environments.
        env_seeds = np.random.SeedSequence(args.seed).generate_state(args.num_envs).tolist()
        next_obs, _ = envs.reset(seed=env_seeds)
        shuffling, permuting = make_generator(args.seed, stream=2), make_generator(args.seed, stream=3)
        acting = np.random.default_rng((args.seed, 4))

        # Storage of one rollout, on the host: environments live there, and one transfer per rollout is cheaper than many.
        num_actions, action_start = int(action_space.n), int(action_space.start)
        obs = np.zeros((args.num_steps + 1, *next_obs.shape), dtype=np.float32)  # the last is where the rollout led
        actions = np.zeros((args.num_steps, args.num_envs), dtype=np.int64)
        logits = np.zeros((args.num_steps, args.num_envs, num_actions), dtype=np.float32)
        rewards, terminations, truncations = np.zeros((3, args.num_steps, args.num_envs), dtype=np.float32)
        episode_return, episode_length = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=np.int64)

        for iteration in range(1, args.num_iterations + 1):
            if args.anneal_lr:
                learning_rate = (1.0 - (iteration - 1.0) / args.num_iterations) * args.learning_rate

            # Rollout. The maximum of logits plus Gumbel noise is a sample from their softmax.
            noise = acting.gumbel(size=(args.num_steps, args.num_envs, num_actions))
            episodic_returns, episodic_lengths, final_obs, final_at = [], [], [], []
            with torch.inference_mode():
                for step in range(args.num_steps):
                    obs[step] = next_obs
                    logits[step] = agent.logits(torch.from_numpy(obs[step]).to(device)).cpu().numpy()
                    actions[step] = action = (logits[step] + noise[step]).argmax(-1)
                    next_obs, reward, termination, truncation, infos = envs.step(action + action_start)
                    rewards[step], terminations[step], truncations[step] = reward, termination, truncation
                    episode_return += reward
                    episode_length += 1
                    if "final_obs" in infos:  # an episode ended
                        for i in np.flatnonzero(termination | truncation):
                            if not termination[i]:
                                final_obs.append(infos["final_obs"][i])
                                final_at.append((step, i))
                            episodic_returns.append(float(episode_return[i]))
                            episodic_lengths.append(int(episode_length[i]))
                            episode_return[i], episode_length[i] = 0.0, 0
            global_step = iteration * args.batch_size

            # Values and log-probabilities of the whole rollout at once, by the network that acted
            obs[-1] = next_obs
            with torch.no_grad():
                b_obs, b_actions, b_logits = (torch.as_tensor(x, device=device).flatten(0, 1) for x in (obs, actions, logits))
                b_logprobs = b_logits.log_softmax(-1).gather(1, b_actions.unsqueeze(1)).squeeze(1)
                values = agent.value(b_obs).view(-1, args.num_envs).cpu().numpy()
                b_obs, values, next_values = b_obs[: args.batch_size], values[:-1], values[1:].copy()
                if final_obs:  # where an episode was truncated, the next state is its own last one
                    final_obs = torch.as_tensor(np.stack(final_obs), dtype=torch.float32, device=device)
                    next_values[tuple(np.transpose(final_at))] = agent.value(final_obs).cpu().numpy()
            ends = (terminations, truncations)
            advantages, returns = compute_gae(values, next_values, rewards, *ends, args.gamma, args.gae_lambda)
            b_advantages, b_returns, b_values = (
                torch.as_tensor(x, device=device).flatten() for x in (advantages, returns, values)
            )
            batch = (b_obs, b_actions, b_logprobs, b_advantages, b_returns, b_values)

            # Measured before the update: collapse/* at a step describes the network trained for so many steps
            if args.diagnostics_interval and (iteration - 1) % args.diagnostics_interval == 0:
                run.log(diagnose(agent, b_obs, permuting), global_step - args.batch_size)
            if iteration == 1:
                run.advance(0)

            # Update
            previous = parameters.detach().clone()
            losses, logratios = [], []
            for _ in range(args.update_epochs):
                b_inds = torch.randperm(args.batch_size, generator=shuffling).to(device)
                shuffled = [tensor.index_select(0, b_inds).split(args.minibatch_size) for tensor in batch]
                for minibatch in zip(*shuffled, strict=True):
                    parameters.grad.zero_()
                    loss, parts, logratio = loss_function(agent, args, *minibatch)
                    loss.backward()
                    parameters.grad[None].renorm_(2, 0, args.max_grad_norm)  # nn.utils.clip_grad_norm_ in one kernel
                    adam([parameters.data], [parameters.grad], *adam_state, lr=learning_rate, **ADAM)
                    losses.append(torch.stack(parts))
                    logratios.append(logratio)
                if args.target_kl is not None and (logratio.exp() - 1 - logratio).mean() > args.target_kl:
                    break

            value_loss, policy_loss, entropy = torch.stack(losses).mean(0).tolist()
            if not math.isfinite(value_loss + policy_loss + entropy + parameters.detach().sum().item()):
                parameters.data.copy_(previous)
                run.save()
                sys.exit(
                    f"error: non-finite loss or weight at update {iteration} (step {global_step}); the weights from before "
                    f"it are in {run.path / 'model.pt'}; try a lower --learning-rate, and check the rewards for nan"
                )

            logratio = torch.cat(logratios)
            ratio = logratio.exp()
            explained_variance = 1 - (b_returns - b_values).var(correction=0) / b_returns.var(correction=0)
            run.log(
                {
                    "charts/episodic_return": episodic_returns,
                    "charts/episodic_length": episodic_lengths,
                    "charts/learning_rate": learning_rate,
                    "charts/SPS": global_step / (time.perf_counter() - run.start),
                    "losses/value_loss": value_loss,
                    "losses/policy_loss": policy_loss,
                    "losses/entropy": entropy,
                    "losses/old_approx_kl": -logratio.mean().item(),
                    "losses/approx_kl": (ratio - 1 - logratio).mean().item(),
                    "losses/clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean().item(),
                    "losses/explained_variance": explained_variance.item(),
                },
                global_step,
            )
            if args.diagnostics_interval and iteration == args.num_iterations:
                run.log(diagnose(agent, b_obs, permuting), global_step)
            run.returns.extend(episodic_returns)
            run.advance(global_step)
