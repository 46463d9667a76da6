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
import importlib
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for environments such as environments.ideal_cliff:IdealCliffWalking-v0
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
OWN_FLAGS = ("--env-id", "--exp-name", "--seed", "--total-timesteps", "--run-dir")  # which the sweep sets itself
SHARED_FLAGS = ("--env-kwargs", "--max-episode-steps")  # in which arms must not differ
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Args:
    algos: list[str] = field(default_factory=lambda: list(ALGOS))
    """algorithms"""
    envs: list[str] | None = None
    """environment ids, yours as module:MyEnv-v0; default: CartPole-v1 Acrobot-v1 LunarLander-v3 FrozenLake-v1"""
    seeds: list[str] | None = None
    """one number: so many seeds from 1 on; several: these seeds (one alone: twice); default: 10"""
    total_timesteps: int | None = None
    """steps of every run; default: the suite's budget for the environment (500,000 for one outside it)"""
    jobs: int = CORES
    """runs at a time, each on one thread"""
    out: Path = Path("results/sweep")
    """folder for everything: runs, logs, manifest, report"""
    extra: str = ""
    """flags for all scripts, such as "--num-envs 8 --gamma 0.98" """
    arms: list[str] = field(default_factory=lambda: ["baseline", "acpg"])
    """arms: baseline, acpg, or NAME=BASE:FLAGS, such as random=acpg:--action-layer=random"""
    quick: bool = False
    """all algorithms on CartPole, 3 seeds, 100,000 steps, unless told otherwise"""
    print: bool = False
    """only list the commands, one per line; each can run anywhere and in any order"""
    slurm: bool = False
    """submit the same commands to SLURM as one job array, and the report as a job that depends on it"""
    slurm_args: str = ""
    """options for sbatch, such as "--partition=cpu --time=1:00:00" """


@dataclass(frozen=True)
class Job:
    """One run: `script` called with `flags`, in the folder `path`."""

    script: str
    flags: tuple
    path: Path

    @property
    def command(self):
        return [sys.executable, str(ROOT / self.script), *self.flags, "--run-dir", str(self.path)]

    def value(self, flag):
        return self.flags[self.flags.index(flag) + 1]

    @property
    def record(self):
        """run.json of the finished run with these settings and this script, or None."""
        record = read_record(self.path)
        same = record.get("status") == "finished" and record["argv"][:-2] == list(
            self.flags
        )  # then --run-dir, which may move
        return record if same and record["script_sha256"] == digest(self.script) else None

    def run(self):
        """Run it unless it has been run; return its record, or None if it failed, in which case the log says why."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        (log := self.log).parent.mkdir(parents=True, exist_ok=True)
        # The child inherits the lock, and keeps it should this process be killed: no second run then joins it there.
        with open(log.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.record is None:
                (self.path / "run.json.tmp").unlink(missing_ok=True)  # of a run that was killed while it wrote that
                with open(log, "w") as file:
                    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                    options = {"stdout": file, "stderr": subprocess.STDOUT, "pass_fds": [lock.fileno()]}
                    status = subprocess.run(
                        self.command, env=environment, stdin=subprocess.DEVNULL, check=False, **options
                    )
                    if status.returncode:  # below zero: the signal that ended it, such as -9 where memory ran out
                        file.seek(0, os.SEEK_END)
                        file.write(f"exit status {status.returncode}\n")
            return self.record

    @property
    def log(self):
        return self.path.parent.parent / "logs" / f"{self.path.name}.log"


def read_record(folder):
    """run.json of a run's folder, with the keys that this program reads; empty if there is none, or one of something
    else."""
    try:
        record = json.loads((folder / "run.json").read_text())
        return {key: record[key] for key in ("status", "argv", "script_sha256", "args", "versions")} | record
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def digest(script):
    return hashlib.sha256((ROOT / script).read_bytes()).hexdigest()


def fail(message):
    sys.exit(f"error: {message}")


def find_spec(env_id):
    """gymnasium's spec of an id such as module:MyEnv-v0, whose module is imported first, as gymnasium.make does."""
    import gymnasium as gym

    module, _, name = env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    return gym.spec(name)


