"""Which cores a rank computes on: read from the kernel and the launcher's placement, never assumed."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

_CPU = Path("/sys/devices/system/cpu")


@cache
def allowed_cores() -> list[int]:
    """Cores that this process may run on, one hardware thread of each: what the launcher and cgroup left.

    Asked once: a thread team pins the calling thread, and a later one would take its core for all there is.
    """
    allowed = os.sched_getaffinity(0)
    return sorted(cpu for cpu in allowed if cpu == min(_siblings(cpu) & allowed))


def _siblings(cpu: int) -> set[int]:
    """Hardware threads of the core of `cpu`, itself included."""
    try:
        text = (_CPU / f"cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return {cpu}
    return parse_cpu_list(text) | {cpu}


def parse_cpu_list(text: str) -> set[int]:
    """The kernel's list format: "0-2,8" -> {0, 1, 2, 8}."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def numa_node(cpu: int) -> int | None:
    """NUMA node of a core, or None where the kernel shows none."""
    nodes = sorted((_CPU / f"cpu{cpu}").glob("node[0-9]*"))
    return int(nodes[0].name.removeprefix("node")) if nodes else None


def place(node_cores: list[list[int]], index: int, threads: int) -> tuple[tuple[int, ...], bool]:
    """Cores of the `index`-th rank of a node, one per thread, and whether they are oversubscribed.

    `node_cores` has every rank's allowed cores. A launcher that gave this rank cores of its own is followed;
    ranks that were left with the same cores divide them. `threads` 0 takes every core of the rank; more
    threads than cores are not pinned (-1).
    """
    mine = node_cores[index]
    sharing = [i for i, cores in enumerate(node_cores) if set(cores) & set(mine)]
    place_in, n = sharing.index(index), len(sharing)
    crowded = len(mine) < n
    own = [mine[place_in % len(mine)]] if crowded else mine[place_in * len(mine) // n : (place_in + 1) * len(mine) // n]
    if threads == 0 or threads == len(own):
        return tuple(own), crowded
    if threads < len(own):
        return tuple(own[:threads]), crowded
    return (-1,) * threads, True
