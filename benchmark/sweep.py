"""Paired sweeps of the scripts over environments and seeds, and a report; `bash benchmark.sh` runs this.

    bash benchmark.sh                                  # the default suite
    bash benchmark.sh --quick                          # a few minutes on two cores
    bash benchmark.sh --algos ppo --envs my_package:MyEnv-v0 --total-timesteps 200000 --num-seeds 5 --out my_results
    bash benchmark.sh --algos ppo --arms baseline acpg random=acpg:--action-layer=random
    bash benchmark.sh --extra="--checkpoint-interval 50"   # long runs go on after a stop
    bash benchmark.sh --study benchmark/small.toml         # tuning, report seeds and report, as a file says
    bash benchmark.sh --print | parallel --jobs 32     # anywhere, in any order
    bash benchmark.sh --slurm --slurm-args="--partition=cpu --time=1:00:00"

Run it again after a stop and it goes on where it was: a finished run is recognised by its settings and its script, and
kept. docs/benchmark.md explains.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import tyro

from reading import (
    PACKED,
    VERDICT_SEEDS,
    Damaged,
    has_diverged,
    read_manifest,
    read_packed,
    read_record,
    read_references,
    read_result,
    result_record,
    same_run,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the scripts, and environments such as environments.ideal_cliff:IdealCliffWalking-v0
ALGOS = ("ppo", "a2c", "reinforce", "trpo")
# environment: step budget and what else the scripts need to be told
SUITE = {
    "CartPole-v1": (200_000, ""),
    "Acrobot-v1": (300_000, ""),
    "LunarLander-v3": (500_000, ""),
    "FrozenLake-v1": (200_000, ""),
    "CliffWalking-v1": (200_000, "--max-episode-steps 200"),
    "Taxi-v4": (500_000, ""),
}
DEFAULT_ENVS = ("CartPole-v1", "Acrobot-v1", "LunarLander-v3", "FrozenLake-v1")
# Flags that the sweep sets itself, and those in which arms must not differ
OWN_FLAGS = ("--env-id", "--exp-name", "--seed", "--total-timesteps", "--run-dir", "--resume", "--no-resume")
SHARED_FLAGS = ("--env-kwargs", "--max-episode-steps")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
BOUNDS = {"num_seeds": (1, 10**5), "seeds": (0, 2**32 - 1), "total_timesteps": (1, 10**12), "jobs": (1, 10**4)}


@dataclass
class Args:
    study: Path | None = None
    """a study file, which says all but --out, --jobs, --print and --slurm"""
    algos: list[str] = field(default_factory=lambda: list(ALGOS[:3]))
    """algorithms, of ppo, a2c, reinforce and trpo"""
    envs: list[str] | None = None
    """environment ids, yours as module:MyEnv-v0; default: CartPole-v1 Acrobot-v1 LunarLander-v3 FrozenLake-v1"""
    num_seeds: int | None = None
    """number of seeds, from 1 on; default: 10"""
    seeds: list[int] | None = None
    """these seeds instead"""
    total_timesteps: int | None = None
    """steps of every run; default: the suite's budget for the environment (500,000 for one outside it)"""
    jobs: int = CORES
    """runs at a time, each on one thread"""
    out: Path | None = None
    """folder for everything: runs, logs, manifest, report; default: results/sweep, of a study results/ and its name"""
    extra: str = ""
    """flags for all scripts, written with =, such as --extra="--num-envs 8 --gamma 0.98" """
    arms: list[str] = field(default_factory=lambda: ["baseline", "acpg"])
    """arms: baseline, acpg, or NAME=BASE:FLAGS, such as random=acpg:--action-layer=random"""
    threshold: list[str] = field(default_factory=list)
    """what counts as solved in the report, as ENV=VALUE; for environments without a threshold of their own"""
    quick: bool = False
    """all algorithms on CartPole, 3 seeds, 100,000 steps, unless told otherwise"""
    print: bool = False
    """only list the commands, one per line; each can run anywhere and in any order"""
    runs_only: bool = False
    """only run, without manifest and report, beside other sweeps into the folder if need be"""
    report_only: bool = False
    """only write the manifest and the report"""
    slurm: bool = False
    """submit the same commands to SLURM as one job array, and the report as a job that depends on it"""
    slurm_args: str = ""
    """options for sbatch, written with =, such as --slurm-args="--partition=cpu --time=1:00:00" """


