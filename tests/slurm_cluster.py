"""A Slurm of one node, of its own: private directory, key, ports and configuration; nothing of it is left behind.

By hand, as root: python -m tests.slurm_cluster srun --partition=debug --mpi=pmi2 -n 2 .venv/bin/distinf info
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "squeue", "sinfo", "scontrol")
PARTITION = "debug"
START_S = 60
CONFIG = """
ClusterName=distinf
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
# Cgroups are not ours to use in a container: processes are found by parentage, ranks bound by sched_setaffinity.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# Look for jobs to start every second, not every minute.
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MpiDefault=none
KillWait=5
{node} NodeAddr=127.0.0.1 State=UNKNOWN
PartitionName={partition} Nodes=ALL State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; "" when one can."""
    if os.geteuid() != 0:
        return "starting Slurm needs root"
    absent = [name for name in PROGRAMS if _find(name) is None]
    return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge" if absent else ""


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@contextmanager
def slurm_cluster() -> Iterator[dict[str, str]]:
    """The environment in which sbatch, srun and scancel talk to the cluster; it ends with the context."""
    with ExitStack() as stack:
        # Not below pytest's own directories: the path of a Unix socket has 107 characters at most.
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
        env = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
        _configure(root)
        key, sock = root / "munge.key", root / "munge.socket"
        pid, log, seed = root / "munged.pid", root / "munged.log", root / "munge.seed"
        files = [
            f"--key-file={key}",
            f"--socket={sock}",
            f"--pid-file={pid}",
            f"--log-file={log}",
            f"--seed-file={seed}",
        ]
        stack.enter_context(_daemon(["munged", "--foreground", "--force", *files], root, env))
        _wait(sock.exists, "munged's socket", root)
        stack.enter_context(_daemon(["slurmctld", "-D", "-f", env["SLURM_CONF"]], root, env))
        stack.enter_context(_daemon(["slurmd", "-D", "-f", env["SLURM_CONF"]], root, env))
        _wait(lambda: _ask(["sinfo", "--noheader", "--format=%T"], env) == "idle", "an idle node", root)
        yield env
        _ask(["scancel", "--user=root"], env)
        _wait(lambda: not _ask(["squeue", "--noheader"], env), "the end of the jobs", root)


def _configure(root: Path) -> None:
    for folder in ("state", "spool"):
        (root / folder).mkdir()
    (root / "munge.key").write_bytes(secrets.token_bytes(128))
    (root / "munge.key").chmod(0o400)
    found = subprocess.run([_find("slurmd") or "", "-C"], capture_output=True, text=True, check=True).stdout
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        ports = [s.getsockname()[1] for s in (a, b)]
    host = socket.gethostname().partition(".")[0]
    text = CONFIG.format(host=host, ports=ports, root=root, node=found.splitlines()[0], partition=PARTITION)
    (root / "slurm.conf").write_text(text)


@contextmanager
def _daemon(command: list[str], root: Path, env: dict[str, str]) -> Iterator[None]:
    """A daemon in the foreground, its output in a file, ended with everything that it started."""
    with (root / f"{command[0]}.out").open("wb") as out:
        process = subprocess.Popen([_find(command[0]) or "", *command[1:]], stdout=out, stderr=out, env=env)
    try:
        yield
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=10)
        for one in alive:
            one.kill()
        process.wait()


def _ask(command: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=START_S)
    return done.stdout.strip() if done.returncode == 0 else f"status {done.returncode}"


def _wait(done: Callable[[], bool], what: str, root: Path) -> None:
    deadline = time.monotonic() + START_S
    while not done():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{path.name}: {path.read_text(errors='replace')}" for path in sorted(root.glob("*.out")))
            raise TimeoutError(f"waited {START_S} s for {what}\n{logs}")
        time.sleep(0.1)


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    with slurm_cluster() as environment:
        sys.exit(subprocess.run(sys.argv[1:], env=environment).returncode)
