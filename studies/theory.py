"""The layer-peeled problem of Action Collapse, solved numerically: which activations does each objective want?

    python studies/theory.py
    python studies/theory.py --advantages 1 1 0 --scales 0.5 1 2 4 8 --out results/theory_ties
    python studies/theory.py --num-actions 6 --imbalance 10

Activations h are free but for |h| <= 1, logits are scale * W h. For one state with advantages A the script finds the
activation that maximises sum_a pi(a) A(a) (the policy gradient's objective) or log pi(a*) (likelihood), for a fixed
simplex ETF; then it solves the problem of many states together with a fixed ETF, a learned layer (rows of norm at
most 1) and a fixed random layer. It prints tables and writes a figure. docs/action_collapse.md states what is proved
of this.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import tyro
from scipy.optimize import minimize

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from evaluate import check_numbers  # noqa: E402
from ppo_acpg import simplex_etf  # noqa: E402


@dataclass
class Args:
    advantages: list[float] = field(default_factory=lambda: [1.0, 0.5, 0.0, -1.0])
    """advantages of one state's actions"""
    num_actions: int | None = None
    """so many advantages, drawn at random, in place of --advantages"""
    feature_dim: int = 8
    """dimension of the activations"""
    scales: list[float] = field(default_factory=lambda: [0.1, 0.316, 1.0, 3.16, 10.0, 31.6, 100.0])
    """scales of the logits"""
    states: int = 24
    """states of the joint problem"""
    imbalance: float = 1.0
    """how many times more states the first action is optimal in than any other"""
    seed: int = 1
    """seed of the layers, the advantages and the starting points"""
    out: Path = ROOT / "results" / "theory"
    """folder of the figure and the tables"""


def log_regret(logits, gaps):
    """ln sum_b pi(b) D_b for logits (..., K) and gaps D_b = A(a*) - A(b) >= 0 (K,).

    A(a*) minus this regret is the policy gradient's objective sum_a pi(a) A(a), so both have the same optima; the
    logarithm keeps its gradient of order one where the policy is nearly deterministic, and so the optima exact at
    large scales.
    """
    return (logits + gaps.log()).logsumexp(-1) - logits.logsumexp(-1)


def equal_gaps(gaps):
    """Gaps of 1 for every action but the best. Maximising ln pi(a*) is minimising 1 - pi(a*), the regret under
    these."""
    return (gaps > 0).double()


def solve_state(weight, scale, gaps, starts=12, seed=0):
    """Local minima of the log regret over activations h on the unit sphere, for logits scale * W h, W (K, d), gaps
    (K,).

    Returns (minima, values). `minima` (n, d) are the distinct ones among those reached from `starts` random points,
    best first. A maximiser of either objective over the ball lies on the sphere: shrinking h towards 0 makes the
    policy uniform (checked in the tests).
    """
    weight, gaps = weight.double(), gaps.double()
    rng, found = np.random.default_rng(seed), []

    def function(x):
        z = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        value = log_regret(scale * weight @ (z / z.norm()), gaps)
        value.backward()
        return value.item(), z.grad.numpy()

    for _ in range(starts):
        x = rng.normal(size=weight.shape[1])
        for _ in range(3):  # restarts of L-BFGS sharpen its last digits
            x = minimize(
                function, x / np.linalg.norm(x), jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-12}
            ).x
        found.append((function(x)[0], x / np.linalg.norm(x)))
    found.sort(key=lambda pair: pair[0])
    minima = []
    for value, h in found:
        gradient = function(h)[1]  # tangential, since the function does not change along h
        rows = weight.numpy() @ h  # only the part of h that the layer sees counts
        if np.linalg.norm(gradient) < 1e-5 and all(
            np.abs(rows - weight.numpy() @ other).max() > 1e-4 for _, other in minima
        ):
            minima.append((value, h))
    return torch.tensor(np.stack([h for _, h in minima])), [value for value, _ in minima]


def angle(u, v):
    """Angle between two vectors in degrees."""
    u, v = (torch.as_tensor(x, dtype=torch.float64) for x in (u, v))
    u, v = u / u.norm(), v / v.norm()
    return math.degrees(2 * math.atan2((u - v).norm(), (u + v).norm()))


