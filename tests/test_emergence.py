"""emergence.py: its environment against values known by hand, and collapse where theory says that it must come
about."""

import ast
import math
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from helpers import ROOT, SCRIPTS, train

import emergence
import evaluate
import ppo_acpg
import theory

GAMMA = 0.9


def solve(**kwargs):
    env = emergence.IdealCliffWalking(**kwargs)
    q = emergence.optimal_values(*emergence.transition_tables(env.P, GAMMA))
    return env, q, *emergence.optimal_actions(q)


def functions(path):
    """{name: source without its docstring} of a file's functions and methods, but `main` and what stands in one
    line."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name not in ("main", "fail"):
            body = node.body[ast.get_docstring(node) is not None :]
            found[node.name] = ast.unparse(ast.Module(body, type_ignores=[]))
    return found


def test_nothing_is_a_copy():
    """Studies and evaluate.py import what the scripts, or one another, have: no function of a script, nor one body,
    twice."""
    scripts, seen = [functions(ROOT / f"{script}.py") for script in SCRIPTS], {}
    known = {name for script in scripts for name in script if not name.startswith("__")} - {"reset", "step", "forward"}
    for path in (ROOT / "evaluate.py", *sorted((ROOT / "studies").glob("*.py"))):
        own = functions(path)
        assert not known & set(own), path
        for name, body in own.items():
            assert body not in seen or body.count("\n") < 2, (path, name, seen[body])
            seen[body] = (path, name)
    assert emergence.collapse_metrics is ppo_acpg.collapse_metrics and theory.simplex_etf is ppo_acpg.simplex_etf
    assert emergence.optimal_values is evaluate.optimal_values


def test_the_environment_is_ideal():
    """Every action is the only optimal one in equally many states; the value is gamma per step from the exit."""
    env, q, labels, unique = solve(length=3)
    assert env.terminal == 12 and unique[:12].all()
    assert np.bincount(labels[:12]).tolist() == [3, 3, 3, 3]
    assert q[:3].max(1) == pytest.approx([GAMMA**2, GAMMA, 1.0])
    # the middle cell of the first pier: up to the last cell, right and left into the sea, down to the first cell
    assert q[1] == pytest.approx([GAMMA, -1.0, GAMMA * GAMMA**2, -1.0])
    check_env(gym.make("IdealCliffWalking-v0").unwrapped, skip_render_check=True)


def test_starts_are_uniform():
    env = emergence.IdealCliffWalking()
    counts = np.bincount([env.reset(seed=seed)[0] for seed in range(3200)], minlength=16)
    assert len(counts) == 16 and counts.min() > 140 and counts.max() < 260


def test_variants():
    """Unequal piers are unbalanced; corners are tied; falling inward makes all gaps equal."""
    _, _, labels, unique = solve(lengths=(5, 1, 1, 1))
    assert np.bincount(labels[:8]).tolist() == [5, 1, 1, 1]
    env, q, _, unique = solve(corners=True)
    assert env.terminal == 20 and unique[:16].all() and not unique[16:20].any()
    assert q[16].tolist() == [1, 1, -1, -1]
    _, q, _, _ = solve(inward="falls")
    assert (np.sort(q[:16])[:, :3] == -1).all()


def test_cells_are_what_they_are_called():
    ideal, unbalanced, tied, equal = (
        solve(**emergence.CELLS[cell]) for cell in ("ideal", "unbalanced actions", "tied optima", "equal gaps")
    )
    assert np.bincount(ideal[2][:16]).tolist() == [4] * 4 and np.bincount(unbalanced[2][:16]).tolist() == [10, 2, 2, 2]
    assert ideal[3][:16].all() and not tied[3][:20].all()
    assert np.ptp(np.sort(equal[1][:16])[:, :3]) == 0 < np.ptp(np.sort(ideal[1][:16])[:, :3])


def test_steps_follow_the_table():
    env = emergence.IdealCliffWalking(length=2)
    env.reset(seed=0)
    for state, action, expected in (
        (0, 0, (1, 0.0, False)),
        (1, 0, (8, 1.0, True)),
        (0, 2, (0, 0.0, False)),
        (3, 0, (8, -1.0, True)),
    ):
        env.state = state
        assert env.step(action)[:3] == expected


def quick(cell, layer, steps=1500, seeds=2):
    args = emergence.Args(num_seeds=seeds, steps=steps, learning_rate=1e-2, scale=5.0)
    return emergence.train(args, layer, **emergence.CELLS[cell])


@pytest.mark.parametrize("cell", ["imitation", "equal gaps"])
def test_collapse_where_theory_promises_it(cell):
    """Imitation, and the policy gradient with equal gaps: all three with the ETF, none under permuted labels."""
    for row in quick(cell, "etf"):
        assert row["alignment"] > 0.99 and row["variability_quotient"] < 0.01 and row["etf_error"] < 0.05
        assert row["mean_weight_cosine"] > 0.99 and row["optimal"] == 1
        assert row["null_alignment"] < 0.9 and row["null_variability_quotient"] > 0.1


def test_no_exact_collapse_with_unequal_gaps():
    """The ideal environment under the true policy gradient, whose optimum at a finite scale is off the frame."""
    rows = quick("ideal", "etf")
    assert all(row["optimal"] == 1 and row["etf_error"] > 0.05 for row in rows)


def test_the_entropy_bonus_keeps_the_policy_random():
    """Its optimum is no deterministic policy."""
    (row, *_), (ideal, *_) = quick("entropy bonus", "etf", steps=500), quick("ideal", "etf", steps=500)
    assert row["probability"] < 0.95 < ideal["probability"]
    assert row["optimal"] == 1


def test_the_visitation_is_reported_and_used():
    """Half of the states never visited are never learned; the optimal policy passes 1, 1.9, 2.71, 3.439 times,
    discounted."""
    for row in quick("half explored", "etf", steps=500):
        assert (row["min_visitation"], row["max_visitation"]) == (0, 2) and row["optimal"] < 0.9
    for row in quick("on-policy states", "etf", steps=500):
        mean = (1 + 1.9 + 2.71 + 3.439) / 4
        assert row["min_visitation"] == pytest.approx(1 / mean, rel=0.02)
        assert row["max_visitation"] == pytest.approx(3.439 / mean, rel=0.02)


def test_the_gradient_is_the_one_of_the_return():
    """With states drawn by their visitation the loss has the policy gradient (theorem of Sutton et al. 2000)."""
    env = emergence.IdealCliffWalking(length=2)
    moves, rewards = (torch.tensor(x) for x in emergence.transition_tables(env.P, GAMMA))
    moves, rewards = moves[:8, :, :8], rewards[:8]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 8, 4, dtype=torch.float64, generator=generator).requires_grad_()
    start = torch.rand(8, dtype=torch.float64, generator=generator)
    pi = logits.softmax(-1)
    flow = torch.einsum("nsa,sat->nst", pi, moves)
    value = torch.linalg.solve(torch.eye(8, dtype=torch.float64) - flow, (pi * rewards).sum(-1))
    (truth,) = torch.autograd.grad((value @ start).sum(), logits, retain_graph=True)
    advantage, visits = emergence.solve(pi.detach(), moves, rewards, start)
    (surrogate,) = torch.autograd.grad((visits.unsqueeze(-1) * pi * advantage).sum(), logits)
    factor = (truth / surrogate).nanmean((1, 2), keepdim=True)  # visitation sums to one here, in the theorem to more
    torch.testing.assert_close(surrogate * factor, truth)
    torch.testing.assert_close(visits.sum(-1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close((pi * advantage).sum(-1), torch.zeros(3, 8, dtype=torch.float64))


def test_nothing_follows_a_terminal_step():
    """Whatever the table says of the state after it: CliffWalking's goes on paying from its goal."""
    table = {0: {0: [(0.25, 1, 1.0, True), (0.75, 0, -1.0, False)]}, 1: {0: [(1.0, 1, 5.0, False)]}}
    moves, rewards = emergence.transition_tables(table, GAMMA)
    assert moves[0, 0].tolist() == [0.75 * GAMMA, 0] and rewards[0, 0] == -0.5
    assert emergence.optimal_values(moves, rewards)[0, 0] == pytest.approx(-0.5 / (1 - 0.75 * GAMMA))


