"""Groups of ranks and what they exchange. A backend is one class with these methods and one row in BACKENDS."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from distinf.comm.ccl import CclGroup
from distinf.comm.mpi import MPIGroup
from distinf.comm.shm import NoSharedMemory, ShmCclGroup, ShmGroup
from distinf.comm.single import SingleGroup
from distinf.comm.watchdog import DEFAULT_TIMEOUT_S, LOADING_TIMEOUT_S

__all__ = [
    "BACKENDS",
    "DEFAULT_TIMEOUT_S",
    "LOADING_TIMEOUT_S",
    "Group",
    "InputError",
    "agreed",
    "init",
    "launched_rank",
]
from distinf.comm.torch_ccl import TorchCclGroup
from distinf.kernels import extension

T = TypeVar("T")

# Made with one argument: whether partial sums travel as bf16.
BACKENDS: dict[str, Callable[[bool], Group]] = {
    "single": SingleGroup,
    "mpi": MPIGroup,
    "shm": ShmGroup,
    "shm+ccl": ShmCclGroup,
    "ccl": CclGroup,
    "torch-ccl": TorchCclGroup,
}
WIRE_DTYPES = ("fp32", "bf16")

# What launchers leave in the environment of a rank: Intel MPI and MPICH (also under srun --mpi=pmi2), PMIx
# (srun --mpi=pmix), Open MPI.
_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")


class InputError(ValueError):
    """Bad input that every rank knows of: all of them leave together, rank 0 says why."""


class Group(Protocol):
    """All ranks of the job. Every method but begin and abort is collective: each rank calls it, in the same order."""

    name: str
    rank: int
    world_size: int
    timeout_s: float  # longest wait for other ranks in one call; a longer one ends the job, with status 1

    def begin(self, step: str, at_least_s: float = 0) -> None:
        """This rank is at `step` from here on: a name for the message of a wait that is too long. Not collective.

        A wait may last `timeout_s`, or `at_least_s` where that is longer.
        """

    native: Any  # distinf.kernels.extension.AllReduce, which a recorded decode step may contain, or None

    def make_room(self, numbers: int) -> str:
        """Have room for sums of so many numbers without a copy, in memory near the cores that this rank is bound to.

        Until then, and where there is no room, sums of more than 1 MiB are copied through in pieces. Returns why
        there is none, the same on every rank, or "".
        """

    def all_reduce_(self, x: torch.Tensor) -> None:
        """Sum fp32 x over ranks, in place, the same bits on every rank."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x of the same shape on each rank -> [world_size, *x.shape], in rank order. For small tensors."""

    def all_gather_object(self, x: Any) -> list[Any]:
        """One small Python object of each rank, in rank order."""

    def broadcast_object(self, x: Any) -> Any:
        """Rank 0's object."""

    def barrier(self) -> None:
        """Return when every rank has called it."""

    def node_mates(self) -> list[int]:
        """Ranks that share memory with this one, itself included, in order."""

    def abort(self) -> None:
        """End every rank of the job with exit status 1; does not return."""


def launched_rank() -> int | None:
    """This process's rank as the launcher's environment tells it, or None when started alone."""
    for name in _RANK_VARIABLES:
        if name in os.environ:
            return int(os.environ[name])
    return None


def init(name: str = "auto", wire_dtype: str = "fp32") -> Group:
    """The group of this job by `--comm` and `--comm-dtype`.

    auto takes single without a launcher; under one, shared memory inside each node and MPI between nodes, or MPI
    alone, with a warning, where there is no memory to share. Raises ValueError for an unknown name, without the
    libraries that a backend needs, and under srun without PMI.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"--comm {name!r} is unknown; expected auto or one of {', '.join(BACKENDS)}")
    if wire_dtype not in WIRE_DTYPES:
        raise ValueError(f"--comm-dtype {wire_dtype!r} is unknown; expected one of {', '.join(WIRE_DTYPES)}")
    if name == "auto":
        if launched_rank() is None and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            raise ValueError("srun started several tasks without telling them of each other; use srun --mpi=pmi2")
        name = "single" if launched_rank() is None else "shm" if extension.AVAILABLE else "mpi"
    try:
        return BACKENDS[name](wire_dtype == "bf16")
    except NoSharedMemory as error:
        group = MPIGroup(wire_dtype == "bf16")
        if group.rank == 0:
            logging.getLogger(__name__).warning("distinf: no shared memory, --comm mpi is used: %s", error)
        return group


def agreed(group: Group, work: Callable[[], T]) -> T:
    """Run `work`, which must not communicate, on every rank; a ValueError or OSError of one is raised by all.

    Raises InputError with the message of the lowest rank that failed.
    """
    result, message = None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        message = str(error)
    failed = [(r, m) for r, m in enumerate(group.all_gather_object(message)) if m is not None]
    if failed:
        rank, text = failed[0]
        raise InputError(text if len(failed) == group.world_size else f"{text} (rank {rank})")
    return result  # type: ignore[return-value]
