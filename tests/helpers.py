"""What the tests share: running a script inside this process, and reading what it left."""

import ast
import contextlib
import csv
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
import types
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import probe_envs
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
ALGORITHMS = ("ppo", "a2c", "reinforce", "trpo")
PAIRS = tuple((f"{name}_baseline", f"{name}_acpg") for name in ALGORITHMS)
SCRIPTS = tuple(script for pair in PAIRS for script in pair)
BASELINES, ACPG = zip(*PAIRS, strict=True)
WITH_CRITIC = tuple(script for script in SCRIPTS if not script.startswith("reinforce"))
FROZEN = ("--learning-rate", "1e-30")  # trains, without moving any weight that is not zero


def frozen(script):
    """Flags with which the script trains, without moving any weight that is not zero."""
    return (*FROZEN, "--max-kl", "1e-38") if algorithm(script) == "trpo" else FROZEN


def trained_by_optimizer(script, agent):
    """The part of an agent that the script's optimizer trains: all of it, but in TRPO the critic."""
    return agent.critic if algorithm(script) == "trpo" else agent


def algorithm(script):
    """ppo, a2c, reinforce or trpo."""
    return script.split("_")[0]


def tiny(script, length=1, updates=2):
    """Flags for two environments and batches of 32 steps, and as many steps as `updates` of those take.

    REINFORCE takes episodes instead, as many as fit into 32 steps if each takes `length`: so many updates then, or more
    where episodes are shorter, fewer where they are longer, and perhaps a batch that the run's end leaves incomplete.
    """
    own = {
        "ppo": ("--num-steps", 16, "--update-epochs", 1),
        "a2c": ("--num-steps", 16, "--diagnostics-interval", 20),
        "reinforce": ("--num-episodes", 16 // length),
        "trpo": ("--num-steps", 16, "--num-minibatches", 4, "--update-epochs", 1, "--diagnostics-interval", 20),
    }
    return ("--total-timesteps", 32 * updates, "--num-envs", 2, "--log-interval", 1, *own[algorithm(script)])


@dataclass
class Result:
    """How a script ended: its exit status, what it printed, and (unless it exited early) its global variables."""

    status: int
    stdout: str
    stderr: str
    globals: dict = field(default_factory=dict, repr=False)

    def __getattr__(self, name):
        try:
            return self.globals[name]
        except KeyError as error:
            raise AttributeError(f"the script defined no {name}; it ended with: {self.stderr}") from error


def flags(env_id, run_dir=None, *more):
    """The command line for one environment; `more` may hold anything that str() can turn into an argument."""
    env_id = f"probe_envs:{env_id}-v0" if env_id.isalpha() else env_id
    return ["--env-id", env_id, "--no-cuda", *(["--run-dir", str(run_dir)] if run_dir else []), *map(str, more)]


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


def patch_script(module):
    """What `execute` does to a script's functions and classes before its main block runs; tests put their own here."""


def execute(path, namespace):
    """runpy.run_path(path, run_name="__main__"), but for `patch_script` between the definitions and the main block."""
    tree, module, main = ast.parse(path.read_text()), types.ModuleType("__main__"), sys.modules["__main__"]
    *definitions, block = tree.body
    assert isinstance(block, ast.If) and ast.unparse(block.test) == "__name__ == '__main__'"
    module.__file__, module.__doc__ = str(path), ast.get_docstring(tree, clean=False)
    sys.modules["__main__"] = module  # where dataclasses and tyro look for the source
    try:
        exec(compile(ast.Module(definitions, []), path, "exec"), module.__dict__)
        patch_script(module)
        exec(compile(ast.Module([block], []), path, "exec"), module.__dict__)
    finally:
        sys.modules["__main__"] = main
        namespace.update(module.__dict__)


def run_script(script, env_id, run_dir=None, *more, terminal=False):
    """Run a script in this process, as `python script.py ...` would, and return its Result.

    An environment id of letters only means one of probe_envs. Warnings go to stderr, as they do for a user; `terminal`
    is whether stderr claims to be one.
    """
    stdout, stderr, namespace, argv = io.StringIO(), Terminal() if terminal else io.StringIO(), {}, sys.argv
    path = sys.path.copy()  # to which the scripts append
    status, hook = 0, threading.excepthook
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # (a shell starts what it puts into the background with Ctrl-C ignored)

    def show(message, category, filename, lineno, file=None, line=None):
        print(warnings.formatwarning(message, category, filename, lineno, line), file=stderr, end="")

    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), warnings.catch_warnings():
        warnings.showwarning = show
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        sys.argv = [f"{script}.py", *flags(env_id, run_dir, *more)]
        try:
            execute(ROOT / f"{script}.py", namespace)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
            if isinstance(error.code, str):
                print(error.code, file=stderr)
        except BaseException:  # KeyboardInterrupt too, which would end pytest
            status = 1
            traceback.print_exc(file=stderr)
        finally:
            sys.argv, sys.path[:], threading.excepthook = argv, path, hook
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Result(status, stdout.getvalue(), stderr.getvalue(), namespace)


