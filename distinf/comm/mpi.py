"""All ranks of an MPI job through mpi4py: Intel MPI, MPICH or Open MPI, whichever started it."""

from __future__ import annotations

import atexit
import ctypes
import os
import socket
import sys
from typing import Any

import torch

from distinf.comm.roll_call import RollCall
from distinf.comm.startup import start_mpi
from distinf.comm.watchdog import LOADING_TIMEOUT_S, Progress, Watchdog
from distinf.kernels import extension


class MPIGroup:
    """See distinf.comm.Group. The base of the groups that only sum in another way."""

    name = "mpi"

    def __init__(self, wire_bf16: bool = False) -> None:
        """Join all ranks; `wire_bf16`: partial sums travel as bf16. Raises ValueError without the launcher's MPI."""
        try:
            self._mpi = start_mpi()
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"--comm {self.name}: no usable MPI library ({error}); install impi-rt") from None
        self._comm = self._mpi.COMM_WORLD
        self.rank = self._comm.Get_rank()
        self.world_size = self._comm.Get_size()
        launched = int(os.environ.get("PMI_SIZE", os.environ.get("OMPI_COMM_WORLD_SIZE", 1)))
        if self.world_size == 1 < launched:
            library = self._mpi.Get_library_version().splitlines()[0]
            raise ValueError(
                f"--comm {self.name}: {launched} ranks were started by a launcher of another MPI than {library}"
            )
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
        with self._waiting("start of collectives"):
            self.native = self._all_reduce(wire_bf16)
        self._waiting.native = self.native

    def _all_reduce(self, wire_bf16: bool) -> Any:
        """What sums over ranks inside a recorded step; None without the extension. Collective."""
        if extension.AVAILABLE:
            return self._alone(wire_bf16, self._calls(self._comm))
        if wire_bf16:
            raise ValueError("--comm-dtype bf16 needs the native extension; run `pip install .`")
        return None

    def _alone(self, wire_bf16: bool, calls: Any) -> Any:
        """This rank as a node of its own: everything goes through `calls`."""
        capacity = extension.AllReduce.LEAST_CAPACITY
        self._memory = torch.zeros(extension.AllReduce.memory_bytes(1, capacity), dtype=torch.uint8)
        return extension.AllReduce(self._memory.data_ptr(), capacity, 0, 1, wire_bf16, True, calls)

    def _calls(self, comm: Any) -> Any:
        """The MPI library's own functions and handles, for native code: csrc/inter_node.h. Collective over `comm`."""
        library = ctypes.CDLL(self._mpi.__file__)  # and what it is linked to
        mpi, own = self._mpi, comm.Dup()
        own.Set_errhandler(mpi.ERRORS_ARE_FATAL)  # a failure in the middle of a step leaves nothing to go on with
        return extension.MpiCalls(
            all_reduce=ctypes.cast(library.MPI_Allreduce, ctypes.c_void_p).value or 0,
            all_gather=ctypes.cast(library.MPI_Allgather, ctypes.c_void_p).value or 0,
            in_place=int(mpi.IN_PLACE) % 2**64,  # an address: -1 in MPICH's ABI, 1 in Open MPI's
            comm=mpi._handleof(own),
            fp32=mpi._handleof(mpi.FLOAT),
            byte=mpi._handleof(mpi.BYTE),
            sum=mpi._handleof(mpi.SUM),
            nodes=own.Get_size(),
        )

    @property
    def over_open_mpi(self) -> bool:
        """Whether the MPI library is Open MPI; else it is Intel MPI or MPICH."""
        return "Open MPI" in self._mpi.Get_library_version()

    @property
    def timeout_s(self) -> float:
        return self._waiting.timeout_s

    @timeout_s.setter
    def timeout_s(self, value: float) -> None:
        self._waiting.timeout_s = value

    def begin(self, step: str, at_least_s: float = 0) -> None:
        self._waiting.begin(step, at_least_s)

    def make_room(self, numbers: int) -> str:
        return ""  # sums are formed where they lie

    def all_reduce_(self, x: torch.Tensor) -> None:
        assert x.dtype == torch.float32 and x.is_contiguous()
        if self.native:  # the watchdog sees what it waits for through its `count` and `waiting`
            self.native.sum_(x.data_ptr(), x.numel())
            return
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
