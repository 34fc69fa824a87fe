"""Facts about this rank for `distinf info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from distinf import __version__, kernels
from distinf.comm import BACKENDS, Group
from distinf.config import RunConfig
from distinf.kernels import extension, ipex
from distinf.placement import bind
from distinf.topology import Machine, format_cpu_list


def describe(group: Group, run: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """This rank's versions, instruction sets, binding and collectives, and the warnings about all ranks.

    Collective. The rank is bound and its threads started as for a model; what is told was read back after that.
    """
    bound = bind(group, run.threads, run.membind, lambda p: kernels.load(run.kernels, run.isa, run.dtype, p))
    mine, isas = bound.bindings[group.rank], extension.available_isas()
    facts = {
        "host": mine.host,
        "cpu": f"{extension.cpu_name()}, {os.cpu_count()} hardware threads",
        "machine": "; ".join(_machine(bound.machine)),
        "isa": f"{isas[0]} (found: {', '.join(isas)})" if isas else "none: reference kernels only",
        "kernels": _kernels(isas),
        "threads": mine.threads,
        "cores": format_cpu_list(mine.cores),
        "pinned": all(len(cpus) == 1 for cpus in mine.thread_cpus),
        "numa_nodes": mine.nodes,
        "memory": mine.policy,
        "comm": f"{group.name} (known: {', '.join(BACKENDS)})",
        "versions": ", ".join(_versions()),
    }
    return facts, bound.warnings


def _machine(machine: Machine) -> list[str]:
    """Sockets, then a phrase for each NUMA node."""
    sockets = len(set(machine.socket.values()))
    found = [f"{sockets} socket{'s' * (sockets > 1)}, {len(set(machine.core.values()))} cores"]
    for i, node in machine.nodes.items():
        cores = {machine.core.get(cpu, cpu) for cpu in node.cpus}
        where = f"cores {format_cpu_list(cores)}" if cores else "memory only (HBM or CXL)"
        found.append(f"node {i}: {where}, {node.memory_bytes / 1e9:.0f} GB")
    return found


def _kernels(isas: list[str]) -> str:
    without = ipex.missing()
    names = [*(["native"] if isas else []), "reference", *([] if without else ["ipex"])]
    return ", ".join(names) + (f" (no ipex: {without})" if without else "")


def _versions() -> list[str]:
    found = [f"distinf {__version__}", f"python {platform.python_version()}"]
    for package in ("torch", "mpi4py", "impi-rt", "oneccl-cpu", "transformers", "safetensors", "gguf", ipex.PACKAGE):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} -")
    return found
