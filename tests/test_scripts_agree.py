"""The scripts are copies of one another but for what their names say: the diff is the method, or the algorithm."""

import ast
import difflib
import re
import sys

import pytest
from helpers import ACPG, ALGORITHMS, BASELINES, PAIRS, ROOT, SCRIPTS, algorithm

pairs = pytest.mark.parametrize(("baseline", "acpg"), PAIRS, ids=ALGORITHMS)
arms = pytest.mark.parametrize("scripts", [BASELINES, ACPG], ids=["baseline", "acpg"])

ONLY_ACPG = {"simplex_etf", "ActionLayer", "UnitRows", "constrain"}
ONLY_ALGORITHM = {
    "ppo": {"compute_gae", "ppo_loss", "Adam"},
    "a2c": {"compute_gae", "a2c_loss", "RMSprop"},
    "reinforce": {"compute_returns", "reinforce_loss", "Adam"},
    "trpo": {
        "compute_gae",
        "trpo_objective",
        "conjugate_gradients",
        "flat_grad",
        "fisher_product",
        "update_policy",
        "trpo_loss",
        "Adam",
    },
}
EVERYWHERE = {"Args", "layer_init", "trunk", "Agent", "update"} | {
    *("COLLAPSE_METRICS", "collapse_metrics", "diagnose", "check_args", "adapt", "Envs", "run_name", "read_run", "Run")
}
MAY_DIFFER = {  # by name, with the reason
    "Args": "each algorithm has options of its own, and ACPG those of its layer; fields that are shared are held below",
    "check_args": "checks those options; of twins it is the same",
    "Agent": "ACPG's network ends in another layer, REINFORCE's has no critic; methods are held below",
    "update": "calls the loss, which has the algorithm's name, and says whether it is compiled; held below",
}
LINES = {"ppo": 731, "a2c": 705, "reinforce": 691, "trpo": 775}  # of the ACPG script at most; its baseline is shorter
MAIN_LINES = 110
BANNERS = {
    "method": "The method: a fixed simplex ETF",
    "network": "Network",
    "collapse": "Collapse diagnostics",
    "rest": "Arguments, environments, the run's folder",
}
PACKAGES = {"gymnasium", "numpy", "torch", "tqdm", "tyro"}
LAZY = {"moviepy", "wandb"}  # imported where a flag asks for them


def parse(script):
    """The script's syntax tree and its source."""
    source = (ROOT / f"{script}.py").read_text()
    return ast.parse(source), source


def without_docstrings(tree):
    """The tree without its docstrings (comments are gone anyway)."""
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
    """Args' fields, in order: {name: (type, trailing comment, default)}."""
    tree, source = parse(script)
    args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    found, lines = {}, source.splitlines()
    for field in args.body:
        assert isinstance(field, ast.AnnAssign) and field.lineno == field.end_lineno, "one field a line"
        comment = re.fullmatch(r"  # (\S.*)", lines[field.lineno - 1][field.end_col_offset :])
        assert comment, f"{field.target.id} has no comment"
        found[field.target.id] = (ast.unparse(field.annotation), comment[1], ast.unparse(field.value))
    return found


def code(script):
    """The script's code without docstrings and comments, as lines."""
    return ast.unparse(without_docstrings(parse(script)[0])).splitlines()


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
    assert {name for name in ours if ours[name] != theirs[name]} == {"Args", "Agent"}
    assert ours["__main__"] == theirs["__main__"]


@pairs
def test_the_diff_is_small(baseline, acpg):
    """At most 80 changed lines of code, docstrings and comments not counted."""
    changed = [line for line in difflib.ndiff(code(baseline), code(acpg)) if line[0] in "+-"]
    assert 0 < len(changed) <= 80


