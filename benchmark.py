"""Paired sweeps of the scripts over environments and seeds, and a report; `bash benchmark.sh` runs this.

    bash benchmark.sh                                  # the default suite
    bash benchmark.sh --quick                          # a few minutes on two cores
    bash benchmark.sh --algos ppo --envs my_package:MyEnv-v0 --total-timesteps 200000 --seeds 5 --out my_results
    bash benchmark.sh --algos ppo --arms baseline acpg random=acpg:--action-layer=random
    bash benchmark.sh --print | parallel --jobs 32     # anywhere, in any order
    bash benchmark.sh --slurm --slurm-args "--partition=cpu --time=1:00:00"

Run it again after a stop and it goes on where it was: a finished run is recognised by its settings and its script, and
kept. docs/benchmark.md explains.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent
ALGOS = ("ppo", "a2c", "reinforce")
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


@dataclass
class Args:
    algos: list[str] = field(default_factory=lambda: list(ALGOS))
    """algorithms"""
    envs: list[str] = field(default_factory=lambda: list(DEFAULT_ENVS))
    """environment ids, yours as module:MyEnv-v0"""
    seeds: list[str] = field(default_factory=lambda: ["10"])
    """one number: so many seeds from 1 on; several: these seeds"""
    total_timesteps: int | None = None
    """steps of every run; default: the suite's budget for the environment (500,000 for one outside it)"""
    jobs: int = os.cpu_count() or 1
    """runs at a time, each on one thread"""
    out: Path = Path("results/sweep")
    """folder for everything: runs, logs, manifest, report"""
    extra: str = ""
    """flags for all scripts, such as --extra=--learning-rate=8e-4 or --extra="--num-envs 8 --gamma 0.98" """
    arms: list[str] = field(default_factory=lambda: ["baseline", "acpg"])
    """arms: baseline, acpg, or NAME=BASE:FLAGS, such as random=acpg:--action-layer=random"""
    quick: bool = False
    """all algorithms on CartPole, 3 seeds, 100,000 steps, unless told otherwise"""
    print: bool = False
    """only list the commands, one per line; each can run anywhere and in any order"""
    slurm: bool = False
    """submit the same commands to SLURM as one job array, and the report as a job that depends on it"""
    slurm_args: str = ""
    """options for sbatch, such as --slurm-args "--partition=cpu --time=1:00:00" """


