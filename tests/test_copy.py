"""What docs/copy.md promises: the ETF layer works when copied out of a script, and the example trains."""

import ast
import re
import runpy
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

BARE = """
layer = ActionLayer(simplex_etf(4, 3, torch.Generator().manual_seed(0)), scale=2.0)
gram = layer.weight @ layer.weight.T
assert torch.allclose(gram, 4 / 3 * torch.eye(4) - 1 / 3, atol=1e-6)
h = torch.randn(5, 3)
assert torch.allclose(layer(h), 2.0 * h @ layer.weight.T)
assert not list(layer.parameters()) and list(layer.state_dict()) == ["weight"]
print("works")
"""


def source(script, *names):
    """The source of some of a script's functions and classes."""
    text = (ROOT / script).read_text()
    found = {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body if hasattr(node, "name")}
    return "\n\n\n".join(found[name] for name in names)


def test_the_layer_runs_in_a_bare_file(tmp_path):
    """Copied out by source into a file that imports torch and math alone."""
    bare = tmp_path / "bare.py"
    bare.write_text(
        "import math\nimport torch\nimport torch.nn as nn\n\n"
        + source("ppo_acpg.py", "simplex_etf", "ActionLayer")
        + BARE
    )
    result = subprocess.run([sys.executable, str(bare)], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout == "works\n", result.stderr


def test_the_documented_actor(tmp_path):
    """The first code block of docs/copy.md, with the two pieces pasted where it says, starts near uniform."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "copy.md").read_text(), re.DOTALL)[1]
    paste = next(line for line in block.splitlines() if line.startswith("# paste"))
    script = tmp_path / "actor.py"
    script.write_text(block.replace(paste, source("ppo_acpg.py", "simplex_etf", "ActionLayer")))
    torch.manual_seed(0)
    names = runpy.run_path(str(script))
    actor, etf = names["actor"], names["etf"]
    logits = actor(torch.randn(100, 8))
    assert logits.shape == (100, 4)
    assert 0 < (logits.softmax(-1) - 0.25).abs().max() < 0.15  # near uniform; with a gain of 1 it is .24 to .43
    before = etf.weight.clone()
    optimizer = torch.optim.Adam(actor.parameters(), lr=0.1)
    logits.square().mean().backward()
    optimizer.step()
    assert torch.equal(etf.weight, before)


def test_the_example_is_a_copy():
    for name in ("simplex_etf", "ActionLayer"):
        assert source("examples/sb3_acpg.py", name) == source("ppo_acpg.py", name)


@pytest.mark.parametrize("algorithm", ["PPO", "A2C"])
def test_stable_baselines3_trains_with_it(algorithm, tmp_path):
    """A few thousand steps: the backbone moves, the frame does not, saving keeps it, the optimiser never held it."""
    sb3 = pytest.importorskip("stable_baselines3", reason="needs pip install stable-baselines3==2.9.2")
    names = runpy.run_path(str(ROOT / "examples" / "sb3_acpg.py"))
    make = getattr(sb3, algorithm)
    model = make(names["ACPGPolicy"], "CartPole-v1", seed=1, device="cpu", policy_kwargs={"etf_scale": 2.0})
    etf, trunk = (x.clone() for x in (model.policy.action_net.weight, model.policy.mlp_extractor.policy_net[0].weight))
    held = {id(parameter) for group in model.policy.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.policy.parameters()}
    model.learn(3000)
    assert model.policy.action_net.scale == 2.0
    assert torch.equal(model.policy.action_net.weight, etf)
    assert not torch.equal(model.policy.mlp_extractor.policy_net[0].weight, trunk)
    model.save(tmp_path / "model.zip")
    assert torch.equal(make.load(tmp_path / "model.zip", device="cpu").policy.action_net.weight, etf)


def test_the_example_runs():
    pytest.importorskip("stable_baselines3", reason="needs pip install stable-baselines3==2.9.2")
    command = [sys.executable, str(ROOT / "examples" / "sb3_acpg.py"), "--total-timesteps", "1024"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "greedy return" in result.stdout


@pytest.mark.parametrize("flag", ("--etf-scale=nan", "--feature-gain=0", "--seed=-1", "--env-id=Nonsense-v0"))
def test_the_example_refuses_in_a_line(flag):
    pytest.importorskip("stable_baselines3")
    command = [sys.executable, str(ROOT / "examples" / "sb3_acpg.py"), flag]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stderr.startswith(f"error: {flag.partition('=')[0]}"), result.stderr
    assert result.stderr.count("\n") == 1
