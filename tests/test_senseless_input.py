"""Every number that any program takes as an option: what makes no sense is refused, in words that name the option.

Options are found in each program's Args; what is legitimate among the values below stands in a table.
"""

import contextlib
import importlib
import io
import sys
import typing
from pathlib import Path
from unittest.mock import patch

import pytest
import tyro
from helpers import SCRIPTS

VALUES = ("nan", "inf", "-inf", "1e39", "-1", "0", "99999999999")
BIG = {"99999999999"}
# Those of VALUES that an option may have: none of an option that is not here. What is too big for one's patience or
# memory and still means something is the user's.
SCRIPT = {
    **dict.fromkeys(("seed", "diagnostics_interval", "checkpoint_interval"), {"0"}),
    **dict.fromkeys(("gamma", "gae_lambda"), {"0"}),
    **dict.fromkeys(("ent_coef", "vf_coef", "target_kl"), {"0"} | BIG),
    **dict.fromkeys(("learning_rate", "clip_coef", "max_grad_norm", "etf_scale", "feature_gain", "head_gain"), BIG),
    **dict.fromkeys(("total_timesteps", "max_episode_steps", "update_epochs", "num_episodes"), BIG),
}
SCRIPT |= {key: SCRIPT.get(key, set()) | BIG for key in ("log_interval", "diagnostics_interval", "checkpoint_interval")}
TRPO = {"damping": {"0"} | BIG, **dict.fromkeys(("max_kl", "cg_iterations", "line_search_steps"), BIG)}
LEGITIMATE = {
    **dict.fromkeys(SCRIPTS, SCRIPT),
    **dict.fromkeys(
        ("reinforce_baseline", "reinforce_acpg"), SCRIPT | {"num_minibatches": BIG, "minibatch_size": BIG}
    ),  # a part a step at least
    **dict.fromkeys(("trpo_baseline", "trpo_acpg"), SCRIPT | TRPO),
    "evaluate": {"seed": {"0"}},
    "emergence": {"gamma": {"0"}},
    "learning": {"seeds": {"0"}},
    "paper_setting": {"seeds": {"0"}},
    "theory": {"advantages": {"0", "-1"}, "seed": {"0"}},
    "sweep": {"seeds": {"0"}, "total_timesteps": BIG},
    "report": {"seed": {"0"}},
}
STUDIES = (
    "emergence",
    "imitation",
    "interval_coverage",
    "learning",
    "paper_setting",
    "parity",
    "tabular",
    "theory",
    "tuned",
    "tuned_checks",
)
STUDIES += ("throughput",)
POSITIONAL = {"evaluate": ["run"], "report": ["."], "learning": ["report-ppo"]}
PROGRAMS = (*SCRIPTS, "evaluate", *STUDIES, "sweep", "report")
# The first function that a program calls once it has checked its options
NEXT = {"sweep": "plan", "report": "read_runs"}


class Accepted(Exception):
    """A program was about to begin."""


def numbers(module):
    """(name, is a list) of each option that is a number, or a list of numbers."""
    for name, kind in typing.get_type_hints(module.Args).items():
        kinds = {kind, *typing.get_args(kind)}
        inner = kinds | {argument for k in kinds for argument in typing.get_args(k)}
        if inner & {int, float}:
            yield name, any(typing.get_origin(k) is list for k in kinds)


def cases():
    for program in PROGRAMS:
        for name, is_list in numbers(importlib.import_module(program)):
            yield pytest.param(program, name, is_list, id=f"{program} {name}")


def say(program, *words):
    """What a program says to these options, or None if it would begin to work."""
    module, said = importlib.import_module(program), io.StringIO()
    command = [program, *POSITIONAL.get(program, []), *words]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(contextlib.redirect_stderr(said))
        try:
            if program in SCRIPTS:  # as their first two lines do
                module.check_args(tyro.cli(module.Args, args=command[1:]))
                return None
            stack.enter_context(patch.object(sys, "argv", command))
            stack.enter_context(patch.object(module, *begin(program, module)))
            module.main()
        except Accepted:
            return None
        except ValueError as error:
            return str(error)
        except SystemExit as end:
            return f"{end.code if isinstance(end.code, str) else ''}{said.getvalue()}"
    raise AssertionError(f"{program} {words} ended")


def begin(program, module):
    """(name, function): a function of the module, and what raises Accepted in its place once options are checked."""
    name = NEXT.get(program, "check_numbers")
    before = None if program in NEXT else module.check_numbers

    def stop(*args, **kwargs):
        if before:
            before(*args, **kwargs)
        raise Accepted

    return name, stop


@pytest.mark.parametrize("program, name, is_list", list(cases()))
def test_numbers(program, name, is_list, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flag = f"--{name.replace('_', '-')}"
    for value in VALUES:
        said = say(program, f"{flag}={value}") if not is_list else say(program, flag, value)
        if said is None:
            assert value in LEGITIMATE.get(program, {}).get(name, ()), f"{flag} {value} is accepted"
        else:
            assert flag in said and "Traceback" not in said, said
            assert value not in LEGITIMATE.get(program, {}).get(name, ()), f"{flag} {value} is refused: {said}"
    if is_list:
        assert flag in (say(program, flag) or ""), "an empty list is accepted"
    assert not list(tmp_path.iterdir())


def test_programs_without_numbers():
    """All programs with options are above, but those that take no number."""
    root = Path(__file__).resolve().parent.parent
    files = [*root.glob("*.py"), *root.glob("studies/*.py"), *root.glob("benchmark/*.py")]
    programs = {path.stem for path in files if "tyro.cli" in path.read_text()}
    without = {"pack", "tables"}
    assert programs - set(PROGRAMS) == without
    assert not [option for program in without for option in numbers(importlib.import_module(program))]
    assert set(PROGRAMS) <= programs
