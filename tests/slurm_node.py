"""A single-node SLURM on the loopback address, for tests: munged, slurmctld and slurmd of slurm-wlm and munge."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

DAEMONS = {
    name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for name in ("munged", "slurmctld", "slurmd")
}
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not():
    """Why SLURM cannot be started here, or an empty string."""
    if missing := [name for name, path in DAEMONS.items() if path is None]:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "slurmd needs root"


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def slurm(folder):
    """Start the daemons with all their files in `folder`; yields the environment for sbatch and squeue."""
    folder = Path(folder)
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    folder.chmod(0o755)
    conf = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    conf.write_text(CONF.format(folder=folder, host=host, ports=free_ports(2), cpus=os.cpu_count()))
    env = {**os.environ, "SLURM_CONF": str(conf)}
    munge = [
        DAEMONS["munged"],
        "--foreground",
        "--force",
        f"--key-file={folder}/munge.key",
        f"--socket={folder}/munge.socket",
    ]
    munge += [f"--{name}={folder}/munge.{name}" for name in ("pid-file", "log-file", "seed-file")]
    with contextlib.ExitStack() as stack:
        for command in (munge, [DAEMONS["slurmctld"], "-D"], [DAEMONS["slurmd"], "-D", "-N", host]):
            process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(process.wait, timeout=30)
            stack.callback(process.terminate)
            time.sleep(1)
        deadline = time.monotonic() + 60
        while (
            "idle"
            not in (
                state := subprocess.run(["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True)
            ).stdout
        ):
            logs = "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("*log*")) if path.is_file())
            assert time.monotonic() < deadline, f"SLURM did not come up: {state.stdout}{state.stderr}\n{logs}"
            time.sleep(0.5)
        yield env
