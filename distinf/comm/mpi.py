"""All ranks of an MPI job through mpi4py: Intel MPI, MPICH or Open MPI, whichever started it."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from typing import Any

import torch

from distinf.comm.roll_call import RollCall
from distinf.comm.startup import start_mpi
from distinf.comm.watchdog import LOADING_TIMEOUT_S, Progress, Watchdog


class MPIGroup:
    """See distinf.comm.Group."""

    name = "mpi"

    def __init__(self) -> None:
        """Join all ranks. Raises ValueError when no MPI library can be loaded, or not the launcher's."""
        try:
            self._mpi = start_mpi()
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"--comm mpi: no usable MPI library ({error}); install impi-rt") from None
        self._comm = self._mpi.COMM_WORLD
        self.rank = self._comm.Get_rank()
        self.world_size = self._comm.Get_size()
        launched = int(os.environ.get("PMI_SIZE", os.environ.get("OMPI_COMM_WORLD_SIZE", 1)))
        if self.world_size == 1 < launched:
            library = self._mpi.Get_library_version().splitlines()[0]
            raise ValueError(f"--comm mpi: {launched} ranks were started by a launcher of another MPI than {library}")
        hosts = self._comm.allgather(socket.gethostname())
        self._waiting = Progress()
        asks = self._mpi.Query_thread() == self._mpi.THREAD_MULTIPLE
        self._roll_call = RollCall(self._comm.Dup(), self._waiting.place) if asks else None
        self.watchdog = Watchdog(
            self.rank,
            hosts,
            self._waiting,
            self._roll_call.ask if self._roll_call else None,
            lambda: self._comm.Abort(1),
        )
        self._last = self._comm.Dup()
        atexit.register(self._leave)

    @property
    def timeout_s(self) -> float:
        return self._waiting.timeout_s

    @timeout_s.setter
    def timeout_s(self, value: float) -> None:
        self._waiting.timeout_s = value

    def begin(self, step: str, at_least_s: float = 0) -> None:
        self._waiting.begin(step, at_least_s)

    def all_reduce_(self, x: torch.Tensor) -> None:
        assert x.dtype == torch.float32 and x.is_contiguous()
        with self._waiting("all-reduce"):
            self._comm.Allreduce(self._mpi.IN_PLACE, x.numpy(), op=self._mpi.SUM)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(self.world_size, *x.shape, dtype=x.dtype)
        with self._waiting("all-gather"):
            self._comm.Allgather(x.contiguous().numpy(), out.numpy())
        return out

    def all_gather_object(self, x: Any) -> list[Any]:
        with self._waiting("all-gather"):
            return list(self._comm.allgather(x))

    def broadcast_object(self, x: Any) -> Any:
        with self._waiting("broadcast"):
            return self._comm.bcast(x, root=0)

    def barrier(self) -> None:
        with self._waiting("barrier"):
            self._comm.Barrier()

    def node_mates(self) -> list[int]:
        with self._waiting("split by node"):
            node = self._comm.Split_type(self._mpi.COMM_TYPE_SHARED)
            mates = node.allgather(self.rank)
            node.Free()
        return sorted(mates)

    def abort(self) -> None:
        self.watchdog.end_job()

    def _leave(self) -> None:
        """At the end of the process, before MPI_Finalize, which waits for every rank and has no deadline of its own."""
        error = getattr(sys, "last_value", None)  # what has ended a script, and not the other ranks
        if error is not None:
            sys.stdout.flush()
            self.watchdog.end_job(f"rank {self.rank} on {socket.gethostname()} failed: {type(error).__name__}: {error}")
        if not self._mpi.Is_finalized():
            self.begin("exit", LOADING_TIMEOUT_S)  # rank 0 may still be writing results
            with self._waiting("barrier"):
                self._last.Barrier()
            if self._roll_call:
                self._roll_call.stop()
        self.watchdog.stop()
