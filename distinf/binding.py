"""What this process is bound to: cores and memory policy, read from the kernel, never what we asked for.

`root` is where /proc and /sys begin, as in `topology`.
"""

from __future__ import annotations

import ctypes
import os
import platform
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path

from distinf.cgroup import cpu_quota, cpuset
from distinf.topology import Machine, Offer, parse_cpu_list, read_text

ROOT = Path("/")
# set_mempolicy(2): system call numbers and modes (linux/mempolicy.h). The C library has no wrapper.
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
_PREFERRED, _PREFERRED_MANY = 1, 5
_MASK_BITS = 1024  # the kernel's largest number of nodes
_BATCH_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "PE_HOSTFILE")  # their cpusets are what was asked for


@dataclass(frozen=True)
class Binding:
    """One rank, as the kernel has it."""

    host: str
    leader: int  # the lowest rank on the same machine
    nodes: list[int]  # NUMA nodes of the cores
    thread_cpus: list[list[int]]  # of each compute thread: the CPUs that it may run on
    cores: list[int]  # of all of these
    policy: str  # for new memory, in the kernel's words: "default", "prefer:1", ...
    remote_nodes: list[int]  # where memory comes from although other memory is nearer
    quota_cores: float | None  # CPU time that the cgroup allows, in cores
    hidden_cores: int  # that the cgroup takes away without a batch job's asking

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return len(self.thread_cpus)


def read_back(
    thread_ids: Sequence[int],
    threads: int,
    leader: int,
    machine: Machine,
    root: Path = ROOT,
    affinity: Callable[[int], set[int]] = os.sched_getaffinity,
) -> Binding:
    """The kernel's account of this process, whose `threads` compute threads have these ids.

    Kernels that do not start their threads themselves know the first one only: the others may run where it may.
    """
    known = [sorted(affinity(thread)) for thread in thread_ids]
    thread_cpus = known + known[:1] * (threads - len(known))
    cpus = sorted(set().union(*thread_cpus))
    return Binding(
        host=socket.gethostname(),
        leader=leader,
        nodes=machine.nodes_of(cpus),
        thread_cpus=thread_cpus,
        cores=sorted({machine.core.get(cpu, cpu) for cpu in cpus}),
        policy=memory_policy(root),
        remote_nodes=_remote_sources(cpus, machine, root),
        quota_cores=cpu_quota(root),
        hidden_cores=_hidden_cores(machine, root),
    )


def offer(rank: int, machine: Machine, one_core: bool) -> Offer:
    """What the launcher left to this process, and what it had itself."""
    try:
        launcher = os.sched_getaffinity(os.getppid())
    except OSError:  # the parent is outside our process namespace
        launcher = set(allowed_cpus())
    room = len(machine.one_cpu_of_each_core(launcher))
    # Under srun the parent is Slurm's own daemon, which may use the whole machine.
    return Offer(rank, allowed_cores(), min(room, int(os.environ.get("SLURM_CPUS_ON_NODE", room))), one_core)


@cache
def allowed_cpus() -> frozenset[int]:
    """CPUs that this process may run on: what the launcher and cgroup left.

    Asked once: a thread team pins the calling thread, and a later one would take its core for all there is.
    """
    return frozenset(os.sched_getaffinity(0))


def allowed_cores() -> list[int]:
    """One of `allowed_cpus` for each core."""
    return Machine.read().one_cpu_of_each_core(set(allowed_cpus()))


def memory_policy(root: Path = ROOT) -> str:
    """Policy of this process for new memory, as numa_maps(5) writes it; "unknown" where the kernel has no NUMA.

    The first mapping is the program's own text: it has no policy of its own and shows the process's.
    get_mempolicy(2) would tell the same, but containers forbid it.
    """
    try:
        with (root / "proc/self/numa_maps").open() as mappings:
            first = mappings.readline()
    except OSError:
        first = ""
    return " ".join(takewhile(lambda word: "=" not in word, first.split()[1:])) or "unknown"


def _allowed_memory(root: Path) -> set[int]:
    """Nodes that the cpuset lets this process have memory of."""
    lines = read_text(root / "proc/self/status").splitlines()
    return parse_cpu_list(next((line.split(":")[1] for line in lines if line.startswith("Mems_allowed_list:")), ""))


def _remote_sources(cpus: Sequence[int], machine: Machine, root: Path) -> list[int]:
    """Nodes that new memory comes from without being nearest to these CPUs; memory-only nodes count as near too."""
    mode, _, nodes = memory_policy(root).partition(":")
    if mode == "unknown":
        return []
    sources = parse_cpu_list(nodes) or machine.memory_near(cpus, _allowed_memory(root))
    return sorted(set(sources) - _near(cpus, machine))


def _near(cpus: Sequence[int], machine: Machine) -> set[int]:
    everywhere = set(machine.nodes)
    return {n for memory_only in (False, True) for n in machine.memory_near(cpus, everywhere, memory_only)}


def bind_memory(membind: str, cpus: Sequence[int], machine: Machine, root: Path = ROOT) -> str:
    """Have this thread, and those that it starts from here on, take memory near `cpus`; returns a warning or "".

    auto: from the node of the cores. A rank on several nodes keeps the default, by which each thread gets memory
    of its own node, and a policy that was inherited, from numactl for instance, is left as it is. hbm: from the
    nearest memory-only nodes. off: nothing is set. Preferred and not bound: where a node is full the rest comes
    from another one, slower and with a warning, while a bound rank would be killed.

    Raises ValueError for hbm on a machine without memory-only nodes.
    """
    nodes = machine.memory_near(cpus, _allowed_memory(root), memory_only=membind == "hbm")
    if membind == "hbm" and not nodes:
        raise ValueError("--membind hbm: no NUMA node of this machine is memory alone; expected auto or off")
    if membind == "off" or not nodes:
        return ""
    if membind == "auto" and (len(nodes) > 1 or memory_policy(root) not in ("default", "unknown")):
        return ""
    reason = _set_policy(_PREFERRED if len(nodes) == 1 else _PREFERRED_MANY, nodes)
    return f"the memory policy could not be set ({reason}); a container needs CAP_SYS_NICE for it" if reason else ""


def _set_policy(mode: int, nodes: Sequence[int]) -> str:
    """set_mempolicy(2) for this thread; returns why not, or ""."""
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None:
        return f"unknown on {platform.machine()}"
    mask = (ctypes.c_uint64 * (_MASK_BITS // 64))()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.syscall(ctypes.c_long(number), ctypes.c_int(mode), mask, ctypes.c_ulong(_MASK_BITS))
    return os.strerror(ctypes.get_errno()) if failed else ""


def remote_bytes(cpus: Sequence[int], machine: Machine, root: Path = ROOT) -> int:
    """This process's own memory (no mapped files) on nodes that are not nearest to `cpus`, by numa_maps(5)."""
    near, found = _near(cpus, machine), 0
    for line in read_text(root / "proc/self/numa_maps").splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "file" in fields:
            continue
        for name, pages in fields.items():
            if name[0] == "N" and name[1:].isdigit() and int(name[1:]) not in near:
                found += int(pages) * int(fields["kernelpagesize_kB"]) * 1024
    return found


def _hidden_cores(machine: Machine, root: Path) -> int:
    """Cores of this machine that the cgroup takes away, unless a batch system made the cgroup for this job."""
    left = cpuset(root)
    if not left or any(name in os.environ for name in _BATCH_JOBS):
        return 0
    return len(set(machine.core.values())) - len(machine.one_cpu_of_each_core(left))
