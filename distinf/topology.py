"""What this machine is, from the kernel's /sys: sockets, NUMA nodes, cores and memory; how ranks divide its cores.

`root` is where the tree begins, so that tests describe machines that they do not have.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Node:
    """A NUMA node: cores with the memory next to them, or memory alone (HBM in flat mode, CXL)."""

    cpus: frozenset[int]  # hardware threads
    memory_bytes: int  # 0: a socket, or part of one, without DIMMs
    distances: Mapping[int, int]  # to each node; 10 is the node itself (ACPI, System Locality Information Table)
    read_mb_s: int  # from the nearest cores, by the firmware (ACPI HMAT); 0 where it does not say


@dataclass(frozen=True)
class Machine:
    """Cores and memory of one machine. `socket`, `core` and `node` have an entry for each online CPU.

    A CPU is a hardware thread, as the kernel numbers them; a core is called by the lowest of its CPUs.
    """

    socket: Mapping[int, int]
    core: Mapping[int, int]
    node: Mapping[int, int]
    nodes: Mapping[int, Node]

    @property
    def levels(self) -> tuple[Mapping[int, int], ...]:
        """What `divide` keeps ranks within."""
        return self.socket, self.node

    @classmethod
    def read(cls, root: Path = Path("/")) -> Machine:
        """Parts that the tree does not show: CPUs without siblings, on socket 0 and node 0."""
        tree = root / "sys/devices/system"
        nodes = {i: _read_node(tree / "node", i) for i in sorted(parse_cpu_list(read_text(tree / "node/online")))}
        online = parse_cpu_list(read_text(tree / "cpu/online")) or set(range(os.cpu_count() or 1))
        socket, core = {}, {}
        for cpu in online:
            about = tree / f"cpu/cpu{cpu}/topology"
            socket[cpu] = int(read_text(about / "physical_package_id") or 0)
            core[cpu] = min(parse_cpu_list(read_text(about / "thread_siblings_list")) & online | {cpu})
        node_of = {cpu: i for i, node in nodes.items() for cpu in node.cpus}
        return cls(socket, core, {cpu: node_of.get(cpu, 0) for cpu in online}, nodes)

    def one_cpu_of_each_core(self, cpus: set[int]) -> list[int]:
        """One of `cpus` for each core that they belong to, in order."""
        first: dict[int, int] = {}
        for cpu in sorted(cpus):
            first.setdefault(self.core.get(cpu, cpu), cpu)
        return sorted(first.values())

    def nodes_of(self, cpus: Sequence[int]) -> list[int]:
        """NUMA nodes of these CPUs, in order."""
        return sorted({self.node.get(cpu, 0) for cpu in cpus})

    def memory_near(self, cpus: Sequence[int], allowed: set[int], memory_only: bool = False) -> list[int]:
        """Nodes with the memory nearest to `cpus` among the `allowed` ones: their own nodes, where these have any.

        `memory_only`: among nodes without cores instead, leaving out those that the firmware says are slower.
        """
        near = set()
        for home in self.nodes_of(cpus):
            speed = self.nodes[home].read_mb_s if home in self.nodes else 0
            candidates = [
                i
                for i, node in self.nodes.items()
                if i in allowed and node.memory_bytes and bool(node.cpus) != memory_only
                and not (memory_only and node.read_mb_s and node.read_mb_s < speed)
            ]  # fmt: skip
            if candidates:
                near.add(min(candidates, key=lambda i: self._distance(home, i)))
        return sorted(near)

    def _distance(self, a: int, b: int) -> int:
        return self.nodes[a].distances.get(b, 255) if a in self.nodes else 255  # 255: unreachable


def _read_node(tree: Path, i: int) -> Node:
    about = tree / f"node{i}"
    others = sorted(parse_cpu_list(read_text(tree / "online")))
    distances = map(int, read_text(about / "distance").split())
    total_kb = next((line.split()[3] for line in read_text(about / "meminfo").splitlines() if "MemTotal" in line), "0")
    return Node(
        frozenset(parse_cpu_list(read_text(about / "cpulist"))),
        1024 * int(total_kb),
        dict(zip(others, distances, strict=False)),
        int(read_text(about / "access0/initiators/read_bandwidth") or 0),
    )


def read_text(path: Path) -> str:
    """A file of /sys or /proc; "" where this kernel, or a container, does not show it."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def parse_cpu_list(text: str) -> set[int]:
    """The kernel's list format: "0-2,8" -> {0, 1, 2, 8}."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def format_cpu_list(cpus: Sequence[int] | set[int]) -> str:
    """The other way: {0, 1, 2, 8} -> "0-2,8"."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def divide(cores: Sequence[int], n: int, levels: Sequence[Mapping[int, int]]) -> list[list[int]]:
    """`n` parts of at least n cores; each core is in one part.

    `levels` map a core to its socket, its NUMA node, ... from the outside in: no part crosses a border of a
    level where there are parts enough for all its areas, and otherwise a part is several whole areas.
    """
    if n == 1:
        return [list(cores)]
    if not levels:
        return [list(cores[len(cores) * i // n : len(cores) * (i + 1) // n]) for i in range(n)]
    by_area: dict[int, list[int]] = {}
    for core in cores:
        by_area.setdefault(levels[0].get(core, 0), []).append(core)
    areas = [by_area[key] for key in sorted(by_area)]
    if n < len(areas):
        whole = [areas[len(areas) * i // n : len(areas) * (i + 1) // n] for i in range(n)]
        return [[core for area in part for core in area] for part in whole]
    parts_of = [1] * len(areas)
    for _ in range(n - len(areas)):  # another part where that leaves the most cores in each
        parts_of[max(range(len(areas)), key=lambda a: len(areas[a]) / (parts_of[a] + 1))] += 1
    return [part for area, k in zip(areas, parts_of, strict=True) for part in divide(area, k, levels[1:])]


@dataclass(frozen=True)
class Offer:
    """What the launcher left to one rank."""

    rank: int
    cores: list[int]  # a CPU of each core that the rank may use
    launcher_cores: int  # that the launcher itself may use on this machine
    one_core: bool = False  # its work is done elsewhere, on a GPU: one core is enough


def place(
    offers: list[Offer], index: int, threads: int, levels: Sequence[Mapping[int, int]]
) -> tuple[tuple[int, ...], bool]:
    """CPUs of the `index`-th rank of a machine, one for each thread, and whether they are oversubscribed.

    `offers` are those of all its ranks; `levels` as in `divide`. A launcher that gave this rank cores of its own
    is followed; ranks that were left with the same cores divide them. `threads` 0 takes every core of the rank;
    more threads than cores are not pinned (-1).

    Raises ValueError when ranks were tied to the same core though there is one for each of them.
    """
    _check_apart(offers)
    mine = offers[index].cores
    alike = [i for i, offer in enumerate(offers) if offer.cores == mine]
    position, crowded = alike.index(index), len(mine) < len(alike)
    one_core = [offers[i].one_core for i in alike]
    own = [mine[position % len(mine)]] if crowded else _parts(mine, one_core, levels)[position]
    if offers[index].one_core:
        threads = min(threads, len(own))
    shared = crowded or len(_sharing(offers, index)) > len(alike)
    if threads > len(own):
        return (-1,) * threads, True
    return tuple(own[: threads or None]), shared


def _parts(cores: list[int], one_core: list[bool], levels: Sequence[Mapping[int, int]]) -> list[list[int]]:
    """A part for each rank: the last cores for those that need only one; the others divide the rest."""
    few = sum(one_core)
    if few in (0, len(one_core)):
        return divide(cores, len(one_core), levels)
    rest, last = iter(divide(cores[:-few], len(one_core) - few, levels)), iter(cores[-few:])
    return [[next(last)] if one else next(rest) for one in one_core]


def _sharing(offers: list[Offer], index: int) -> list[int]:
    """Ranks with one of the `index`-th rank's cores, itself included."""
    return [offer.rank for offer in offers if set(offer.cores) & set(offers[index].cores)]


def _check_apart(offers: list[Offer]) -> None:
    room = min(offer.launcher_cores for offer in offers)
    if len(offers) > room:
        return  # more ranks than cores: sharing was asked for
    for index, offer in enumerate(offers):
        ranks = _sharing(offers, index)
        others = [o.cores for o in offers if o.rank in ranks]
        if len(offer.cores) < len(ranks) or any(cores != offer.cores for cores in others):
            common = set(offer.cores).intersection(*others) or offer.cores
            raise ValueError(
                f"ranks {', '.join(map(str, ranks))} on {os.uname().nodename} are all tied to core "
                f"{format_cpu_list(common)}, but there are {room} cores for {len(offers)} ranks; give each its own, or "
                "leave pinning to the launcher (I_MPI_PIN_PROCESSOR_LIST, I_MPI_PIN_DOMAIN, --cpu-bind, --bind-to)"
            )
