"""The positive control: do the metrics see Action Collapse where theory says that it must appear? Imitation.

    python studies/imitation.py                         # three tasks, 10 seeds, about an hour, to results/imitation
    python studies/imitation.py --tasks CartPole --num-seeds 2 --steps 500 --out runs/imitation/try

A PPO agent is trained on each task (runs/imitation/, kept), plays by sampling, and labels states with its greedy
action: equally many states of each action that has enough. Fresh networks, those of reinforce_acpg.py with one hidden
layer more, learn the labels by cross-entropy on all states at once, far beyond the last error, with a learned layer,
the fixed ETF or fixed random rows, on features in the ball or in tanh's box. AC1 to AC3 are measured on those states
and on held-out ones.
"""

import copy
import csv
import math
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.func import functional_call, stack_module_state, vmap

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from emergence import AC, NAMES, THRESHOLDS, interval, judge  # noqa: E402
from evaluate import Args as Evaluation  # noqa: E402
from evaluate import check_numbers, load, play  # noqa: E402
from reading import finished_record  # noqa: E402
from reinforce_acpg import Agent, collapse_metrics, layer_init  # noqa: E402
from reinforce_acpg import Args as Network  # noqa: E402
from sweep import digest  # noqa: E402

# The teachers: what ppo_baseline.py is told
TASKS = {
    "CartPole": "--env-id CartPole-v1 --total-timesteps 200000 --learning-rate 1e-3",
    "LunarLander": "--env-id LunarLander-v3 --total-timesteps 500000 --learning-rate 1e-3 --num-envs 16"
    " --num-minibatches 32 --gamma .999 --gae-lambda .98 --no-clip-vloss",
    "Pendulum51": "--env-id environments.discretized:Pendulum51-v0 --total-timesteps 200000 --learning-rate 2.5e-3"
    " --no-clip-vloss --gamma 0.9",
}
LAYERS = ("learned", "etf", "random", "random, d = K")  # all but the last with 64 features
FIRST = 1001  # seed of the networks; others were used to choose scale, depth and steps
FEATURES = ("ball", "tanh")
SCALE = 3.0  # of the logits, for features of norm 1. At 10 the gradient vanishes long before the features have met.
SETS = ("trained on", "held out")
METRICS = (*AC, "mean_weight_cosine")


@dataclass
class Args:
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    """tasks"""
    num_seeds: int = 10
    """seeds of the networks"""
    steps: int = 15_000
    """gradient steps, each on all states"""
    learning_rate: float = 3e-3
    """learning rate of Adam, annealed to zero"""
    per_action: int = 50
    """states of each action to train on, and as many held out"""
    episodes: int = 100
    """episodes that the teacher plays"""
    out: Path = ROOT / "results" / "imitation"
    """folder of tables and figure"""
    report_only: bool = False
    """only draw the figure, from curves.csv"""


def teach(task):
    """(agent, its environment) of the task's teacher, trained now unless it has been."""
    folder, flags = ROOT / "runs" / "imitation" / task, TASKS[task].split()
    record = finished_record(folder)
    if record is None or record["script_sha256"] != digest("ppo_baseline.py") or not (folder / "model.pt").exists():
        print(f"training the teacher of {task}", flush=True)
        command = [sys.executable, str(ROOT / "ppo_baseline.py"), *flags, "--save-model", "--run-dir", str(folder)]
        if subprocess.run(command, check=False, cwd=ROOT).returncode:
            sys.exit(f"error: the teacher of {task} failed, as it says above")
    agent, _, env = load(Evaluation(folder, env_id=flags[1]))
    return agent, env


def gather(agent, env, episodes, per_action):
    """(observations, labels, returns): states that the sampling agent meets, distinct, labelled by its greedy action.

    Each action that is greedy in enough of them has 2 * `per_action` states, drawn at random, the training states
    before the held-out ones. The others have none.
    """
    returns, met, _ = play(agent, env, episodes, seed=0, greedy=False)
    obs = torch.as_tensor(np.random.default_rng(0).permutation(np.unique(met, axis=0)))
    with torch.no_grad():
        greedy = agent.logits(obs).argmax(1)
    chosen = [(greedy == action).nonzero().squeeze(1)[: 2 * per_action] for action in range(env.action_space.n)]
    chosen = [states for states in chosen if len(states) == 2 * per_action]
    if len(chosen) < 2:
        sys.exit(f"error: --per-action {per_action}: fewer than two actions have twice as many states; lower it")
    inds = torch.stack(chosen)  # (classes, 2 * per_action)
    inds = torch.cat([inds[:, :per_action].flatten(), inds[:, per_action:].flatten()])
    return obs[inds], greedy[inds], returns