def plan(args):
    """The jobs of a sweep, seed by seed, so that an unfinished sweep is balanced. Ends with one line for bad input."""
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
        if base not in ("baseline", "acpg") or not re.fullmatch(r"[\w.-]+", name):
            fail(
                f"--arms {arm}: an arm is baseline, acpg, or NAME=BASE:FLAGS such as random=acpg:--action-layer=random"
            )
        if name in ("baseline", "acpg") and rest:
            fail(
                f"--arms {arm}: {name} is the script as it is; choose another name, or --extra for flags of all scripts"
            )
        if name in arms:
            fail(f"--arms {arm}: {name} is named twice")
        arms[name] = (base, split("--arms", flags, OWN_FLAGS + SHARED_FLAGS))
    extra = split("--extra", args.extra, OWN_FLAGS)
    jobs = []
    for seed in seeds:
        for env_id in dict.fromkeys(args.envs):
            try:
                find_spec(env_id)
            except Exception as error:  # importing somebody's module can fail in any way
                fail(f"--envs {env_id} is unknown: {' '.join(str(error).split())}")
            budget, needs = SUITE.get(env_id, (500_000, ""))
            for algo in dict.fromkeys(args.algos):
                for name, (base, flags) in arms.items():
                    own = ["--env-id", env_id, "--exp-name", f"{algo}_{name}", "--seed", str(seed)]
                    own += ["--total-timesteps", str(args.total_timesteps or budget), *needs.split()]
                    folder = re.sub(r"[^\w.=-]+", "_", f"{env_id}__{algo}_{name}__{seed}")
                    flags_all = (*own, *extra, *flags)
                    jobs.append(Job(f"{algo}_{base}.py", flags_all, args.out.resolve() / "runs" / folder))
    return jobs


def split(option, flags, refused=()):
    try:
        words = shlex.split(flags)
    except ValueError as error:
        fail(f"{option} {flags!r}: {error}")
    for word in words:
        if (flag := word.partition("=")[0].replace("_", "-")) in refused:
            instead = "--extra, for all arms" if flag in SHARED_FLAGS else "--envs, --seeds, --total-timesteps or --out"
            fail(f"{option} {word}: {flag} cannot be set there; use {instead}")
    return words


def refuse_other_settings(out, jobs):
    """Ends in one line if runs that the sweep would leave in the folder do not compare with its own."""
    strip = lambda flags: [word for k, word in enumerate(flags) if "--seed" not in (word, flags[max(k - 1, 0)])]  # noqa: E731
    planned = {job.path.name for job in jobs}
    arms = {(job.value("--env-id"), job.value("--exp-name")): job for job in jobs}
    budgets = {(env_id, name.partition("_")[0]): job.value("--total-timesteps") for (env_id, name), job in arms.items()}
    for path in sorted((out / "runs").glob("*")):
        record = read_record(path)
        if path.name in planned or record.get("status") != "finished":
            continue
        own, flags = record["args"], record["argv"][:-2]
        job = arms.get((own["env_id"], own["exp_name"]))
        budget = budgets.get((own["env_id"], own["exp_name"].partition("_")[0]), str(own["total_timesteps"]))
        same = job is None or (strip(flags) == strip(job.flags) and record["script_sha256"] == digest(job.script))
        if not same or budget != str(own["total_timesteps"]):
            what = f"{path.name}, made with other flags or another script"
            fail(f"--out {out} holds {what}; remove it or choose another folder")


def describe(job):
    return job.path.name.replace("__", " ")


def one_command(job):
    """The job as a shell command that runs it once, whoever else tries to."""
    return shlex.join([sys.executable, str(Path(__file__).resolve()), "--one", str(job.path), job.script, *job.flags])