def train(script, env_id, run_dir, *more):
    """Like `run_script`, for runs that have to succeed."""
    result = run_script(script, env_id, run_dir, *more)
    assert result.status == 0, result.stderr
    return result


def start_script(script, env_id, run_dir, *more, **kwargs):
    """Start a script as a process of its own."""
    paths = os.pathsep.join((str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags(env_id, run_dir, *more)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, text=True, **kwargs)


def read_progress(run_dir):
    """The rows of progress.csv, as dictionaries of strings."""
    with open(Path(run_dir) / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_record(run_dir):
    """run.json, what is stored with the run."""
    return json.loads((Path(run_dir) / "run.json").read_text())


def event_files(run_dir):
    """The TensorBoard files anywhere in the run's folder."""
    return sorted(Path(run_dir).rglob("events.out.tfevents.*"))


def read_events(run_dir):
    """(scalars, texts): {tag: [(step, value), ...]} and the set of text tags in the run's one event file."""
    (path,) = event_files(run_dir)
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars, set(events.Tags()["tensors"])


def snapshot(folder):
    """Every file below `folder` with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def steps_by_env():
    """The recorded step() calls of each environment that was stepped, in the order of their construction."""
    steps = sorted((call for call in probe_envs.CALLS if call.kind == "step"), key=lambda call: call.env)  # stable
    return [list(calls) for _, calls in itertools.groupby(steps, key=lambda call: call.env)]


def advantages_by_hand(agent, calls, gamma, gae_lambda):
    """Generalized advantage estimates of consecutive steps of one environment, straight from their definition."""
    with torch.no_grad():
        before = agent.value(torch.as_tensor(np.stack([call.obs for call in calls]))).tolist()
        after = agent.value(torch.as_tensor(np.stack([call.after for call in calls]))).tolist()
    advantages = []
    for start in range(len(calls)):
        total, factor = 0.0, 1.0
        for call, value, next_value in list(zip(calls, before, after, strict=True))[start:]:
            total += factor * (call.reward + (0.0 if call.terminated else gamma * next_value) - value)
            if call.terminated or call.truncated:
                break
            factor *= gamma * gae_lambda
        advantages.append(total)
    return advantages


def record_gradients(monkeypatch):
    """A list that grows by the clipped gradient, one vector, of each update; probe_envs.CALLS notes the update, too.

    Of an optimiser with a huge epsilon the first step goes along the clipped gradient; so each real step is made by
    such a one first, with the same gradients and bound, from zero.
    """
    gradients = []

    def patch(module):
        optimizer = module.Adam if hasattr(module, "Adam") else module.RMSprop
        original = optimizer.step

        def step(self, grads, lr, max_grad_norm):
            probe = optimizer([torch.zeros_like(param) for param in self.params])
            original(probe, [grad.clone() for grad in grads], torch.tensor(1e6), max_grad_norm, eps=1e6)
            gradients.append(-torch.cat([param.flatten() for param in probe.params]))
            probe_envs.CALLS.append(probe_envs.Call(None, "update", None))
            return original(self, grads, lr, max_grad_norm)

        optimizer.step = step

    monkeypatch.setattr(sys.modules[__name__], "patch_script", patch)
    return gradients