def fail(message):
    sys.exit(f"error: {message}")


# The plan


@dataclass(frozen=True)
class Job:
    """One run: `script` called with `flags`, which mean `args` to it, in the folder `path`; `alone` is the sweep's
    command for this run only."""

    script: str
    flags: tuple
    path: Path
    args: dict = field(compare=False)
    alone: tuple = field(compare=False)

    @property
    def log(self):
        return self.path.parent.parent / "logs" / f"{self.path.name}.log"

    @property
    def command(self):
        resume = ["--resume"] if self.can_resume() else []
        return [sys.executable, str(ROOT / self.script), *self.flags, "--run-dir", str(self.path), *resume]

    def is_mine(self, record):
        return record is not None and same_run(record, self.args, digest(self.script))

    def can_resume(self):
        """Whether its folder has a checkpoint of this very run."""
        try:
            return self.is_mine(read_record(self.path)) and (self.path / "checkpoint.pt").is_file()
        except Damaged:
            return False

    def record(self, packed):
        """run.json of the run with these settings and this script that is finished or has diverged, packed or not, or
        None."""
        record = result_record(self.path)
        if not self.is_mine(record) and self.path.name in packed:
            record = packed[self.path.name].record
        return record if self.is_mine(record) else None


@functools.cache
def digest(script):
    return hashlib.sha256((ROOT / script).read_bytes()).hexdigest()


def describe(job):
    return f"{job.args['env_id']} {job.args['exp_name']} {job.args['seed']}"


def settle(args):
    """Fill in what depends on other options, and end in one line if one of them cannot be."""
    if args.num_seeds is not None and args.seeds is not None:
        fail("--num-seeds and --seeds exclude each other; drop one")
    args.out = args.out or Path("results/sweep")
    for name, (low, high) in BOUNDS.items():
        value = getattr(args, name)
        for x in value if isinstance(value, list) else [] if value is None else [value]:
            if not low <= x <= high:
                fail(f"--{name.replace('_', '-')} must lie between {low} and {high}, got {x}")
    for name in ("algos", "envs", "arms", "seeds"):
        if getattr(args, name) == []:
            fail(f"--{name} needs at least one value")
    if unknown := set(args.algos) - set(ALGOS):
        fail(f"--algos {' '.join(sorted(unknown))}: unknown; choose from {', '.join(ALGOS)}")
    if args.envs is None:
        args.envs = ["CartPole-v1"] if args.quick else list(DEFAULT_ENVS)
    if args.seeds is None:
        args.seeds = list(range(1, 1 + (args.num_seeds or (3 if args.quick else 10))))
    if args.quick and args.total_timesteps is None:
        args.total_timesteps = 100_000
    args.algos, args.envs = list(dict.fromkeys(args.algos)), list(dict.fromkeys(args.envs))
    args.seeds = sorted(set(args.seeds))
    for word in args.threshold:
        env_id, _, value = word.rpartition("=")
        with contextlib.suppress(ValueError):
            if env_id in args.envs and abs(float(value)) < 1e300:
                continue
        fail(f"--threshold {word}: give ENV=VALUE for one of --envs, such as {args.envs[0]}=200")


def read_arms(arms):
    """{name: (base, flags, as given)} of --arms."""
    result = {}
    for arm in arms:
        name, _, rest = arm.partition("=")
        base, _, flags = rest.partition(":") if rest else (name, "", "")
        if base not in ("baseline", "acpg") or not re.fullmatch(r"[\w.-]+", name):
            form = "an arm is baseline, acpg, or NAME=BASE:FLAGS such as random=acpg:--action-layer=random"
            fail(f"--arms {arm}: {form}")
        if name in ("baseline", "acpg") and rest:
            instead = "choose another name, or --extra for flags of all scripts"
            fail(f"--arms {arm}: {name} is the script as it is; {instead}")
        if name in result:
            fail(f"--arms {arm}: {name} is named twice")
        result[name] = (base, split("--arms", flags, OWN_FLAGS + SHARED_FLAGS), arm)
    return result


