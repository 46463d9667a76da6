"""The scripts are copies of one another but for what their names say: the diff is the method, or the algorithm."""

import ast
import difflib

import pytest
from helpers import ACPG, ALGORITHMS, BASELINES, PAIRS, ROOT, SCRIPTS, algorithm

pairs = pytest.mark.parametrize(("baseline", "acpg"), PAIRS, ids=ALGORITHMS)
arms = pytest.mark.parametrize("scripts", [BASELINES, ACPG], ids=["baseline", "acpg"])

ONLY_ACPG = {"simplex_etf", "ActionLayer", "constrain"}
ONLY_ALGORITHM = {
    "ppo": {"ADAM", "compute_gae", "ppo_loss"},
    "a2c": {"RMSPROP", "compute_gae", "a2c_loss"},
    "reinforce": {"compute_returns", "reinforce_loss"},
}
EVERYWHERE = {"Args", "check_args", "make_env", "check_env", "make_generator", "layer_init", "linear", "Agent"} | {
    *("flatten_parameters", "COLLAPSE_METRICS", "frame_geometry", "collapse_metrics", "diagnose", "Run")
}
MAY_DIFFER = {  # by name, with the reason
    "Args": "each algorithm has options of its own, and ACPG those of its layer; fields that are shared are held below",
    "check_args": "checks those options",
    "Agent": "ACPG's network ends in another layer, REINFORCE's has no critic; methods are held below",
}


def parse(script):
    """The script's syntax tree and its source."""
    source = (ROOT / f"{script}.py").read_text()
    return ast.parse(source), source


def without_docstrings(tree):
    """The tree without its docstrings, those below the fields of a dataclass included (comments are gone anyway)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            kept = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            node.body = kept or [ast.Pass()]
    return tree


def blocks(script):
    """Source of every function, class and assignment, and of the main block, by name, in the file's order."""
    tree, source = parse(script)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.If):
            names = ["__main__"]
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            names = [ast.unparse(target) for target in getattr(node, "targets", None) or [node.target]]
        else:
            assert isinstance(node, ast.Import | ast.ImportFrom | ast.Expr), f"what is {ast.unparse(node)}?"
            continue
        for name in names:
            assert name not in found, f"{script} has two {name}"
            # with the decorators, which ast does not count in
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            found[name] = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    return found


def methods(script):
    """Agent's methods, without docstrings and comments, by name."""
    tree = without_docstrings(parse(script)[0])
    agent = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Agent")
    return {node.name: ast.unparse(node) for node in agent.body if isinstance(node, ast.FunctionDef)}


def fields(script):
    """Args' fields, in order: {name: (type, docstring, default)}."""
    args = next(node for node in parse(script)[0].body if isinstance(node, ast.ClassDef) and node.name == "Args")
    assert len(args.body) % 2 == 0
    found = {}
    for field, doc in zip(args.body[::2], args.body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign) and isinstance(doc.value.value, str)
        found[field.target.id] = (ast.unparse(field.annotation), doc.value.value, ast.unparse(field.value))
    return found


def shared(per_script):
    """From {script: {name: thing}}, {name: {script: thing}} for the names that several scripts have."""
    names = {name for things in per_script.values() for name in things}
    table = {name: {s: things[name] for s, things in per_script.items() if name in things} for name in names}
    return {name: things for name, things in table.items() if len(things) > 1}


def same_order(per_script):
    """Whether names that two scripts have stand in the same order in both."""
    lists = [list(things) for things in per_script.values()]
    return all([n for n in one if n in two] == [n for n in two if n in one] for one in lists for two in lists)


def test_one_name_is_one_source_everywhere():
    """What stands under one name in several scripts is the same in all of them, or is allowed to differ, and does."""
    found = {script: blocks(script) for script in SCRIPTS}
    for things in found.values():
        del things["__main__"]  # held per pair
    differ = {name for name, sources in shared(found).items() if len(set(sources.values())) > 1}
    assert differ == set(MAY_DIFFER)
    assert same_order(found)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_the_parts_of_its_name(script):
    """No part is missing, renamed, or of another algorithm."""
    expected = EVERYWHERE | ONLY_ALGORITHM[algorithm(script)] | {"__main__"}
    assert set(blocks(script)) == expected | (ONLY_ACPG if script in ACPG else set())


@pairs
def test_twins_differ_in_the_method_only(baseline, acpg):
    """Rollout, returns, loss and update stand in the main block and the functions, all identical in both."""
    ours, theirs = blocks(baseline), blocks(acpg)
    assert {name for name in ours if ours[name] != theirs[name]} == set(MAY_DIFFER)
    assert ours["__main__"] == theirs["__main__"]


@pairs
def test_the_diff_is_small(baseline, acpg):
    """Under 80 changed lines of code, docstrings and comments not counted."""
    code = [ast.unparse(without_docstrings(parse(script)[0])).splitlines() for script in (baseline, acpg)]
    changed = [line for line in difflib.ndiff(*code) if line[0] in "+-"]
    assert 0 < len(changed) < 80


@pairs
def test_twins_networks_differ_in_the_last_layers_only(baseline, acpg):
    """The critic, the encoding and the names are the same."""
    ours, theirs = methods(baseline), methods(acpg)
    assert set(ours) == set(theirs)
    assert {name for name in ours if ours[name] != theirs[name]} == {"__init__", "features", "logits"}


@arms
def test_networks_of_one_arm_differ_in_the_critic_only(scripts):
    """All algorithms have the same network, but that REINFORCE has no critic."""
    found = {script: methods(script) for script in scripts}
    for script, own in found.items():
        without = algorithm(script) == "reinforce"
        assert ("value" in own, "critic" in own["__init__"]) == (not without, not without)
        own["__init__"] = "\n".join(line for line in own["__init__"].splitlines() if "critic" not in line)
    assert set(shared(found)) == {"__init__", "encode", "features", "logits", "value"}
    assert [name for name, sources in shared(found).items() if len(set(sources.values())) > 1] == []


def test_a_shared_option_is_one_option():
    """Fields of Args with one name have one type and docstring, and stand in one order."""
    found = {script: fields(script) for script in SCRIPTS}
    for name, things in shared(found).items():
        assert len({kind for kind, _, _ in things.values()}) == 1, name
        assert len({doc for _, doc, _ in things.values()}) == 1, name
    assert same_order(found)


@pairs
def test_twins_have_the_same_defaults(baseline, acpg):
    """ACPG adds options and changes none."""
    ours, theirs = fields(baseline), fields(acpg)
    assert {name: theirs.get(name) for name in ours} == ours
    assert set(theirs) - set(ours) == {"etf_scale", "feature_constraint", "feature_gain", "action_layer"}


def test_acpg_has_the_same_options_everywhere():
    """The defaults of the layer, too, do not depend on the algorithm."""
    found = [{name: field for name, field in fields(acpg).items() if name not in fields(baseline)} for baseline, acpg in PAIRS]
    assert all(own == found[0] for own in found)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_field_has_a_one_line_docstring(script):
    for name, (_, doc, _) in fields(script).items():
        assert doc and "\n" not in doc, name