def asymptote(advantages):
    """The limit of R tan(angle), R = scale sqrt(K / (K - 1)), as the scale grows: sqrt(sum_b (ln D_b - mean ln
    D)^2)."""
    gaps = [max(advantages) - a for a in advantages]
    logs = np.log([gap for gap in gaps if gap > 0])
    return float(np.sqrt(((logs - logs.mean()) ** 2).sum()))


def solve_jointly(layer, scale, gaps, objective, feature_dim, seed=0, steps=1500):
    """Maximise the mean objective over the free activations of all states together: (H (N, d), W (K, d), mean pi(a*)).

    `gaps` (N, K). `layer` is "etf", "random" (fixed unit rows) or "learned" (rows of norm at most 1, from random ones).
    Adam with the norm bounds built in, on the logarithm of the objective's distance from its bound: of each state's own
    where the layer is fixed and the states so decoupled, of the mean where it is learned. Non-convex for "learned".
    """
    generator = torch.Generator().manual_seed(seed)
    n, k = gaps.shape
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight = (
        simplex_etf(k, feature_dim, generator).double()
        if layer == "etf"
        else nn.functional.normalize(draw(k, feature_dim), dim=1)
    )
    h, weight = (0.1 * draw(n, feature_dim)).requires_grad_(), weight.requires_grad_(layer == "learned")
    bound = lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1.0)  # noqa: E731
    optimizer = torch.optim.Adam([h, weight] if layer == "learned" else [h], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best = gaps.argmin(-1, keepdim=True)
    gaps = gaps if objective == "pg" else equal_gaps(gaps)
    for _ in range(steps):
        losses = log_regret(scale * bound(h) @ bound(weight).T, gaps)
        if layer != "learned":
            loss = losses.mean()
        elif objective == "pg":
            loss = losses.logsumexp(0)
        else:  # -ln pi(a*) = -ln(1 - regret)
            loss = (-torch.log1p(-losses.exp())).log().logsumexp(0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        logits = scale * bound(h) @ bound(weight).T
        return bound(h).detach(), bound(weight).detach(), logits.softmax(-1).gather(1, best).mean().item()


def draw_gaps(states, num_actions, imbalance, seed):
    """(N, K) gaps of random advantages, uniform on [0, 1]; action 0 is optimal `imbalance` times as often as each
    other one."""
    rng = np.random.default_rng(seed)
    shares = np.array([imbalance] + [1.0] * (num_actions - 1))
    best = np.repeat(np.arange(num_actions), np.maximum(1, np.round(states * shares / shares.sum())).astype(int))
    gaps = rng.uniform(0.05, 1.0, size=(len(best), num_actions))
    gaps[np.arange(len(best)), best] = 0.0
    return torch.tensor(gaps)


def main():
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    counts = {"num_actions": (2, 10**4), "feature_dim": (1, 10**4), "states": (2, 10**5), "seed": (0, 2**32 - 1)}
    check_numbers(args, **counts, advantages=(-1e6, 1e6), scales=(1e-6, 1e6), imbalance=(1e-6, 1e6))
    rng = np.random.default_rng(args.seed)
    advantages = args.advantages
    if args.num_actions is not None:
        advantages = rng.uniform(-1, 1, size=args.num_actions).round(2).tolist()
    k = len(advantages)
    try:
        etf = simplex_etf(k, args.feature_dim, torch.Generator().manual_seed(args.seed)).double()
        args.out.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        raise SystemExit(f"error: --advantages or --num-actions: {error}") from error
    except OSError as error:
        raise SystemExit(f"error: --out {args.out} cannot be written: {error.strerror}; choose another") from error
    if args.states < k:
        raise SystemExit(f"error: --states must be at least the {k} actions, got {args.states}")
    best = int(np.argmax(advantages))
    unique = sum(a == max(advantages) for a in advantages) == 1

    gaps = max(advantages) - torch.tensor(advantages, dtype=torch.float64)
    lines = [
        f"One state, advantages {', '.join(f'{a:g}' for a in advantages)}, fixed simplex ETF; angles in degrees",
        "",
    ]
    header = (
        "scale | largest possible pi(a*) | pi(a*) at the PG optimum | angle of h to the optimal action's weight, PG"
    )
    lines += [f"| {header} | R tan(angle) | the same angle, likelihood | local maxima, PG |"]
    lines += ["|---|---|---|---|---|---|---|"]
    angles = []
    for scale in args.scales:
        minima, _ = solve_state(etf, scale, gaps, seed=args.seed)
        likely, _ = solve_state(etf, scale, equal_gaps(gaps), seed=args.seed)
        logits = scale * etf @ minima[0]
        nearest = min((angle(minima[0], etf[i]) for i, a in enumerate(advantages) if a == max(advantages)))
        angles.append(nearest)
        bound = 1 / (1 + (k - 1) * math.exp(-scale * k / (k - 1)))
        r = scale * math.sqrt(k / (k - 1)) * math.tan(math.radians(nearest))
        cells = [f"{scale:g}", f"{bound:.4f}", f"{logits.softmax(-1)[best]:.4f}", f"{nearest:.2f}", f"{r:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {angle(likely[0], etf[best]):.4f} | {len(minima)} |")
    if unique:
        lines += ["", f"Limit of R tan(angle) for large scales: {asymptote(advantages):.3f}"]

    lines += [
        "",
        f"{args.states} states together, random advantages, imbalance {args.imbalance:g}: mean angles in degrees, and",
    ]
    lines += ["the max-angle deviation of the class means and of W from a simplex ETF", ""]
    header = "objective | layer | scale | mean pi(a*) | h to its own weight | h to its class mean"
    lines += [f"| {header} | frame of the means | of W |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    gaps = draw_gaps(args.states, k, args.imbalance, args.seed)
    labels = gaps.argmin(-1)
    curves = {}
    for objective in ("pg", "likelihood"):
        for layer in ("etf", "learned", "random"):
            for scale in (1.0, 3.16, 10.0):
                h, w, probability = solve_jointly(layer, scale, gaps, objective, args.feature_dim, args.seed)
                means = torch.stack([h[labels == i].mean(0) for i in range(k)])
                centred, rows = means - means.mean(0), w - w.mean(0)
                own = np.mean([angle(x - means.mean(0), rows[y]) for x, y in zip(h, labels, strict=True)])
                mean = np.mean([angle(x, means[y]) for x, y in zip(h, labels, strict=True)])
                deviations = [max_angle_deviation(x) for x in (centred, rows)]
                curves[objective, layer, scale] = own
                cells = [objective, layer, f"{scale:g}", f"{probability:.4f}", f"{own:.2f}", f"{mean:.2f}"]
                lines.append(f"| {' | '.join(cells + [f'{x:.4f}' for x in deviations])} |")
    (args.out / "theory.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(args, advantages, angles, curves, unique)
    print(f"\nwritten to {args.out}")


def max_angle_deviation(vectors):
    """Mean |cosine + 1/(K-1)| over pairs of centred vectors (K, d); 0 for a simplex ETF."""
    unit = nn.functional.normalize(vectors, dim=1)
    cosines = (unit @ unit.T)[~torch.eye(len(vectors), dtype=torch.bool)]
    return (cosines + 1 / (len(vectors) - 1)).abs().mean().item()


def draw(args, advantages, angles, curves, unique):
    from emergence import NAMES
    from plots import colours_of, plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.2), layout="constrained")
    k = len(advantages)
    left.loglog(args.scales, np.maximum(angles, 1e-3), "o-", color="black", label="policy gradient, numerical optimum")
    if unique and asymptote(advantages) > 0:
        rs = np.array(args.scales) * math.sqrt(k / (k - 1))
        left.loglog(
            args.scales, np.degrees(np.arctan(asymptote(advantages) / rs)), "--", color="#555555", label="asymptote"
        )
    left.set(xlabel="logit scale (norm bound 1)", ylabel="angle to the optimal action's weight, degrees")
    left.set_title("one state: " + ", ".join(f"{a:g}" for a in advantages))
    left.legend(frameon=False)
    names = {layer: NAMES.get(layer, layer) for layer in dict.fromkeys(layer for _, layer, _ in curves)}
    colours = colours_of(list(names.values()))
    for (objective, layer), style in {
        (o, a): s for o, s in (("pg", "o-"), ("likelihood", "s--")) for a in names
    }.items():
        points = [(s, v) for (o, a, s), v in curves.items() if (o, a) == (objective, layer)]
        right.semilogx(
            *zip(*points, strict=True), style, color=colours[names[layer]], label=f"{names[layer]}, {objective}"
        )
    right.set(xlabel="logit scale (norm bound 1)", ylabel="mean angle of h to its own weight, degrees")
    right.set_title(f"{args.states} states together")
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(args.out / "theory.png", dpi=120)


if __name__ == "__main__":
    main()
