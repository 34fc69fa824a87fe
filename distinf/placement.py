"""Ranks take their cores and memory, and tell each other what the kernel gave them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from distinf.binding import Binding, allowed_cpus, bind_memory, offer, read_back, remote_bytes
from distinf.comm import Group, agreed
from distinf.kernels import Kernels, Placement
from distinf.topology import Machine, format_cpu_list, place

LINES = 8  # ranks that get a line each; more of them share lines
REMOTE_BYTES = 10**9  # twice what Python and its libraries may have taken elsewhere before the rank was bound


@dataclass(frozen=True)
class Bound:
    """This rank's kernels, on its own cores, and what every rank is bound to."""

    kernels: Kernels
    machine: Machine
    bindings: Mapping[int, Binding]  # by rank
    warnings: list[str]  # the same on every rank


def bind(
    group: Group, threads: int, membind: str, load: Callable[[Placement], Kernels], one_core: bool = False
) -> Bound:
    """Choose this rank's cores and memory, bind to them, start its kernels there, and read all back. Collective.

    Ranks of a node share its cores by what the launcher left to each; `threads` as in `topology.place`, `one_core` as
    in `topology.Offer`, `membind` as in `binding.bind_memory`. Raises InputError for a placement, or kernels, that
    cannot be had.
    """
    machine = Machine.read()
    offers, mates = group.all_gather_object(offer(group.rank, machine, one_core)), group.node_mates()
    near = [offers[mate] for mate in mates]
    cpus, crowded = agreed(group, lambda: place(near, mates.index(group.rank), threads, machine.levels))
    own = sorted(allowed_cpus()) if -1 in cpus else cpus
    os.sched_setaffinity(0, own)  # for threads that are not the kernels' own: they start with it
    problem = agreed(group, lambda: bind_memory(membind, own, machine))
    kernels = agreed(group, lambda: load(Placement(cpus, crowded)))
    mine = read_back(kernels.thread_ids(), kernels.threads, mates[0], machine)
    everyone = group.all_gather_object((group.rank, mine, problem))
    bindings = {rank: binding for rank, binding, _ in everyone}
    problems = {rank: text for rank, _, text in everyone}
    return Bound(kernels, machine, bindings, _told(bindings, problems) + warnings(bindings))


def describe(bindings: Mapping[int, Binding]) -> list[str]:
    """A line for each rank; for many ranks, a line for those on equal cores of their hosts."""

    def facts(binding: Binding) -> str:
        pinned = all(len(cpus) == 1 for cpus in binding.thread_cpus)
        return (
            f"node {format_cpu_list(binding.nodes)}  {_cores(binding.cores)}  memory {binding.policy}  "
            f"{binding.threads} thread{'s' * (binding.threads > 1)}{'' if pinned else ', not pinned'}"
        )

    if len(bindings) <= LINES:
        return [f"rank {rank}  {binding.host}  {facts(binding)}" for rank, binding in bindings.items()]
    lines = []
    for text, ranks in _by_text({rank: facts(binding) for rank, binding in bindings.items()}).items():
        lines.append(f"{_ranks(ranks)}  {_hosts(ranks, bindings)}  {text}")
    return lines


def warnings(bindings: Mapping[int, Binding]) -> list[str]:
    """What makes these ranks slower than their machines: one line for each finding."""
    found = []
    for leader in sorted({binding.leader for binding in bindings.values()}):
        mates = {rank: binding for rank, binding in bindings.items() if binding.leader == leader}
        found += _machine_warnings(mates)
    threads = {r: f"{b.threads} threads on {_cores(b.cores)}" for r, b in bindings.items() if b.threads > len(b.cores)}
    remote = {
        rank: f"memory from node {format_cpu_list(b.remote_nodes)}, cores on node {format_cpu_list(b.nodes)}"
        for rank, b in bindings.items()
        if b.remote_nodes
    }
    return found + _told(bindings, threads) + _told(bindings, remote)


def _machine_warnings(mates: Mapping[int, Binding]) -> list[str]:
    """Findings about ranks of one machine together."""
    first = next(iter(mates.values()))
    users: dict[int, list[int]] = {}
    for rank, binding in mates.items():
        for core in binding.cores:
            users.setdefault(core, []).append(rank)
    shared = {core: ranks for core, ranks in users.items() if len(ranks) > 1}
    found = []
    if shared:
        ranks = sorted(set().union(*shared.values()))
        found.append(f"{_ranks(ranks)} on {first.host} share {_cores(list(shared))}: they wait for each other")
    threads = sum(binding.threads for binding in mates.values())
    if first.quota_cores is not None and first.quota_cores < threads:
        found.append(f"{first.host}: the cgroup allows {threads} threads the time of {first.quota_cores:g} cores")
    if first.hidden_cores:
        found.append(f"{first.host}: the cgroup's cpuset hides {first.hidden_cores} cores of the machine")
    return found


def remote_memory(group: Group, bound: Bound) -> list[str]:
    """Warnings about ranks whose memory came from elsewhere while the model was loaded: theirs was full. Collective."""
    cpus = [cpu for cpus in bound.bindings[group.rank].thread_cpus for cpu in cpus]
    remote = dict(group.all_gather_object((group.rank, remote_bytes(cpus, bound.machine))))
    far = {rank: f"{n / 1e9:.1f} GB of memory on a remote node" for rank, n in remote.items() if n > REMOTE_BYTES}
    return _told(bound.bindings, far)


def _told(bindings: Mapping[int, Binding], texts: Mapping[int, str]) -> list[str]:
    """One line for each text that ranks have, with their names; "" is none."""
    return [f"{_ranks(ranks)} on {_hosts(ranks, bindings)}: {text}" for text, ranks in _by_text(texts).items() if text]


def _by_text(texts: Mapping[int, str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank, text in texts.items():
        found.setdefault(text, []).append(rank)
    return found


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {format_cpu_list(ranks)}"


def _hosts(ranks: list[int], bindings: Mapping[int, Binding]) -> str:
    hosts = sorted({bindings[rank].host for rank in ranks})
    return hosts[0] if len(hosts) == 1 else f"{len(hosts)} hosts"


def _cores(cores: list[int]) -> str:
    return f"core{'s' * (len(cores) > 1)} {format_cpu_list(cores)}"
