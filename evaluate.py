"""Evaluate a checkpoint: returns, collapse on fixed states, and a picture of the collapse.

    python ppo_acpg.py --env-id LunarLander-v3 --learning-rate 2e-3 --save-model
    python evaluate.py runs/LunarLander-v3__ppo_acpg__1
    python evaluate.py runs/LunarLander-v3__ppo_acpg__1 --episodes 100 --video
    python evaluate.py runs/CartPole-v1__ppo_acpg__1 --states states.npy      # the same states for every checkpoint

Plays seeded episodes greedily and by sampling, computes the collapse metrics on a fixed set of distinct states,
labelled by the optimal action where the environment has a transition table and else by the greedy one, and draws
class means, weights and activations in the span of the weights. Reads the checkpoints of all six scripts, as data
only.
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from scipy import stats

SCRIPTS = [f"{algorithm}_{arm}" for algorithm in ("ppo", "a2c", "reinforce", "trpo") for arm in ("baseline", "acpg")]


@dataclass
class Args:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run made with --save-model, or its model.pt, or a checkpoint.pt"""
    episodes: int = 20
    """episodes played greedily, and as many by sampling"""
    seed: int = 1000
    """seed of the episodes, of the sampling and of the evaluation states"""
    states: str = "random"
    """evaluation states: `random`, those a uniform random policy meets; `own`, those this policy meets; or a .npy
    file"""
    num_states: int = 2000
    """states to collect before repeated ones are dropped; where there is a transition table, all its states are
    taken"""
    max_steps: int = 100_000
    """steps after which an episode that has not ended is cut, its return so far being counted"""
    env_id: str = ""
    """the environment, to be confirmed where its id names a module, which loading it runs"""
    out: str = ""
    """folder for evaluation.json, collapse.png and videos; empty means the run's"""
    video: bool = False
    """record one greedy episode"""
    animate: bool = False
    """draw collapse.gif: the activations at each checkpoint of a run made with --keep-checkpoints"""


def fail(message):
    sys.exit(f"error: {message}")


def check_numbers(args, **bounds):
    """End in one line if an option is not a number between its bounds (low, high), or is an empty list.

    Every option with numbers needs bounds; None, text and flags pass.
    """
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, list) and not value:
            fail(f"{flag} needs at least one value")
        for x in value if isinstance(value, list) else [value]:
            if type(x) in (int, float) and not bounds[name][0] <= x <= bounds[name][1]:
                fail(f"{flag} must lie between {bounds[name][0]} and {bounds[name][1]}, got {x}")


def check_run(module, run):
    """Raise ValueError or TypeError unless `run` are arguments of the script `module`, of the right types and sizes."""
    for name, kind in get_type_hints(module.Args).items():
        value = run.get(name, getattr(module.Args, name, None))  # what older checkpoints lack has its default
        allowed = get_args(kind) if get_origin(kind) is Literal else ()
        if (
            allowed
            and value not in allowed
            or not allowed
            and not isinstance(value, kind | int if kind is float else kind)
        ):
            raise ValueError(f"{name} is {str(value)[:50]}")
    needless = {"compile": False, "capture_video": False, "track": False}  # for which packages may be missing
    module.check_args(argparse.Namespace(**(vars(module.Args()) | run | needless)))


def load(args):
    """(agent, arguments of the run, environment) from a checkpoint; anything else than one ends in one line, and runs
    nothing.

    Only tensors and plain values are unpickled (torch.load's weights_only). An environment id that names a module has
    to be confirmed by --env-id, since making it imports the module.
    """
    path = args.run / "model.pt" if args.run.is_dir() else args.run
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("ignore")
            if damaged := archive.testzip():  # torch does not look at the checksums
                fail(f"{path} is damaged ({damaged}); take another checkpoint")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path} does not exist; train with --save-model")
    except Exception as error:  # truncated, foreign, or with code in it
        fail(f"{path} is no checkpoint of these scripts ({type(error).__name__}); train with --save-model")
    try:
        state, run = checkpoint["agent"], checkpoint["args"]
        env_id, kwargs, limit = run["env_id"], json.loads(run["env_kwargs"]), run["max_episode_steps"]
        script = checkpoint["script"]
        finite = all(bool(tensor.isfinite().all()) for tensor in state.values())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fail(f"{path} is no checkpoint of these scripts ({type(error).__name__}: {error})")
    if not isinstance(script, str) or script not in SCRIPTS:
        fail(f"{path} is no checkpoint of these scripts (script: {str(script)[:50]}); train with --save-model")
    if not finite:
        fail(f"{path} holds weights that are not finite; take another checkpoint")
    if not isinstance(env_id, str) or (":" in env_id and args.env_id != env_id):
        fail(
            f"{path} names the environment {env_id}, whose module would be imported; confirm it with --env-id {env_id}"
        )
    module = importlib.import_module(script)
    try:
        check_run(module, run)
    except (ValueError, TypeError, AttributeError) as error:
        fail(f"{path} has arguments that {script}.py does not take: {' '.join(str(error).split())[:200]}")
    sys.path.append(os.getcwd())  # where the scripts look for modules, too
    video = {"render_mode": "rgb_array"} if args.video else {}  # which not every environment takes
    try:
        env = module.adapt(gym.make(env_id, max_episode_steps=limit, **kwargs, **video))
    except Exception as error:
        fail(f"{path}: its environment {env_id} cannot be made: {' '.join(str(error).split())}")
    try:
        agent = module.Agent(env.observation_space, env.action_space, argparse.Namespace(**(vars(module.Args()) | run)))
        agent.load_state_dict(state)
    except Exception as error:
        fail(f"{path} does not fit {env_id}: {' '.join(str(error).split())[:200]}")
    return agent, run, env


