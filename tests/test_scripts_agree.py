"""The scripts are copies of one another but for what their names say: the diff is the method."""

import ast
import difflib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [("ppo_baseline.py", "ppo_acpg.py")]
METHOD = {"Args", "Agent", "check_args"}  # stand in both twins of a pair and differ: arguments, network, their bounds
ONLY_ACPG = {"simplex_etf", "ActionLayer", "constrain"}


def without_docstrings(tree):
    """The tree without its docstrings, those below the fields of a dataclass included (comments are gone anyway)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            kept = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            node.body = kept or [ast.Pass()]
    return tree


def blocks(script):
    """Source of every function and class, imports, and the main block, by name."""
    source = (ROOT / script).read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_source_segment(source, node)
        elif isinstance(node, ast.If):
            found["__main__"] = ast.get_source_segment(source, node)
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.get_source_segment(source, node)
    return found


def test_twins_differ_in_the_method_only():
    for baseline, acpg in PAIRS:
        ours, theirs = blocks(baseline), blocks(acpg)
        assert set(theirs) - set(ours) == ONLY_ACPG
        assert set(ours) <= set(theirs)
        assert {name for name in ours if ours[name] != theirs[name]} == METHOD
        assert "__main__" in ours  # rollout and update stand there, so both are identical


def test_the_diff_is_small():
    for pair in PAIRS:
        trees = [ast.unparse(without_docstrings(ast.parse((ROOT / script).read_text()))).splitlines() for script in pair]
        changed = [line for line in difflib.ndiff(*trees) if line[0] in "+-"]
        assert 0 < len(changed) < 80


def test_methods_of_the_network_that_stand_in_both_are_the_same():
    for pair in PAIRS:
        agents = []
        for script in pair:
            tree = without_docstrings(ast.parse((ROOT / script).read_text()))
            agent = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Agent")
            agents.append({node.name: ast.unparse(node) for node in agent.body if isinstance(node, ast.FunctionDef)})
        baseline, acpg = agents
        assert set(baseline) == set(acpg)
        assert {name for name in baseline if baseline[name] != acpg[name]} == {"__init__", "features", "logits"}


def test_every_field_has_a_one_line_docstring():
    for script in (name for pair in PAIRS for name in pair):
        args = next(n for n in ast.parse((ROOT / script).read_text()).body if isinstance(n, ast.ClassDef) and n.name == "Args")
        fields = args.body[::2]
        assert all(isinstance(field, ast.AnnAssign) for field in fields) and len(args.body) == 2 * len(fields)
        for doc in args.body[1::2]:
            assert isinstance(doc.value.value, str) and "\n" not in doc.value.value
