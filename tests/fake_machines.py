"""/sys, /proc and cgroup trees of machines that the tests do not run on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from distinf.topology import Machine, format_cpu_list, parse_cpu_list


@dataclass(frozen=True)
class FakeNode:
    """A NUMA node to be; distances to all nodes, in order."""

    cores: range | list[int]
    distances: list[int]
    socket: int = 0
    gb: int = 128
    read_mb_s: int = 0


@dataclass(frozen=True)
class FakeMachine:
    """Nodes, and how much to add to a core's number for its second hardware thread (0: it has none)."""

    nodes: list[FakeNode]
    second_thread: int = 0

    def write(self, root: Path) -> Machine:
        """The tree under `root`, and what is read from it."""
        tree = root / "sys/devices/system"
        for i, node in enumerate(self.nodes):
            about = f"node/node{i}"
            put(tree / about / "cpulist", format_cpu_list([t for c in node.cores for t in self._threads(c)]))
            put(tree / about / "distance", " ".join(map(str, node.distances)))
            put(tree / about / "meminfo", f"Node {i} MemTotal: {node.gb << 20} kB\nNode {i} MemFree: 1 kB")
            if node.read_mb_s:
                put(tree / about / "access0/initiators/read_bandwidth", str(node.read_mb_s))
            for core in node.cores:
                for thread in self._threads(core):
                    cpu = tree / f"cpu/cpu{thread}/topology"
                    put(cpu / "physical_package_id", str(node.socket))
                    put(cpu / "thread_siblings_list", format_cpu_list(self._threads(core)))
        put(tree / "node/online", format_cpu_list(range(len(self.nodes))))
        put(tree / "cpu/online", format_cpu_list([t for n in self.nodes for c in n.cores for t in self._threads(c)]))
        return Machine.read(root)

    def _threads(self, core: int) -> list[int]:
        return [core, core + self.second_thread] if self.second_thread else [core]


@dataclass(frozen=True)
class FakeProcess:
    """/proc/self to be: where each thread may run, its memory, its cgroups."""

    threads: dict[int, str]  # thread id -> list of the CPUs that it may run on
    policy: str = "default"
    mems: str = "0-7"
    cgroup: str = "0::/"
    mappings: list[str] = field(default_factory=list)

    def affinity(self, thread: int) -> set[int]:
        """What sched_getaffinity would say."""
        return parse_cpu_list(self.threads[thread])

    def write(self, root: Path) -> None:
        """The tree under `root`."""
        proc = root / "proc/self"
        put(proc / "status", f"Name:\tpython\nMems_allowed:\t1\nMems_allowed_list:\t{self.mems}")
        put(proc / "cgroup", self.cgroup)
        text = f"00400000 {self.policy} file=/usr/bin/python3 mapped=5 N0=5 kernelpagesize_kB=4"
        put(proc / "numa_maps", "\n".join([text, *self.mappings]))


def put(path: Path, text: str) -> None:
    """A file as the kernel shows it, with a newline at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def _snc4_distances(node: int) -> list[int]:
    return [10 if node == other else 12 if node // 4 == other // 4 else 21 for other in range(8)]


TWO_SOCKETS = FakeMachine([FakeNode(range(0, 4), [10, 21]), FakeNode(range(4, 8), [21, 10], socket=1)], second_thread=8)
SNC4 = FakeMachine([FakeNode(range(2 * i, 2 * i + 2), _snc4_distances(i), i // 4) for i in range(8)])
# Xeon Max in flat mode: a socket's HBM is a node of its own, at distance 13.
HBM = FakeMachine([FakeNode(range(4), [10, 13]), FakeNode([], [13, 10], gb=64)])
TWO_SOCKETS_HBM = FakeMachine(
    [
        FakeNode(range(4), [10, 21, 13, 23]), FakeNode(range(4, 8), [21, 10, 23, 13], socket=1),
        FakeNode([], [13, 23, 10, 23], gb=64), FakeNode([], [23, 13, 23, 10], gb=64),
    ]
)  # fmt: skip
# Cores counted in turn over the sockets, as many firmwares do: odd ones are on socket 1.
ALTERNATING = FakeMachine([FakeNode(range(0, 12, 2), [10, 21]), FakeNode(range(1, 12, 2), [21, 10], socket=1)])
