"""Facts about this rank for `distinf info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
from typing import Any

from distinf import __version__, topology
from distinf.comm import BACKENDS, Group
from distinf.kernels import ipex, native
from distinf.llm import place


def describe(group: Group, threads: int) -> dict[str, Any]:
    """This rank's versions, instruction sets, cores and collectives. Collective: ranks of a node share cores."""
    placement = place(group, threads)
    isas = native.available_isas()
    return {
        "host": socket.gethostname(),
        "cpu": f"{native.cpu_name()}, {os.cpu_count()} hardware threads",
        "isa": f"{isas[0]} (found: {', '.join(isas)})" if isas else "none: reference kernels only",
        "kernels": _kernels(isas),
        "threads": len(placement.cpus),
        "cores": _cores(placement.cpus) + (" (shared with other ranks)" if placement.oversubscribed else ""),
        "numa_nodes": sorted({n for c in placement.cpus if (n := topology.numa_node(c)) is not None}),
        "comm": f"{group.name} (known: {', '.join(BACKENDS)})",
        "versions": ", ".join(_versions()),
    }


def _kernels(isas: list[str]) -> str:
    without = ipex.missing()
    names = [*(["native"] if isas else []), "reference", *([] if without else ["ipex"])]
    return ", ".join(names) + (f" (no ipex: {without})" if without else "")


def _cores(cpus: tuple[int, ...]) -> str:
    return "not pinned" if -1 in cpus else ",".join(map(str, cpus))


def _versions() -> list[str]:
    found = [f"distinf {__version__}", f"python {platform.python_version()}"]
    for package in ("torch", "mpi4py", "impi-rt", "oneccl-cpu", "transformers", "safetensors", "gguf", ipex.PACKAGE):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} -")
    return found
