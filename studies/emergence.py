"""Does Action Collapse emerge, and does the ETF induce it? An ideal tabular environment, trained by policy gradient.

    python studies/emergence.py                              # every cell, 20 seeds, to results/emergence
    python studies/emergence.py --cells ideal "entropy bonus" --num-seeds 5 --steps 2000 --out runs/emergence

The environment, environments/ideal_cliff.py, is ideal in the paper's sense (Zhou et al. 2025): discrete, every state
explored, every action optimal in equally many states, states uniformly distributed, optima unique. The script trains
a policy (one-hot state, tanh layer, linear layer into the unit ball, action-selection layer) by the exact policy
gradient, with exact values, and measures AC1 to AC3 against the true optimal actions. Each cell takes one of the
conditions away. docs/action_collapse.md has the definitions.
"""

import csv
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import tyro
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from environments.ideal_cliff import IdealCliffWalking  # noqa: E402
from evaluate import check_numbers, optimal_actions, optimal_values, transition_tables  # noqa: E402
from ppo_acpg import collapse_metrics, simplex_etf  # noqa: E402

# Cells: the ideal setting, and each with one condition taken away
CELLS = {
    "ideal": {},
    "unbalanced actions": {"lengths": (10, 2, 2, 2)},
    "on-policy states": {"states": "on-policy"},
    "half explored": {"states": "half"},
    "tied optima": {"corners": True},
    "entropy bonus": {"entropy": 0.1},
    "no norm bound": {"bound": "none"},
    "weight decay instead": {"bound": "none", "decay": 1e-3},
    "sampled gradient": {"sampled": True},
    "tanh box": {"bound": "tanh"},
    # and one condition more: what theory asks for, equal advantages of all wrong actions, or imitation of the optimal
    # one
    "equal gaps": {"inward": "falls"},
    "imitation": {"imitate": True},
}
LAYERS = {"learned": 64, "etf": 64, "random": 64, "random, d = 4": 4}  # and the feature dimension
# What counts as collapse. With permuted labels they read .3 to .7, 1 to 19, and .66 to .89 (results/emergence).
THRESHOLDS = {"alignment": 0.99, "variability_quotient": 0.01, "etf_error": 0.05}
AC = {"alignment": "AC1", "variability_quotient": "AC2", "etf_error": "AC3"}
FLOOR = 1e-6  # distances from collapse that figures tell apart
NAMES = {"learned": "baseline", "etf": "acpg"}  # what such a layer is in the scripts, and in the pictures


@dataclass
class Args:
    cells: list[str] = field(default_factory=lambda: list(CELLS))
    """cells to run"""
    layers: list[str] = field(default_factory=lambda: list(LAYERS))
    """action-selection layers to run"""
    num_seeds: int = 20
    """seeds per cell"""
    steps: int = 4000
    """gradient steps"""
    learning_rate: float = 3e-3
    """learning rate of Adam, annealed to zero"""
    scale: float = 10.0
    """scale of the logits (1 where there is no norm bound)"""
    gamma: float = 0.9
    """discount factor"""
    samples: int = 64
    """state-action pairs per step, where the gradient is sampled"""
    out: Path = ROOT / "results" / "emergence"
    """folder of the tables and figures"""
    report_only: bool = False
    """only draw the figure, from emergence.csv"""


