"""All ranks of an MPI job through mpi4py: Intel MPI, MPICH or Open MPI, whichever started it."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from distinf.kernels import native


class MPIGroup:
    """See distinf.comm.Group. The base of the groups that only sum in another way."""

    name = "mpi"

    def __init__(self, wire_bf16: bool = False) -> None:
        """Initialise MPI; `wire_bf16`: partial sums travel as bf16. Raises ValueError without an MPI library."""
        try:
            from mpi4py import MPI  # loading it starts MPI, which a lone process must not need
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"--comm {self.name}: no usable MPI library ({error}); install impi-rt") from None
        self._mpi = MPI
        self._comm = MPI.COMM_WORLD
        self.rank = self._comm.Get_rank()
        self.world_size = self._comm.Get_size()
        self.native = self._all_reduce(wire_bf16)

    def _all_reduce(self, wire_bf16: bool) -> Any:
        """What sums over ranks inside a recorded step; None without the extension. Collective."""
        if native.AVAILABLE:
            return self._alone(wire_bf16, self._calls(self._comm))
        if wire_bf16:
            raise ValueError("--comm-dtype bf16 needs the native extension; run `pip install .`")
        return None

    def _alone(self, wire_bf16: bool, calls: Any) -> Any:
        """This rank as a node of its own: everything goes through `calls`."""
        self._memory = torch.zeros(native.AllReduce.memory_bytes(1), dtype=torch.uint8)
        return native.AllReduce(self._memory.data_ptr(), 0, 1, wire_bf16, True, calls)

    def _calls(self, comm: Any) -> Any:
        """The MPI library's own functions and handles, for native code: csrc/inter_node.h. Collective over `comm`."""
        library = ctypes.CDLL(self._mpi.__file__)  # and what it is linked to
        mpi, own = self._mpi, comm.Dup()
        own.Set_errhandler(mpi.ERRORS_ARE_FATAL)  # a failure in the middle of a step leaves nothing to go on with
        return native.MpiCalls(
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

    def all_reduce_(self, x: torch.Tensor) -> None:
        assert x.dtype == torch.float32 and x.is_contiguous()
        if self.native:
            self.native.sum_(x.data_ptr(), x.numel())
        else:
            self._comm.Allreduce(self._mpi.IN_PLACE, x.numpy(), op=self._mpi.SUM)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(self.world_size, *x.shape, dtype=x.dtype)
        self._comm.Allgather(x.contiguous().numpy(), out.numpy())
        return out

    def all_gather_object(self, x: Any) -> list[Any]:
        return list(self._comm.allgather(x))

    def broadcast_object(self, x: Any) -> Any:
        return self._comm.bcast(x, root=0)

    def barrier(self) -> None:
        self._comm.Barrier()

    def node_mates(self) -> list[int]:
        node = self._comm.Split_type(self._mpi.COMM_TYPE_SHARED)
        mates = node.allgather(self.rank)
        node.Free()
        return sorted(mates)

    def abort(self) -> None:
        self._comm.Abort(1)