def test_bounds():
    """The ball and the box hold features and a learned layer's rows, and leave alone what is inside."""
    for bound in ("ball", "tanh", "none"):
        policies = emergence.Policies(16, 4, "learned", bound, 10.0, 2)
        with torch.no_grad():
            free = policies.hidden.tanh() @ policies.out
            assert free.norm(dim=-1).max() < 1
            h, weight, logits = policies()
            torch.testing.assert_close(h, free.tanh() if bound == "tanh" else free)
            policies.out *= 100
            policies.weight *= 3
            h, weight, logits = policies()
            largest, rows = h.norm(dim=-1).max().item(), weight.norm(dim=-1).max().item()
        assert {"ball": largest <= 1 + 1e-9, "tanh": 1 < largest <= 8, "none": largest > 8}[bound]
        assert rows == pytest.approx(1.0 if bound == "ball" else 3.0)


def test_verdicts():
    assert emergence.judge("alignment", [0.999, 0.998, 0.9985]) == "yes"
    assert emergence.judge("alignment", [0.9, 0.91, 0.92]) == "no"
    assert emergence.judge("alignment", [0.98, 0.999, 0.9999]) == "open"
    assert emergence.judge("etf_error", [0.01, 0.02, 0.015]) == "yes"
    assert emergence.judge("etf_error", [0.01, 0.2, 0.1]) == "open"
    assert emergence.judge("etf_error", [0.3, 0.2, 0.25]) == "no"
    mean, low, high = emergence.interval([1.0, 2.0, 3.0, math.nan])
    assert mean == 2 and low < 1 and high > 3


def test_command(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "studies" / "emergence.py"),
        "--out",
        str(tmp_path / "out"),
        "--num-seeds",
        "2",
        "--steps",
        "20",
    ]
    result = subprocess.run([*command, "--cells", "ideal", "--layers", "etf"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "| ideal | etf |" in (tmp_path / "out" / "emergence.md").read_text()
    assert len((tmp_path / "out" / "emergence.csv").read_text().splitlines()) == 3
    result = subprocess.run([*command, "--cells", "nonsense"], capture_output=True, text=True)
    assert (
        result.returncode == 1
        and result.stderr.startswith("error: --cells nonsense")
        and result.stderr.count("\n") == 1
    )


@pytest.mark.parametrize("script", ["ppo_acpg", "reinforce_baseline"])
def test_scripts_train_on_it(script, tmp_path):
    agent = train(
        script, "environments.ideal_cliff:IdealCliffWalking-v0", tmp_path / "run", "--total-timesteps", 2048
    ).agent
    assert agent.logits(torch.arange(16)).shape == (16, 4)