class Policies(nn.Module):
    """`seeds` independent policies side by side: one-hot state, 64 tanh units, d features under a bound, K logits."""

    def __init__(self, states, actions, layer, bound, scale, seeds):
        super().__init__()
        dim = LAYERS[layer]
        drawn = {"hidden": [], "out": [], "weight": []}
        for seed in range(1, seeds + 1):
            generator = torch.Generator().manual_seed(seed)
            for name, shape, gain in (("hidden", (states, 64), 1.0), ("out", (64, dim), 0.1)):
                drawn[name].append(nn.init.orthogonal_(torch.empty(shape), gain, generator=generator).double())
            if layer == "etf":
                drawn["weight"].append(simplex_etf(actions, dim, generator).double())
            else:
                rows = torch.randn(actions, dim, generator=generator, dtype=torch.float64)
                drawn["weight"].append(nn.functional.normalize(rows, dim=1))
        self.hidden, self.out = (nn.Parameter(torch.stack(drawn[name])) for name in ("hidden", "out"))
        self.weight = nn.Parameter(torch.stack(drawn["weight"]), requires_grad=layer == "learned")
        self.bound, self.scale = bound, 1.0 if bound == "none" else scale / math.sqrt(dim) if bound == "tanh" else scale

    def forward(self):
        """(features (seeds, S, d), weights (seeds, K, d), logits (seeds, S, K)) of all states."""
        h, weight = self.hidden.tanh() @ self.out, self.weight
        if self.bound == "ball":
            h = h / h.norm(dim=-1, keepdim=True).clamp(min=1.0)
            if weight.requires_grad:
                weight = weight / weight.norm(dim=-1, keepdim=True).clamp(min=1.0)
        elif self.bound == "tanh":
            h = h.tanh()
        return h, weight, self.scale * h @ weight.transpose(1, 2)


def solve(pi, moves, rewards, start):
    """Advantages (N, S, A) and state visitation (N, S) of N policies `pi` (N, S, A), exactly.

    `moves` and `rewards` are those of `transition_tables`, without the terminal state. The visitation is discounted,
    from `start` (S,), and sums to one.
    """
    eye, flow = torch.eye(len(start), dtype=pi.dtype), torch.einsum("nsa,sat->nst", pi, moves)
    value = torch.linalg.solve(eye - flow, (pi * rewards).sum(-1, keepdim=True))
    advantage = rewards + torch.einsum("sat,nt->nsa", moves, value.squeeze(-1)) - value
    visits = torch.linalg.solve((eye - flow).transpose(1, 2), start.expand(len(pi), -1).unsqueeze(-1)).squeeze(-1)
    return advantage, visits / visits.sum(-1, keepdim=True)