@torch.no_grad()
def play(agent, env, episodes, seed, greedy, max_steps=100_000, keep=True):
    """(returns, observations met, episodes cut after `max_steps`) of seeded episodes: by the agent, greedy or sampling,
    or without one by random actions. Observations are kept only where asked for."""
    rng, start = np.random.default_rng(seed), int(env.action_space.start)
    returns, met, cut = [], [], 0
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        total, over, steps = 0.0, False, 0
        while not over and steps < max_steps:
            obs, steps = np.asarray(obs, dtype=np.float32), steps + 1
            if keep:
                met.append(obs.copy())
            if agent is None:
                action = int(rng.integers(env.action_space.n))
            else:
                logits = agent.logits(torch.as_tensor(obs).unsqueeze(0)).squeeze(0).numpy()
                action = int((logits if greedy else logits + rng.gumbel(size=logits.shape)).argmax())
            obs, reward, terminated, truncated, _ = env.step(action + start)
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
        cut += not over
    return np.array(returns), np.stack(met) if met else None, cut


def transition_tables(table, gamma):
    """(moves (S, A, S), rewards (S, A)) of a transition table: gamma times the chance of going on, and the mean
    reward."""
    states, actions = len(table), len(table[0])
    moves, rewards = np.zeros((states, actions, states)), np.zeros((states, actions))
    for s in range(states):
        for a in range(actions):
            for probability, following, reward, terminated in table[s][a]:
                rewards[s, a] += probability * reward
                if not terminated:
                    moves[s, a, following] += gamma * probability
    return moves, rewards


def optimal_values(moves, rewards, tolerance=1e-12):
    """Q* (S, A) by value iteration, to within `tolerance`."""
    q = np.zeros_like(rewards)
    while True:
        new = rewards + moves @ q.max(1)
        if np.abs(new - q).max() < tolerance:
            return new
        q = new


def optimal_actions(q, tolerance=1e-8):
    """(actions (S,), unique (S,)): the optimal action, and whether no other one comes within `tolerance` of it."""
    return q.argmax(1), (q >= q.max(1, keepdims=True) - tolerance).sum(1) == 1


def labelled_states(args, agent, run, env):
    """(observations, labels, kind): the evaluation states, and optimal labels (integers from 0) where they are known.

    With a transition table the states are those reachable from the start, without terminal ones and without ties.
    """
    table = getattr(env.unwrapped, "P", None)
    if args.states == "random" and isinstance(table, dict) and isinstance(env.observation_space, gym.spaces.Discrete):
        q = optimal_values(*transition_tables(table, run["gamma"]))
        labels, unique = optimal_actions(q)
        reached = {int(env.reset(seed=args.seed + i)[0]) for i in range(1000)}
        stack = list(reached)
        while stack:
            state = stack.pop()
            following = {s for a in table[state] for p, s, _, over in table[state][a] if p > 0 and not over}
            stack += following - reached
            reached |= following
        states = np.array([s for s in sorted(reached) if unique[s]])
        return (
            states.astype(np.float32),
            labels[states],
            f"optimal, {len(reached) - len(states)} tied of {len(reached)} reachable left out",
        )
    if args.states in ("random", "own"):
        met = np.zeros((0, *np.shape(env.observation_space.sample())), dtype=np.float32)
        for i in range(1000):
            if len(met) >= args.num_states:
                break
            player = agent if args.states == "own" else None
            more = play(player, env, 1, args.seed + i, greedy=False, max_steps=args.num_states)[1]
            met = np.concatenate([met, more])
        met = met[: args.num_states]
    else:
        try:
            met = np.load(args.states, allow_pickle=False).astype(np.float32)
        except (OSError, ValueError) as error:
            fail(f"--states {args.states} cannot be read as an array of observations ({error}); or use random or own")
        if met.shape[1:] != np.shape(env.observation_space.sample()) or not len(met):
            fail(f"--states {args.states} has shape {met.shape}, which does not fit {run['env_id']}")
        space = env.observation_space
        low, high = (
            (space.low, space.high) if isinstance(space, gym.spaces.Box) else (space.start, space.start + space.n - 1)
        )
        if not np.isfinite(met).all() or not ((met >= low) & (met <= high)).all():
            fail(f"--states {args.states} holds states that are not finite or outside {run['env_id']}'s {space}")
    return np.unique(met, axis=0), None, "greedy, which flatters: compare with the null"


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def project(weight, num=3):
    """An orthonormal basis (d, n) of the span of the centred weights (K, d), n = min(K - 1, num): the ETF's own
    space."""
    centred = weight - weight.mean(0)
    return torch.linalg.svd(centred, full_matrices=False).Vh[: min(len(weight) - 1, num)].T