def write_manifest(out, jobs, command=None):
    """manifest.json: what made the results. Runs planned by earlier sweeps into the same folder stay on its list."""
    path = out / "manifest.json"
    try:
        manifest = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        manifest = {}
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError):
        manifest["git_commit"] = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cpu = platform.processor()
    with contextlib.suppress(OSError, AttributeError):
        cpu = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    manifest |= {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    manifest["packages"] = {name: metadata.version(name) for name in ("gymnasium", "numpy", "torch", "tyro")}
    manifest["commands"] = list(dict.fromkeys([*manifest.get("commands", []), *([command] if command else [])]))
    runs = manifest.setdefault("runs", {})
    for job in jobs:
        run = {"script": job.script, "flags": shlex.join(job.flags), "status": "planned", "wall_time": None}
        if record := job.record:
            run |= {"status": "finished", "wall_time": round(record["wall_time"], 2)}
            run["git_commit"] = record["versions"].get("git_commit")
        elif job.log.exists():  # it was begun, now or by an earlier sweep
            status = read_record(job.path).get("status", "failed")
            run["status"] = "planned" if status == "finished" else status
        runs[job.path.name] = run
    temporary = path.with_name("manifest.json.tmp")
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    temporary.replace(path)


def clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def sweep(args, jobs):
    """Run all jobs, saying after each how far it is; returns those that failed."""
    steps = {job: int(job.value("--total-timesteps")) for job in jobs}
    todo = [job for job in jobs if job.record is None]
    print(
        f"{len(jobs)} runs, {len(jobs) - len(todo)} of them finished before, {args.jobs} at a time, into {args.out}",
        flush=True,
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
            write_manifest(args.out, jobs)
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
    task = f'awk "NR % {tasks} == $SLURM_ARRAY_TASK_ID % {tasks}" {shlex.quote(str(commands))}'
    task += ' | { status=0; while read -r line; do bash -c "$line" </dev/null || status=1; done; exit $status; }'
    report = shlex.join([sys.executable, str(Path(__file__).resolve()), "--finish", str(args.out.resolve())])
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
            done = f" (the runs are submitted, as job array {ids[0]})" if ids else ""
            fail(f"--slurm: sbatch said: {' '.join(result.stderr.split())}{done}")
        ids.append(result.stdout.strip().split(";")[0])
        (folder / "jobs").write_text(",".join(ids))
    print(f"submitted {len(jobs)} runs as job array {ids[0]} and the report as job {ids[1]}; results go to {args.out}")


def submitted(out):
    """SLURM's ids of the jobs that an earlier --slurm left in its queue for this folder, or an empty string."""
    with contextlib.suppress(OSError):
        ids = (out / "slurm" / "jobs").read_text()
        queue = subprocess.run(["squeue", "--noheader", f"--jobs={ids}"], capture_output=True, text=True, check=False)
        return ids if queue.stdout.strip() else ""
    return ""


def finish(out):
    """The end of a sweep that SLURM ran: the manifest anew, and the report."""
    lines = [shlex.split(line) for line in (out / "slurm" / "commands.txt").read_text().splitlines()]
    jobs = [Job(script, tuple(flags), Path(path)) for _, _, _, path, script, *flags in lines]
    write_manifest(out, jobs)
    return write_report(out)


def write_report(out):
    return subprocess.run([sys.executable, str(ROOT / "benchmark" / "report.py"), str(out)], check=False).returncode


def main():
    if sys.argv[1:2] == ["--one"]:  # a line of --print: FOLDER SCRIPT FLAGS...
        path, script, *flags = sys.argv[2:]
        job = Job(script, tuple(flags), Path(path))
        if job.run() is None:
            fail(f"{describe(job)} failed:\n{job.log.read_text(errors='replace')[-2000:]}")
        return
    if sys.argv[1:2] == ["--finish"]:
        sys.exit(finish(Path(sys.argv[2])))
    argv = sys.argv[1:]
    for k in range(len(argv) - 1, 0, -1):
        if argv[k - 1] in ("--extra", "--slurm-args"):  # whose value begins with dashes, which tyro takes for options
            argv[k - 1 : k + 1] = [f"{argv[k - 1]}={argv[k]}"]
    args = tyro.cli(Args, args=argv, description=__doc__.partition("\n\n")[0])
    if args.envs is None:
        args.envs = ["CartPole-v1"] if args.quick else list(DEFAULT_ENVS)
    if args.seeds is None:
        args.seeds = ["3"] if args.quick else ["10"]
    if args.quick and args.total_timesteps is None:
        args.total_timesteps = 100_000
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
    if ids := submitted(args.out):
        who = f"another sweep is writing there, SLURM's jobs {ids}"
        fail(f"--out {args.out}: {who}; wait for them or choose another folder")
    refuse_other_settings(args.out, jobs)
    write_manifest(args.out, jobs, shlex.join(["bash", "benchmark.sh", *sys.argv[1:]]))
    if args.slurm:
        return submit(args, jobs)
    failed = sweep(args, jobs)
    write_manifest(args.out, jobs)
    status = write_report(args.out)
    if failed:
        fail(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(map(describe, failed))}; see {args.out / 'logs'}")
    sys.exit(status)


if __name__ == "__main__":
    main()