def train(args, layer, states="uniform", entropy=0.0, bound="ball", decay=0.0, sampled=False, imitate=False, **kwargs):
    """Train all seeds of one cell: a list with one dict of metrics for each seed.

    The loss is -sum_s rho(s) sum_a pi(a|s) A(s, a) with the exact advantages of the current policy, or its estimate
    from sampled states and actions. rho is uniform over the states, or the discounted visitation from a uniform
    start, or uniform over every other state. `imitate` maximises log pi(a*|s) instead. `kwargs` are the
    environment's.
    """
    env = IdealCliffWalking(**kwargs)
    moves, rewards = transition_tables(env.P, args.gamma)
    q_star = optimal_values(moves, rewards)
    labels, unique = optimal_actions(q_star)
    alive = env.terminal
    measured = torch.tensor(unique[:alive])
    labels = torch.tensor(labels[:alive])[measured]
    moves, rewards = torch.tensor(moves[:alive, :, :alive]), torch.tensor(rewards[:alive])
    start = torch.full((alive,), 1 / alive, dtype=torch.float64)
    if states == "half":
        start = (torch.arange(alive) % 2 == 0).double() / math.ceil(alive / 2)
    policies = Policies(alive, 4, layer, bound, args.scale, args.num_seeds)
    parameters = [p for p in policies.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(args.steps):
        h, weight, logits = policies()
        pi = logits.softmax(-1)
        with torch.no_grad():
            advantage, visits = solve(pi, moves, rewards, start)
            rho = visits if states == "on-policy" else start.expand(args.num_seeds, -1)
        if imitate:
            loss = -(rho * logits.log_softmax(-1)[:, torch.arange(alive), torch.tensor(q_star[:alive].argmax(1))]).sum(
                -1
            )
        elif sampled:
            with torch.no_grad():
                s = torch.multinomial(rho, args.samples, replacement=True, generator=generator)
                chosen = pi.gather(1, s.unsqueeze(-1).expand(-1, -1, 4)).flatten(0, 1)
                a = torch.multinomial(chosen, 1, generator=generator).view_as(s)
            seed = torch.arange(args.num_seeds).unsqueeze(1)
            loss = -(logits.log_softmax(-1)[seed, s, a] * advantage[seed, s, a]).mean(1)
        else:
            loss = -(rho.unsqueeze(-1) * pi * advantage).sum((1, 2))
        if entropy:
            loss = loss + entropy * (rho.unsqueeze(-1) * pi * logits.log_softmax(-1)).sum((1, 2))
        if decay:
            loss = loss + decay * (h.square().sum(-1).mean(-1) + weight.square().sum(-1).mean(-1)) / 2
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        h, weight, logits = policies()
        pi, rows = logits.softmax(-1), []
        for i in range(args.num_seeds):
            seen = measured.clone()
            if states == "half":
                seen &= start > 0
            own = labels if bool((seen == measured).all()) else torch.tensor(q_star[:alive].argmax(1))[seen]
            row = collapse_metrics(h[i][seen], own, weight[i])
            permuted = own[torch.randperm(len(own), generator=generator)]
            row |= {f"null_{name}": x for name, x in collapse_metrics(h[i][seen], permuted, weight[i]).items()}
            row["optimal"] = (logits[i].argmax(-1)[measured] == labels).double().mean().item()
            row["probability"] = pi[i][seen].gather(1, own.unsqueeze(1)).mean().item()
            row["max_visitation"], row["min_visitation"] = rho[i].max().item() * alive, rho[i].min().item() * alive
            rows.append(row)
    return rows


def interval(values):
    """Mean and 95 % t interval of the finite values."""
    x = np.array([v for v in values if math.isfinite(v)])
    if len(x) < 2:
        return (x.mean() if len(x) else math.nan), math.nan, math.nan
    half = stats.t.ppf(0.975, len(x) - 1) * stats.sem(x) if np.ptp(x) else 0.0
    return x.mean(), x.mean() - half, x.mean() + half


def judge(metric, values):
    """Say "yes" if the interval lies within the threshold of collapse, "no" if outside, else "open"."""
    _, low, high = interval(values)
    if metric == "alignment":
        return "yes" if low > THRESHOLDS[metric] else "no" if high < THRESHOLDS[metric] else "open"
    return "yes" if high < THRESHOLDS[metric] else "no" if low > THRESHOLDS[metric] else "open"


def draw(results, path):
    """The three metrics of every cell and layer, as points with intervals on a logarithmic distance from collapse.

    Of an interval that reaches zero, which such an axis cannot show, only the upper half is drawn, with an arrow. A
    mean below FLOOR is drawn there, as an arrow's head."""
    from plots import colours_of, plt, save

    cells, layers = (list(dict.fromkeys(key[i] for key in results)) for i in (0, 1))
    names = [NAMES.get(layer, layer) for layer in layers]
    colours = dict(zip(layers, colours_of(names).values(), strict=True))
    figure, grid = plt.subplots(1, 3, figsize=(14, 1.6 + 0.5 * len(cells)), sharey=True, layout="constrained")
    for axes, (metric, name) in zip(grid, AC.items(), strict=True):
        for (cell, layer), rows in results.items():
            values = np.array([row[metric] for row in rows])
            mean, low, high = interval(1 - values if metric == "alignment" else values)
            y = cells.index(cell) - 0.3 + 0.6 * (layers.index(layer) + 0.5) / len(layers)
            at, style = max(mean, FLOOR), {"color": colours[layer], "linewidth": 4, "alpha": 0.4}
            axes.plot([low if low > FLOOR else at, max(high, FLOOR)], [y, y], **style)
            if FLOOR < mean and not low > FLOOR:
                axes.annotate("", (at / 4, y), (at, y), arrowprops={"arrowstyle": "->", "color": colours[layer]})
            label = NAMES.get(layer, layer) if cell == cells[0] else None
            axes.plot(at, y, "o" if mean > FLOOR else "<", color=colours[layer], label=label)  # it lies further left
        bound = 1 - THRESHOLDS[metric] if metric == "alignment" else THRESHOLDS[metric]
        axes.axvline(bound, color="grey", linestyle=":")
        axes.set_xscale("log")
        axes.set_xlim(left=min(FLOOR / 2, axes.get_xlim()[0]) if axes.get_xlim()[0] < 4 * FLOOR else None)
        axes.set_xlabel(f"{name}: " + ("1 - alignment" if metric == "alignment" else metric.replace("_", " ")))
        axes.set_yticks(range(len(cells)), cells)
        axes.grid(alpha=0.25)
    grid[0].invert_yaxis()
    save(figure, path)


def read_results(path):
    """What `draw` needs of emergence.csv: {(cell, layer): [a dict for each seed]}."""
    results = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            numbers = {metric: float(row[metric]) for metric in AC}
            results.setdefault((row["cell"], row["layer"]), []).append(numbers)
    return results


def main():
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    for option, names, known in (("--cells", args.cells, CELLS), ("--layers", args.layers, LAYERS)):
        if unknown := set(names) - set(known):
            raise SystemExit(f"error: {option} {', '.join(sorted(unknown))}: unknown; choose from {', '.join(known)}")
    counts = {"num_seeds": (2, 10**4), "steps": (1, 10**7), "samples": (1, 10**6)}
    check_numbers(args, **counts, learning_rate=(1e-12, 1e3), scale=(1e-6, 1e6), gamma=(0, 1 - 1e-6))
    torch.set_num_threads(1)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: --out {args.out} cannot be written: {error.strerror}; choose another") from error
    if args.report_only:
        try:
            draw(read_results(args.out / "emergence.csv"), args.out / "emergence.png")
        except OSError as error:
            why = f"{error.filename}: {error.strerror}; drop --report-only"
            raise SystemExit(f"error: --out {args.out}: {why}") from error
        return
    results, start = {}, time.perf_counter()
    names = [*AC, "mean_weight_cosine", "null_alignment", "null_variability_quotient", "null_etf_error"]
    lines = [
        "| cell | layer | " + " | ".join(f"{AC[m]}: {m.replace('_', ' ')}" for m in AC) + " | verdict AC1 / AC2 / AC3 "
    ]
    lines[0] += (
        "| cosine of means and weights | null of AC1, AC2, AC3 | pi(a*) | greedy is optimal | visitation, min to max |"
    )
    lines += ["|" + "---|" * 11]
    numbers = ["cell,layer,seed," + ",".join([*names, "probability", "optimal"])]
    for cell in args.cells:
        for layer in args.layers:
            rows = results[cell, layer] = train(args, layer, **CELLS[cell])
            cells = [cell, layer]
            for metric in AC:
                cells.append("{:.3g} [{:.3g}, {:.3g}]".format(*interval([row[metric] for row in rows])))
            cells.append(" / ".join(judge(metric, [row[metric] for row in rows]) for metric in AC))
            mean = {name: interval([row[name] for row in rows])[0] for name in rows[0]}
            cells += [f"{mean['mean_weight_cosine']:.3f}", ", ".join(f"{mean[f'null_{metric}']:.2g}" for metric in AC)]
            cells += [f"{mean['probability']:.4f}", f"{100 * mean['optimal']:.1f} %"]
            cells += [f"{mean['min_visitation']:.2f} to {mean['max_visitation']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
            print(f"{time.perf_counter() - start:6.0f} s  {lines[-1]}", flush=True)
            for seed, row in enumerate(rows, start=1):
                numbers.append(
                    f'{cell},"{layer}",{seed},' + ",".join(f"{row[n]:.6g}" for n in [*names, "probability", "optimal"])
                )
    (args.out / "emergence.md").write_text("\n".join(lines) + "\n")
    (args.out / "emergence.csv").write_text("\n".join(numbers) + "\n")
    draw(results, args.out / "emergence.png")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