def split(option, flags, refused=()):
    try:
        words = shlex.split(flags)
    except ValueError as error:
        fail(f"{option} {flags!r}: {error}")
    for word in words:
        if (flag := word.partition("=")[0].replace("_", "-")) in refused:
            instead = "use --envs, --seeds, --total-timesteps or --out"
            if flag in SHARED_FLAGS:
                instead = "use --extra, for all arms"
            elif "resume" in flag:
                instead = "it is done wherever a run left a checkpoint"
            fail(f"{option} {word}: {flag} cannot be set there; {instead}")
    return words


def find_env(env_id):
    """Import the module of an id such as module:MyEnv-v0, as gymnasium.make does, and find the id."""
    import gymnasium as gym

    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        gym.spec(name)
    except Exception as error:  # importing somebody's module can fail in any way
        fail(f"--envs {env_id} is unknown: {' '.join(str(error).split())}")


def script_args(script, flags, options):
    """The script's arguments that `flags` mean, as a dict, checked as the script does; `options` are to blame."""
    module, said = importlib.import_module(script.removesuffix(".py")), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            args = tyro.cli(module.Args, args=list(flags))
        module.check_args(args)
    except SystemExit:
        words = re.sub(r"[^\x20-\x7e]+", " ", said.getvalue()).partition("For full helptext")[0]
        fail(f"{options}: {script}: {' '.join(re.sub('-{3,}', ' ', words).split())[:300]}")
    except Exception as error:
        fail(f"{options}: {script}: {' '.join(str(error).split())}")
    return json.loads(json.dumps(vars(args)))


def plan(args):
    """The jobs of a sweep, seed by seed, so that an unfinished sweep is balanced. Ends with one line for bad input."""
    arms, extra, out = read_arms(args.arms), split("--extra", args.extra, OWN_FLAGS), args.out.resolve()
    cells = []
    for env_id in args.envs:
        find_env(env_id)
        budget, needs = SUITE.get(env_id, (500_000, ""))
        budget = str(args.total_timesteps or budget)
        for algo in args.algos:
            for name, (base, flags, given) in arms.items():
                script, exp_name = f"{algo}_{base}.py", f"{algo}_{name}"
                options = " or ".join(
                    ["--total-timesteps", *["--extra"] * bool(extra), *[f"--arms {given}"] * bool(flags)]
                )
                own = ["--env-id", env_id, "--exp-name", exp_name, "--total-timesteps", budget, *needs.split()]
                own += [*extra, *flags]
                alone = ["--algos", algo, "--envs", env_id, "--arms", given, "--total-timesteps", budget]
                alone += [f"--out={out}", *[f"--extra={args.extra}"] * bool(extra), "--runs-only"]
                cells.append((script, own, script_args(script, own, options), alone))
    return [make_job(*cell, seed, out) for seed in args.seeds for cell in cells]


def make_job(script, flags, script_args, alone, seed, out):
    module, script_args = importlib.import_module(script.removesuffix(".py")), script_args | {"seed": seed}
    folder = module.run_name(script_args["env_id"], script_args["exp_name"], seed)
    words = ("--seed", str(seed), *flags), ("--seeds", str(seed), *alone)
    return Job(script, words[0], out / "runs" / folder, script_args, words[1])


def refuse_other_settings(out, jobs, packed):
    """Ends in one line if runs that the sweep would leave in the folder do not compare with its own."""
    arms = {(job.args["env_id"], job.args["exp_name"]): job for job in jobs}
    budgets = {(e, name.partition("_")[0]): job.args["total_timesteps"] for (e, name), job in arms.items()}
    planned = {job.path.name for job in jobs}
    found = [(path.name, record) for path in sorted((out / "runs").glob("*")) if (record := result_record(path))]
    found = [(name, record) for name, record in found if name not in planned]  # which are replaced
    found += [(f"{PACKED}: {name}", run.record) for name, run in packed.items()]
    for name, record in found:
        own = record["args"]
        job = arms.get((own["env_id"], own["exp_name"]))
        budget = budgets.get((own["env_id"], own["exp_name"].partition("_")[0]), own["total_timesteps"])
        same = job is None or same_run(record, job.args | {"seed": own["seed"]}, digest(job.script))
        if not same or budget != own["total_timesteps"]:
            what = f"{name}, made with other flags or another script"
            fail(f"--out {out} holds {what}; remove it or choose another folder")