def students(env, layer, features, seeds):
    """A network for each seed: the agent of reinforce_acpg.py with one hidden layer more, whose action-selection layer
    is fixed or, from random rows of norm one, learned."""
    networks, dim = [], int(env.action_space.n) if layer.endswith("d = K") else 64
    for seed in range(FIRST, FIRST + seeds):
        torch.manual_seed(seed)
        own = SimpleNamespace(**vars(Network()))
        own.action_layer, own.feature_constraint, own.feature_dim = layer.partition(",")[0], features, dim
        own.etf_scale = SCALE / (math.sqrt(dim) if features == "tanh" else 1.0)
        networks.append(Agent(env.observation_space, env.action_space, own))
        for module in (nn.Tanh(), layer_init(nn.Linear(64, 64))):
            networks[-1].backbone.insert(2, module)
        if layer == "learned":
            rows = torch.randn_like(networks[-1].action_layer.weight)
            networks[-1].action_layer.weight.data = nn.functional.normalize(rows, dim=1)
    return networks


def imitate(networks, obs, labels, args):
    """Train all networks on the first half of the states, yielding (step, features, logits, weights) of all of them.
    The rows of a learned layer stay in the unit ball.

    Features (seeds, N, d), logits (seeds, N, K), weights (seeds, K, d), at about ten steps a decade.
    """
    parameters, buffers = stack_module_state(networks)
    skeleton, half = copy.deepcopy(networks[0]).to("meta"), len(obs) // 2
    skeleton.forward = lambda x: (h := skeleton.features(x), skeleton.action_layer(h))
    forward = vmap(lambda own, fixed, x: functional_call(skeleton, (own, fixed), (x,)), in_dims=(0, 0, None))
    optimizer = torch.optim.Adam(parameters.values(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    targets = labels[:half].repeat(len(networks))
    looks = {0, args.steps} | {round(10 ** (k / 10)) for k in range(10 * len(str(args.steps)))}
    for step in range(args.steps + 1):
        if step in looks:
            with torch.no_grad():
                weights = (parameters | buffers)["action_layer.weight"]
                yield step, *forward(parameters, buffers, obs), weights
        _, logits = forward(parameters, buffers, obs[:half])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets) * len(networks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if "action_layer.weight" in parameters:  # bound its rows, without which a learned layer grows for ever
            with torch.no_grad():
                weights = parameters["action_layer.weight"]
                weights /= weights.norm(dim=-1, keepdim=True).clamp(min=1.0)


def measure(features, logits, weights, labels, generator):
    """A dict of what is reported of each seed's network on some states."""
    rows = []
    for h, own, weight in zip(features, logits, weights, strict=True):
        row = collapse_metrics(h, labels, weight)
        permuted = labels[torch.randperm(len(labels), generator=generator)]
        row |= {f"null_{name}": x for name, x in collapse_metrics(h, permuted, weight).items()}
        row["error"] = (own.argmax(1) != labels).double().mean().item()
        row["probability"] = own.softmax(1).gather(1, labels.unsqueeze(1)).mean().item()
        if row["classes_present"] == 2:
            row["etf_error"] = row["null_etf_error"] = math.nan  # two means always form a simplex
        rows.append(row)
    return rows


def run(task, args):
    """({(layer, features, set): {step: [a dict for each seed]}}, a line about the task)."""
    agent, env = teach(task)
    obs, labels, returns = gather(agent, env, args.episodes, args.per_action)
    classes, half = len(labels.unique()), len(obs) // 2
    line = f"{task}: the teacher's return is {returns.mean():.1f}; {classes} of {env.action_space.n} actions present"
    obs = (obs - obs[:half].mean(0)) / (obs[:half].std(0) + 1e-6)
    results, start = {}, time.perf_counter()
    for features in FEATURES:
        for layer in LAYERS:
            generator = torch.Generator().manual_seed(0)
            for step, h, logits, weights in imitate(students(env, layer, features, args.num_seeds), obs, labels, args):
                for name, part in zip(SETS, (slice(half), slice(half, None)), strict=True):
                    rows = measure(h[:, part], logits[:, part], weights, labels[part], generator)
                    results.setdefault((layer, features, name), {})[step] = rows
            last = results[layer, features, SETS[0]][args.steps]
            mean = {name: interval([row[name] for row in last])[0] for name in (*METRICS, "error", "probability")}
            said = ", ".join(f"{name} {value:.4g}" for name, value in mean.items())
            print(f"{time.perf_counter() - start:6.0f} s  {task}, {layer}, {features}: {said}", flush=True)
    return results, line


def table(results):
    """Lines of markdown: what the trained networks read, a row for each task, feature, layer and set of states."""
    lines = ["| task | features | layer | states | " + " | ".join(f"{AC[m]}: {m.replace('_', ' ')}" for m in AC)]
    lines[0] += (
        " | null of AC1, AC2, AC3 | verdict AC1 / AC2 / AC3 | cosine of means and weights | errors | pi(label) |"
    )
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for (task, layer, features, name), steps in results.items():
        rows = steps[max(steps)]
        values = {metric: [row[metric] for row in rows] for metric in rows[0]}
        cells = [task, features, layer, name]
        void = [not any(map(math.isfinite, values[metric])) for metric in AC]
        for metric, nothing in zip(AC, void, strict=True):
            cells.append("void" if nothing else "{:.3g} [{:.3g}, {:.3g}]".format(*interval(values[metric])))
        nulls = [f"{interval(values[f'null_{metric}'])[0]:.2g}" for metric in AC]
        cells.append(", ".join("void" if nothing else null for null, nothing in zip(nulls, void, strict=True)))
        verdicts = ["void" if nothing else judge(m, values[m]) for m, nothing in zip(AC, void, strict=True)]
        cells += [" / ".join(verdicts), f"{interval(values['mean_weight_cosine'])[0]:.3f}"]
        cells += [f"{100 * interval(values['error'])[0]:.1f} %", f"{interval(values['probability'])[0]:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def curves_of(results):
    """Rows of curves.csv: means over seeds of each metric and its null at each look, by task, layer, feature, set."""
    for key, steps in results.items():
        for step, rows in steps.items():
            for metric in AC:
                means = [interval([row[name] for row in rows])[0] for name in (metric, f"null_{metric}")]
                yield (*key, step, metric, *(f"{x:.8g}" for x in means))


def draw_training(rows, path):
    """AC1 to AC3 over training, as distances from collapse: a column for each task and feature, a colour an arm."""
    from plots import colours_of, plt, save, style

    style()
    lines = {}
    for task, layer, features, name, step, metric, value, null in rows:
        if int(step) and math.isfinite(float(value)):
            for kind, x in ((name, value), ("labels permuted", null)):
                if kind == name or (layer, name) == ("etf", SETS[0]):
                    x = 1 - float(x) if metric == "alignment" else float(x)
                    line = lines.setdefault((task, features, metric, layer, kind), ([], []))
                    line[0].append(int(step))
                    line[1].append(max(x, 1e-9))
    columns = list(dict.fromkeys((row[0], row[2]) for row in rows))
    colours = colours_of(list(dict.fromkeys(NAMES.get(key[3], key[3]) for key in lines)))
    size = (1 + 2.4 * len(columns), 8)
    figure, grid = plt.subplots(3, len(columns), figsize=size, squeeze=False, layout="constrained", sharex=True)
    for (task, features, metric, layer, kind), (steps, values) in lines.items():
        arm, axes = NAMES.get(layer, layer), grid[list(AC).index(metric)][columns.index((task, features))]
        label = "acpg, labels permuted" if kind == "labels permuted" else f"{arm}, {kind}"
        dashes = {SETS[0]: "-", SETS[1]: "--"}.get(kind, ":")
        axes.plot(steps, values, dashes, color="grey" if dashes == ":" else colours[arm], label=label)
    for axes_row, metric in zip(grid, AC, strict=True):
        for axes, (task, features) in zip(axes_row, columns, strict=True):
            if not axes.lines:
                axes.text(0.5, 0.5, "void: two classes", ha="center", transform=axes.transAxes)
            axes.set(xscale="log", yscale="log", title=f"{task}, {features}" if metric == "alignment" else "")
            bound = 1 - THRESHOLDS[metric] if metric == "alignment" else THRESHOLDS[metric]
            axes.axhline(bound, color="black", linewidth=0.5)
        name = "1 - alignment" if metric == "alignment" else metric.replace("_", " ")
        axes_row[0].set_ylabel(f"{AC[metric]}: {name}")
    for axes in grid[-1]:
        axes.set_xlabel("gradient step")
    save(figure, path)


def main():
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    if unknown := set(args.tasks) - set(TASKS):
        sys.exit(f"error: --tasks {', '.join(sorted(unknown))}: unknown; choose from {', '.join(TASKS)}")
    counts = {"num_seeds": (2, 10**4), "steps": (1, 10**7), "per_action": (2, 10**6), "episodes": (1, 10**6)}
    check_numbers(args, **counts, learning_rate=(1e-12, 1e3))
    torch.set_num_threads(1)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: --out {args.out} cannot be written: {error.strerror}; choose another")
    if args.report_only:
        try:
            with open(args.out / "curves.csv", newline="") as file:
                draw_training(list(csv.reader(file))[1:], args.out / "imitation.png")
        except OSError as error:
            sys.exit(f"error: --out {args.out}: {error.filename}: {error.strerror}; drop --report-only")
        return
    results, lines = {}, []
    for task in args.tasks:
        own, line = run(task, args)
        results |= {(task, *key): steps for key, steps in own.items()}
        lines.append(f"- {line}")
    names = [*METRICS, *(f"null_{metric}" for metric in AC), "error", "probability"]
    with open(args.out / "imitation.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["task", "layer", "features", "states", "step", "seed", *names])
        for key, steps in results.items():
            for step, rows in steps.items():
                for seed, row in enumerate(rows, start=FIRST) if step in (0, args.steps) else ():
                    writer.writerow([*key, step, seed, *(f"{row[name]:.5g}" for name in names)])
    (args.out / "imitation.md").write_text("\n".join([*lines, "", *table(results)]) + "\n")
    with open(args.out / "curves.csv", "w", newline="") as file:
        writer, curves = csv.writer(file, lineterminator="\n"), list(curves_of(results))
        writer.writerow(["task", "layer", "features", "states", "step", "metric", "mean", "null"])
        writer.writerows(curves)
    draw_training(curves, args.out / "imitation.png")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