@dataclass(frozen=True)
class Job:
    """One run: `script` called with `flags`, in the folder `path`."""

    script: str
    flags: tuple
    path: Path

    @property
    def command(self):
        return [sys.executable, str(ROOT / self.script), *self.flags, "--run-dir", str(self.path)]

    @property
    def record(self):
        """run.json of the finished run with these settings and this script, or None."""
        try:
            record = json.loads((self.path / "run.json").read_text())
            same = record["status"] == "finished" and record["argv"][:-2] == list(self.flags)  # then --run-dir, which may move
            return record if same and record["script_sha256"] == digest(self.script) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def run(self):
        """Run it unless it has been run; return its record, or None if it failed, in which case the log says why."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        (log := self.log).parent.mkdir(parents=True, exist_ok=True)
        # The child inherits the lock, and keeps it should this process be killed: no second run then joins it there.
        with open(log.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.record is None:
                with open(log, "w") as file:
                    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                    options = {"stdout": file, "stderr": subprocess.STDOUT, "pass_fds": [lock.fileno()]}
                    subprocess.run(self.command, env=environment, stdin=subprocess.DEVNULL, check=False, **options)
            return self.record

    @property
    def log(self):
        return self.path.parent.parent / "logs" / f"{self.path.name}.log"


def digest(script):
    return hashlib.sha256((ROOT / script).read_bytes()).hexdigest()


def fail(message):
    sys.exit(f"error: {message}")


def plan(args):
    """The jobs of a sweep, seed by seed, so that an unfinished sweep is balanced. Ends with one line for bad input."""
    import gymnasium as gym

    if unknown := set(args.algos) - set(ALGOS):
        fail(f"--algos {' '.join(sorted(unknown))}: unknown; choose from {', '.join(ALGOS)}")
    if not (args.algos and args.envs and args.arms and args.seeds):
        fail("--algos, --envs, --arms and --seeds must not be empty")
    if not all(seed.isdecimal() for seed in args.seeds):
        fail(f"--seeds {' '.join(args.seeds)}: give a count such as 10, or several seeds such as 1 2 5")
    seeds = [int(seed) for seed in args.seeds]
    seeds = sorted(set(seeds)) if len(seeds) > 1 else range(1, seeds[0] + 1)
    if not seeds:
        fail("--seeds 0: give at least 1")
    if args.jobs < 1:
        fail(f"--jobs must be at least 1, got {args.jobs}")
    if args.total_timesteps is not None and args.total_timesteps < 1:
        fail(f"--total-timesteps must be at least 1, got {args.total_timesteps}")
    arms = {}
    for arm in args.arms:
        name, _, rest = arm.partition("=")
        base, _, flags = rest.partition(":") if rest else (name, "", "")
        if base not in ("baseline", "acpg") or not re.fullmatch(r"[A-Za-z0-9.-]+", name):
            fail(f"--arms {arm}: an arm is baseline, acpg, or NAME=BASE:FLAGS such as random=acpg:--action-layer=random")
        if name in arms:
            fail(f"--arms {arm}: {name} is named twice")
        arms[name] = (base, split("--arms", flags))
    jobs = []
    for seed in seeds:
        for env_id in dict.fromkeys(args.envs):
            try:
                gym.spec(env_id)
            except Exception as error:  # importing somebody's module can fail in any way
                fail(f"--envs {env_id} is unknown: {' '.join(str(error).split())}")
            budget, needs = SUITE.get(env_id, (500_000, ""))
            for algo in dict.fromkeys(args.algos):
                for name, (base, flags) in arms.items():
                    own = ["--env-id", env_id, "--exp-name", f"{algo}_{name}", "--seed", str(seed)]
                    own += ["--total-timesteps", str(args.total_timesteps or budget), *needs.split()]
                    folder = re.sub(r"[^\w.=-]+", "_", f"{env_id}__{algo}_{name}__{seed}")
                    flags_all = (*own, *split("--extra", args.extra), *flags)
                    jobs.append(Job(f"{algo}_{base}.py", flags_all, args.out.resolve() / "runs" / folder))
    return jobs


def split(option, flags):
    try:
        return shlex.split(flags)
    except ValueError as error:
        fail(f"{option} {flags!r}: {error}")


def describe(job):
    return job.path.name.replace("__", " ")


def one_command(job):
    """The job as a shell command that runs it once, whoever else tries to."""
    return shlex.join([sys.executable, str(ROOT / "benchmark.py"), "--one", str(job.path), job.script, *job.flags])


def write_manifest(args, jobs):
    """manifest.json: what made the results. Runs planned by earlier sweeps into the same folder stay on its list."""
    path = args.out / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError):
        manifest = {}
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError):
        manifest["git_commit"] = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cpu = platform.processor()
    with contextlib.suppress(OSError, AttributeError):
        cpu = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    manifest |= {"cpu": cpu, "cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
    manifest["packages"] = {name: metadata.version(name) for name in ("gymnasium", "numpy", "torch", "tyro")}
    manifest["commands"] = list(
        dict.fromkeys([*manifest.get("commands", []), shlex.join(["bash", "benchmark.sh", *sys.argv[1:]])])
    )
    runs = manifest.setdefault("runs", {})
    for job in jobs:
        record = job.record
        runs[job.path.name] = {"script": job.script, "flags": shlex.join(job.flags)} | (
            {"status": "finished", "wall_time": round(record["wall_time"], 2)}
            if record
            else {"status": "failed" if job.log.exists() else "planned", "wall_time": None}
        )
    temporary = path.with_name("manifest.json.tmp")
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    temporary.replace(path)


def clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def sweep(args, jobs):
    """Run all jobs, saying after each how far it is; returns those that failed."""
    steps = {job: int(job.flags[job.flags.index("--total-timesteps") + 1]) for job in jobs}
    todo = [job for job in jobs if job.record is None]
    print(
        f"{len(jobs)} runs, {len(jobs) - len(todo)} of them finished before, {args.jobs} at a time, into {args.out}", flush=True
    )
    start, failed, done, done_steps = time.monotonic(), [], len(jobs) - len(todo), 0
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            futures = {pool.submit(job.run): job for job in todo}
            for future in as_completed(futures):
                job, record = futures[future], future.result()
                done, done_steps, elapsed = done + 1, done_steps + steps[job], time.monotonic() - start
                left = elapsed / done_steps * (sum(steps[job] for job in todo) - done_steps)
                if record is None:
                    failed.append(job)
                    result = "FAILED:\n    " + "\n    ".join(job.log.read_text(errors="replace").splitlines()[-8:])
                else:
                    final = record["final_return"]
                    result = f"return {final:.1f}" if final is not None else "no episode ended"
                print(
                    f"[{done}/{len(jobs)}, {len(failed)} failed, {clock(elapsed)} elapsed, {clock(left)} left] "
                    f"{describe(job)}: {result}",
                    flush=True,
                )
        except KeyboardInterrupt:  # the runs got it too, and end after the update in progress
            pool.shutdown(cancel_futures=True)
            print("interrupted; run the same command again to go on", file=sys.stderr)
            sys.exit(130)
    return failed


def submit(args, jobs):
    """One SLURM job array over the commands, and a report job that waits for all of it to end, well or not."""
    if shutil.which("sbatch") is None:
        fail("--slurm needs SLURM's sbatch on the PATH; --print lists the commands for other schedulers")
    folder = args.out.resolve() / "slurm"
    folder.mkdir(exist_ok=True)
    (args.out / "logs").mkdir(exist_ok=True)
    commands = folder / "commands.txt"
    commands.write_text("".join(one_command(job) + "\n" for job in jobs))
    tasks = min(len(jobs), 1000)  # SLURM's default MaxArraySize is 1001; beyond that a task takes several commands
    task = f'awk "NR % {tasks} == $SLURM_ARRAY_TASK_ID % {tasks}" {shlex.quote(str(commands))} | bash'
    report = shlex.join([sys.executable, str(ROOT / "report.py"), str(args.out.resolve())])
    common = ["sbatch", "--parsable", "--ntasks=1", "--cpus-per-task=1", *split("--slurm-args", args.slurm_args)]
    logs = str(args.out.resolve() / "logs" / "slurm-%A_%a.out")
    array = [*common, f"--array=1-{tasks}", "--job-name=acpg", f"--output={logs}", f"--wrap={task}"]
    ids = []
    for command in (array, common):
        if ids:
            command = [*command, f"--dependency=afterany:{ids[0]}", "--job-name=acpg-report"]
            command += [f"--output={args.out.resolve() / 'logs' / 'slurm-report.out'}", f"--wrap={report}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            fail(f"--slurm: sbatch said: {' '.join(result.stderr.split())}")
        ids.append(result.stdout.strip().split(";")[0])
    print(f"submitted {len(jobs)} runs as job array {ids[0]} and the report as job {ids[1]}; results go to {args.out}")


def main():
    if sys.argv[1:2] == ["--one"]:  # a line of --print: FOLDER SCRIPT FLAGS...
        path, script, *flags = sys.argv[2:]
        job = Job(script, tuple(flags), Path(path))
        if job.run() is None:
            fail(f"{describe(job)} failed:\n{job.log.read_text(errors='replace')[-2000:]}")
        return
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    if args.quick:
        defaults = Args()
        args.envs = args.envs if args.envs != defaults.envs else ["CartPole-v1"]
        args.seeds = args.seeds if args.seeds != defaults.seeds else ["3"]
        args.total_timesteps = args.total_timesteps or 100_000
    jobs = plan(args)
    if args.print:
        print("\n".join(one_command(job) for job in jobs))
        return
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        lock = open(args.out / "sweep.lock", "a")
    except OSError as error:
        fail(f"--out {args.out} cannot be written: {error.strerror}; choose another")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--out {args.out}: another sweep is writing there; wait for it or choose another folder")
    write_manifest(args, jobs)
    if args.slurm:
        return submit(args, jobs)
    failed = sweep(args, jobs)
    write_manifest(args, jobs)
    report = subprocess.run([sys.executable, str(ROOT / "report.py"), str(args.out)], check=False)
    if failed:
        fail(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(map(describe, failed))}; see {args.out / 'logs'}")
    sys.exit(report.returncode)


if __name__ == "__main__":
    main()