def one_command(job):
    """The job as a shell command that runs it once, whoever else tries to."""
    return shlex.join([sys.executable, str(Path(__file__).resolve()), *job.alone])


def write_manifest(out, jobs, packed, command=None):
    """manifest.json: what made the results. Runs planned by earlier sweeps into the same folder stay on its list."""
    path, manifest = out / "manifest.json", read_manifest(out)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError):
        manifest["git_commit"] = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cpu = platform.processor()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        cpu = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    manifest |= {"cpu": cpu, "cores": os.cpu_count(), "platform": platform.platform()}
    manifest |= {"python": platform.python_version()}
    manifest["packages"] = {name: metadata.version(name) for name in ("gymnasium", "numpy", "torch", "tyro")}
    manifest["commands"] = list(dict.fromkeys([*manifest.get("commands", []), *([command] if command else [])]))
    runs = manifest.setdefault("runs", {})
    for job in jobs:
        run = {"script": job.script, "flags": shlex.join(job.flags), "status": "planned", "wall_time": None}
        if record := job.record(packed):
            status = "diverged" if has_diverged(record) else "finished"
            run |= {"status": status, "wall_time": round(record["wall_time"], 2)}
            run["git_commit"] = record["versions"].get("git_commit")
        elif job.log.exists():  # it was begun, now or by an earlier sweep
            run["status"] = "failed"
            with contextlib.suppress(Damaged):
                status = read_record(job.path)["status"]
                run["status"] = "planned" if status == "finished" else status
        runs[job.path.name] = run
    temporary = path.with_name("manifest.json.tmp")
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    temporary.replace(path)


# Running


class Runner:
    """Runs jobs, each in a process of its own, until it is told to stop."""

    def __init__(self, packed):
        self.packed, self.children, self.signal, self.lock = packed, set(), 0, threading.RLock()

    def stop(self, number, _=None):
        """Begin nothing new and pass a signal on: a run ends after its update, at the second signal at once."""
        self.signal = number
        with self.lock:
            for child in self.children:
                child.send_signal(number)
        with contextlib.suppress(OSError):  # the terminal may be gone
            waiting = f"waiting for {len(self.children)} runs to end after their update; " if self.children else ""
            print(
                f"{signal.Signals(number).name}: {waiting}the same command goes on later", file=sys.stderr, flush=True
            )

    def run(self, job):
        """(record, why): the run's result, run now unless it has been, or None and the end of what it said."""
        try:
            job.path.parent.mkdir(parents=True, exist_ok=True)
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with open(job.log.with_suffix(".lock"), "w") as lock:
                self.wait_for(lock, job)
                if job.record(self.packed) is None and not self.signal:
                    self.start(job, lock)
        except OSError as error:
            return None, str(error)
        record = job.record(self.packed)
        if record is not None:
            return record, ""
        lines = job.log.read_text(errors="replace").splitlines()[-8:] if job.log.exists() else []
        if not lines or not lines[-1].startswith("exit status"):  # it ended as it should, and left no whole result
            try:
                read_result(job.path)
            except Damaged as error:
                lines.append(str(error))
        return None, "\n    ".join(lines)

    def wait_for(self, lock, job):
        """Take a run's lock, which its process inherits and keeps should the sweep be killed: no second one joins."""
        said = False
        while not self.signal:
            with contextlib.suppress(BlockingIOError):
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not said:
                print(f"{describe(job)} is being run by another sweep, or outlived one: waiting for it", flush=True)
                said = True
            time.sleep(0.2)

    def start(self, job, lock):
        """Run a job to its end; its log says how it ended."""
        options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "pass_fds": [lock.fileno()]}
        options |= {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "start_new_session": True}
        with open(job.log, "w") as log:
            with self.lock:
                child = subprocess.Popen(job.command, stdout=log, **options)
                self.children.add(child)
                if self.signal:
                    child.send_signal(self.signal)
            status = child.wait()
            with self.lock:
                self.children.remove(child)
            if status:  # below zero: the signal that ended it, such as -9 where memory ran out
                log.seek(0, os.SEEK_END)
                log.write(f"exit status {status}\n")


def clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def sweep(args, jobs, packed):
    """Run all jobs, saying after each how far it is; returns those that failed. Exits with 128 + signal after one."""
    steps = {job: job.args["total_timesteps"] for job in jobs}
    todo = [job for job in jobs if job.record(packed) is None]
    before = f"{len(jobs) - len(todo)} of them finished before"
    print(f"{len(jobs)} runs, {before}, {args.jobs} at a time, into {args.out}", flush=True)
    start, failed, done, done_steps = time.monotonic(), [], len(jobs) - len(todo), 0
    runner = Runner(packed)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's stays
            signal.signal(number, runner.stop)
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(runner.run, job): job for job in todo}
        for future in as_completed(futures):
            if runner.signal:  # as_completed is not told of futures that are cancelled, and would wait for ever
                pool.shutdown(cancel_futures=True)
                break
            job, (record, why) = futures[future], future.result()
            done, done_steps, elapsed = done + 1, done_steps + steps[job], time.monotonic() - start
            left = elapsed / done_steps * (sum(steps[job] for job in todo) - done_steps)
            result = "no episode ended"
            if record is None:
                failed.append(job)
                result = f"FAILED:\n    {why}"
            elif has_diverged(record):
                result = f"diverged, which scores 0: {record['error'].removeprefix('error: ')}"
            elif record["final_return"] is not None:
                result = f"return {record['final_return']:.1f}"
            state = f"{done}/{len(jobs)}, {len(failed)} failed, {clock(elapsed)} elapsed, {clock(left)} left"
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f"[{state}] {describe(job)}: {result}", flush=True)
    if runner.signal:
        if not args.runs_only:
            write_manifest(args.out, jobs, packed)
        sys.exit(128 + runner.signal)
    return failed