def test_update_differs_in_the_name_of_the_loss_only():
    updates = {}
    for script in SCRIPTS:
        (update,) = (n for n in without_docstrings(parse(script)[0]).body if getattr(n, "name", "") == "update")
        text = ast.unparse(update)
        assert text.count(f"{algorithm(script)}_loss(") == 1
        updates[script] = text.replace(f"{algorithm(script)}_loss(", "loss(").replace("minibatch", "batch")
    assert len(set(updates.values())) == 1


@pairs
def test_twins_networks_differ_in_the_last_layers_only(baseline, acpg):
    """The critic, the encoding and the names are the same."""
    ours, theirs = methods(baseline), methods(acpg)
    assert set(ours) == set(theirs)
    assert {name for name in ours if ours[name] != theirs[name]} == {"__init__", "features"}


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
    """Fields of Args with one name have one type and comment, and stand in one order."""
    found = {script: fields(script) for script in SCRIPTS}
    for name, things in shared(found).items():
        assert len({kind for kind, _, _ in things.values()}) == 1, name
        # what is normalised is another thing in each
        assert len({comment for _, comment, _ in things.values()}) == (2 if name == "norm_adv" else 1), name
    assert same_order(found)


@pairs
def test_twins_have_the_same_defaults(baseline, acpg):
    """ACPG adds options and changes none; the layer that it replaces has a gain."""
    ours, theirs = fields(baseline), fields(acpg)
    assert ours.pop("head_gain")
    assert {name: theirs.get(name) for name in ours} == ours
    assert set(theirs) - set(ours) == {"etf_scale", "feature_constraint", "feature_gain", "action_layer"}


def test_acpg_has_the_same_options_everywhere():
    """The defaults of the layer, too, do not depend on the algorithm."""
    found = [
        {name: field for name, field in fields(acpg).items() if name not in fields(baseline)}
        for baseline, acpg in PAIRS
    ]
    assert all(own == found[0] for own in found)


# The form


@pairs
def test_length(baseline, acpg):
    """A script is read in ten minutes: so many lines, baselines shorter than their twins."""
    ours, theirs = (len(parse(script)[1].splitlines()) for script in (baseline, acpg))
    assert ours < theirs <= LINES[algorithm(acpg)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_width(script):
    """No line is longer than 120 columns, and at most a dozen than 110."""
    lines = parse(script)[1].splitlines()
    assert [line for line in lines if len(line) > 120] == []
    assert len([line for line in lines if len(line) > 110]) <= 12


@pytest.mark.parametrize("script", SCRIPTS)
def test_length_of_the_main_block(script):
    assert len(blocks(script)["__main__"].splitlines()) <= MAIN_LINES


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections(script):
    """Banners of one width, in one order, and the method right after the arguments."""
    lines = parse(script)[1].splitlines()
    banners = [line for line in lines if re.fullmatch(r"# .* -{5,}", line)]
    assert len({len(line) for line in banners}) == 1
    own = {"ppo": "PPO", "a2c": "A2C", "reinforce": "REINFORCE", "trpo": "TRPO"}[algorithm(script)]
    expected = [BANNERS["network"], own, BANNERS["collapse"], BANNERS["rest"]]
    assert [re.sub(" -+$", "", line)[2:] for line in banners] == [BANNERS["method"]] * (script in ACPG) + expected
    names = list(blocks(script))
    assert names[0] == "Args" and names[-1] == "__main__"
    assert names[1] == ("simplex_etf" if script in ACPG else "layer_init")
    assert lines.index(banners[0]) < next(i for i, line in enumerate(lines) if f" {names[1]}(" in line)


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports(script):
    """A script stands alone: requirements.txt and the standard library, the rest only where a flag asks for it."""
    tree, _ = parse(script)
    found = {True: set(), False: set()}  # at the top, elsewhere
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module]
        else:
            continue
        found[node in tree.body] |= {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert found == {True: PACKAGES, False: LAZY}
    required = (ROOT / "requirements.txt").read_text()
    assert all(re.search(rf"^{name}\b", required, re.MULTILINE) for name in PACKAGES | {"tensorboard"})