def draw(features, labels, weight, title, path):
    """Activations, class means and weights on the line (K = 2), plane (3) or in the space (4) of the weights."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    basis = project(weight)
    n = basis.shape[1]
    centre = torch.stack([features[labels == k].mean(0) for k in labels.unique()]).mean(0)
    points, rows = ((features - centre) @ basis).numpy(), ((weight - weight.mean(0)) @ basis).numpy()
    reach = np.linalg.norm(points, axis=1).max() or 1.0
    rows = rows / np.linalg.norm(rows, axis=1).max() * reach
    figure = plt.figure(figsize=(7, 3.2 if n == 1 else 6.5), layout="constrained")
    axes = figure.add_subplot(projection="3d" if n == 3 else None)
    rng = np.random.default_rng(0)
    for k in range(len(weight)):
        own, colour = points[labels.numpy() == k], COLOURS[k % len(COLOURS)]
        spread = rng.uniform(-1, 1, size=(len(own), 1)) if n == 1 else np.zeros((len(own), 0))
        axes.scatter(*np.hstack([own, spread]).T, s=6, alpha=0.35, color=colour)
        for place, marker, size in ((own.mean(0) if len(own) else None, "o", 110), (rows[k], "^", 130)):
            if place is not None:
                mark = {"marker": marker, "s": size, "color": colour, "edgecolor": "black", "zorder": 5}
                axes.scatter(*([x] for x in (*place, *([0.0] if n == 1 else []))), **mark)
        line = np.stack([np.zeros(n), rows[k]])
        axes.plot(
            *np.hstack([line, np.zeros((2, 1))]).T if n == 1 else line.T, color=colour, linewidth=1, label=f"action {k}"
        )
    if n == 1:
        axes.set_yticks([])
    else:
        axes.set_aspect("equal")
    axes.set_title(title + "\ndots: activations; circles: class means; triangles: weights, scaled", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_cosines(features, labels, weight, title, path):
    """Cosines between the centred class means, and between the weights of the same actions: for K > 4."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    classes = labels.unique()
    means = torch.stack([features[labels == k].mean(0) for k in classes])
    figure, grid = plt.subplots(1, 2, figsize=(10, 5.2), layout="constrained", sharey=True)
    for axes, name, rows in zip(grid, ("class means", "weights"), (means, weight[classes]), strict=True):
        rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
        image = axes.imshow((rows @ rows.T).numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        places = range(0, len(classes), math.ceil(len(classes) / 18))
        axes.set_xticks(places, [int(classes[k]) for k in places], fontsize=8)
        axes.set_yticks(places, [int(classes[k]) for k in places], fontsize=8)
        axes.set_xlabel(f"{name}, by action")
    figure.colorbar(image, ax=grid, shrink=0.8, label="cosine")
    off = f"a simplex ETF has {-1 / (len(classes) - 1):.2f} off the diagonal"
    figure.suptitle(f"{title}\n{len(classes)} of {len(weight)} actions occur; {off}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def animate(args, run, obs, labels, weight, path):
    """A GIF of the activations of `obs` (N, ...) in the plane of the centred weights, one frame a kept checkpoint."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation, PillowWriter

    frames, basis = list(read_checkpoints(args, torch.as_tensor(obs))), project(weight, 2)
    rows = ((weight - weight.mean(0)) @ basis).numpy()
    rows = np.hstack([rows, np.zeros((len(rows), 2 - rows.shape[1]))]) / np.linalg.norm(rows, axis=1).max()
    figure, axes = plt.subplots(figsize=(4.2, 4.7))
    figure.subplots_adjust(left=0.03, right=0.97, bottom=0.03, top=0.87)
    axes.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal", xticks=[], yticks=[])
    for k, row in enumerate(rows):
        axes.annotate("", row, (0, 0), arrowprops={"arrowstyle": "->", "color": COLOURS[k % len(COLOURS)]})
    dots = axes.scatter(*np.zeros((2, len(labels))), s=3, c=[COLOURS[k % len(COLOURS)] for k in labels.tolist()])

    def show(number):
        step, mean, features = frames[number]
        points = ((features - features.mean(0)) @ basis).numpy()
        points = np.hstack([points, np.zeros((len(points), 2 - points.shape[1]))])
        dots.set_offsets(points / (np.linalg.norm(points, axis=1).max() or 1.0))
        axes.set_title(f"{run['env_id']} {run['exp_name']}\nstep {step:,}, mean return {mean:.0f}", fontsize=10)

    order = [*range(len(frames)), *[len(frames) - 1] * 10]  # the last one stays for a while
    FuncAnimation(figure, show, order).save(path, writer=PillowWriter(fps=8), dpi=80)
    plt.close(figure)


@torch.no_grad()
def read_checkpoints(args, obs, most=80):
    """(step, mean return, features of `obs`) of at most so many of the run's kept checkpoints, in order of steps."""
    paths = sorted(args.run.glob("checkpoints/*.pt"), key=lambda path: int(path.stem) if path.stem.isdecimal() else 0)
    if len(paths) < 2:
        fail(f"{args.run} has no checkpoints; train with --checkpoint-interval N --keep-checkpoints")
    for path in [paths[k] for k in np.unique(np.linspace(0, len(paths) - 1, most).round().astype(int))]:
        agent, _, env = load(dataclasses.replace(args, run=path, video=False))
        env.close()
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        returns = checkpoint["returns"] or [math.nan]
        yield checkpoint["step"], np.mean(returns), agent.features(obs)


def main():
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    check_numbers(args, episodes=(2, 10**6), seed=(0, 2**31), num_states=(2, 10**7), max_steps=(1, 10**9))
    torch.set_num_threads(1)
    agent, run, env = load(args)
    out = Path(args.out) if args.out else (args.run if args.run.is_dir() else args.run.parent)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {out} cannot be written: {error.strerror}")
    result = {"env_id": run["env_id"], "episodes": args.episodes, "seed": args.seed}
    for name, greedy in (("greedy", True), ("sampled", False)):
        returns, _, cut = play(agent, env, args.episodes, args.seed, greedy, args.max_steps, keep=False)
        low, high = returns[:2]
        if np.ptp(returns):
            low, high = stats.t.interval(0.95, len(returns) - 1, returns.mean(), stats.sem(returns))
        result[name] = {"mean": returns.mean(), "low": low, "high": high, "cut": cut, "returns": returns.tolist()}
        interval = f"[{low:.1f}, {high:.1f}], 95 % interval over {args.episodes} episodes"
        print(f"{name:8} mean return {returns.mean():.1f} {interval}")
        if cut:
            print(f"{cut} of them had not ended after --max-steps {args.max_steps}: their returns so far are counted")
    obs, labels, kind = labelled_states(args, agent, run, env)
    with torch.no_grad():
        features = agent.features(torch.as_tensor(obs))
        greedy = agent.logits(torch.as_tensor(obs)).argmax(-1)
    labels = greedy if labels is None else torch.as_tensor(labels)
    layer, collapse_metrics = agent.action_layer, sys.modules[type(agent).__module__].collapse_metrics
    permuted = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed))]
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    metrics = collapse_metrics(features, labels, weight, bias)
    null = collapse_metrics(features, permuted, weight, bias)
    agreement = (greedy == labels).double().mean().item()
    print(
        f"collapse on {len(obs)} states, labels: {kind}; greedy action agrees with the label in {100 * agreement:.1f} %"
    )
    print(f"{'metric':24}{'value':>10}{'labels permuted':>18}")
    for name, value in metrics.items():
        print(f"{name:24}{value:10.4g}{null[name]:18.4g}")
    result |= {"states": len(obs), "labels": kind, "agreement": agreement, "collapse": metrics, "collapse_null": null}
    plain = lambda x: None if isinstance(x, float) and not math.isfinite(x) else x  # noqa: E731
    for group in ("collapse", "collapse_null"):
        result[group] = {name: plain(value) for name, value in result[group].items()}
    (out / "evaluation.json").write_text(json.dumps(result, indent=1, default=float) + "\n")
    if metrics["classes_present"] >= 2:
        picture = draw if len(weight) <= 4 else draw_cosines
        picture(features, labels, weight, f"{run['env_id']} {run['exp_name']} seed {run['seed']}", out / "collapse.png")
    if args.animate:
        animate(args, run, obs, labels, weight, out / "collapse.gif")
    if args.video:
        recorded = gym.wrappers.RecordVideo(
            env, str(out / "videos"), episode_trigger=lambda _: True, name_prefix="evaluation"
        )
        play(agent, recorded, 1, args.seed, greedy=True, max_steps=args.max_steps, keep=False)
        recorded.close()
    env.close()
    print(f"written to {out}")


if __name__ == "__main__":
    main()