def submit(args, jobs, then=None):
    """One SLURM job array over the commands, and a job that waits for all of it to end, well or not: the report, or the
    command `then`."""
    if shutil.which("sbatch") is None:
        fail("--slurm needs SLURM's sbatch on the PATH; --print lists the commands for other schedulers")
    out = args.out.resolve()
    (out / "slurm").mkdir(exist_ok=True)
    (out / "logs").mkdir(exist_ok=True)
    commands = out / "slurm" / "commands.txt"
    commands.write_text("".join(one_command(job) + "\n" for job in jobs))
    tasks = min(len(jobs), 1000)  # SLURM's default MaxArraySize is 1001; beyond that a task takes several commands
    task = f'awk "NR % {tasks} == $SLURM_ARRAY_TASK_ID % {tasks}" {shlex.quote(str(commands))}'
    task += ' | { status=0; while read -r line; do bash -c "$line" </dev/null || status=1; done; exit $status; }'
    settled = dataclasses.replace(args, slurm=False, slurm_args="", quick=False, num_seeds=None, out=out)
    report = then or [sys.executable, str(Path(__file__).resolve()), *as_flags(settled), "--report-only"]
    common = ["sbatch", "--parsable", "--ntasks=1", "--cpus-per-task=1", *split("--slurm-args", args.slurm_args)]
    array = [*common, f"--array=1-{tasks}", "--job-name=acpg", f"--output={out / 'logs' / 'slurm-%A_%a.out'}"]
    ids = []
    for command in ([*array, f"--wrap={task}"], common):
        if ids:
            command = [*command, f"--dependency=afterany:{ids[0]}", "--job-name=acpg-report"]
            command += [f"--output={out / 'logs' / 'slurm-report.out'}", f"--wrap={shlex.join(report)}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            done = f" (the runs are submitted, as job array {ids[0]})" if ids else ""
            fail(f"--slurm: sbatch said: {' '.join(result.stderr.split())}{done}")
        ids.append(result.stdout.strip().split(";")[0])
        (out / "slurm" / "jobs").write_text(",".join(ids))
    print(f"submitted {len(jobs)} runs as job array {ids[0]} and the report as job {ids[1]}; results go to {args.out}")


def as_flags(args):
    """The words of a command line that mean `args`."""
    words = []
    for name, value in as_dict(args).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is True:
            words.append(flag)
        elif value not in (None, False, ""):
            words.append(f"{flag}={value}")
    return words


def submitted(out):
    """SLURM's ids of the jobs that an earlier --slurm left in its queue for this folder, or an empty string."""
    with contextlib.suppress(OSError):
        ids = (out / "slurm" / "jobs").read_text()
        queue = subprocess.run(["squeue", "--noheader", f"--jobs={ids}"], capture_output=True, text=True, check=False)
        return ids if queue.stdout.strip() else ""
    return ""


def write_report(out, thresholds):
    """Ends with the status of report.py, which may import what --envs named."""
    report = [sys.executable, str(ROOT / "benchmark" / "report.py"), str(out), "--import-modules"]
    report += ["--threshold", *thresholds] if thresholds else []
    return subprocess.run(report, check=False).returncode


def claim(out):
    """The open file that holds the lock of the folder; ends in one line if another sweep is there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "sweep.lock", "a")
    except OSError as error:
        fail(f"--out {out} cannot be written: {error.strerror}; choose another")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--out {out}: another sweep is writing there; wait for it or choose another folder")
    if ids := submitted(out):
        who = f"another sweep is writing there, SLURM's jobs {ids}"
        fail(f"--out {out}: {who}; wait for them or choose another folder")
    return lock


def run_study(args):
    """What benchmark/study.py does, unless options say what the study's file does."""
    own = ("study", "out", "jobs", "print", "slurm", "slurm_args")
    different = [k for k, value in as_dict(Args()).items() if k not in own and getattr(args, k) != value]
    if different:
        fail(f"--{different[0].replace('_', '-')}: a study's file says that; drop it or --study")
    low, high = BOUNDS["jobs"]
    if not low <= args.jobs <= high:
        fail(f"--jobs must lie between {low} and {high}, got {args.jobs}")
    import study  # which imports this module

    try:
        study.main(args)
    except Damaged as error:
        fail(f"{error}; remove or restore it")
    except OSError as error:
        fail(f"--out {args.out} cannot be written: {error}")
    except KeyboardInterrupt:
        print("SIGINT: the same command goes on later", file=sys.stderr)
        sys.exit(130)


def as_dict(args):
    return {own.name: getattr(args, own.name) for own in dataclasses.fields(args)}


def main():
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    if args.print and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as other programs end whose output nobody reads on
    if args.study:
        return run_study(args)
    settle(args)
    jobs = plan(args)
    if args.quick and len(args.seeds) < VERDICT_SEEDS:
        print(
            f"--quick: {len(args.seeds)} seeds show that everything works; verdicts take {VERDICT_SEEDS}",
            file=sys.stderr,
        )
    if args.print:
        print("\n".join(one_command(job) for job in jobs))
        return
    try:
        if not args.runs_only and not args.report_only:
            lock = claim(args.out)  # noqa: F841, held until the end
        packed = read_packed(args.out / PACKED)
        if not args.runs_only:
            read_references(args.out)
            refuse_other_settings(args.out, jobs, packed)
            command = None if args.report_only else shlex.join(["bash", "benchmark.sh", *sys.argv[1:]])
            write_manifest(args.out, jobs, packed, command)
        if args.slurm:
            return submit(args, jobs)
        failed = [] if args.report_only else sweep(args, jobs, packed)
        if not args.runs_only:
            write_manifest(args.out, jobs, packed)
    except Damaged as error:
        fail(f"{error}; remove or restore it")
    except OSError as error:
        fail(f"--out {args.out} cannot be written: {error}")
    status = 0 if args.runs_only else write_report(args.out, args.threshold)
    if failed:
        fail(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(map(describe, failed))}; see {args.out / 'logs'}")
    sys.exit(status)


if __name__ == "__main__":
    main()
