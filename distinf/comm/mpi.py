"""All ranks of an MPI job through mpi4py: Intel MPI, MPICH or Open MPI, whichever started it."""

from __future__ import annotations

from typing import Any

import torch


class MPIGroup:
    """See distinf.comm.Group."""

    name = "mpi"

    def __init__(self) -> None:
        """Initialise MPI. Raises ValueError when no MPI library can be loaded."""
        try:
            from mpi4py import MPI  # loading it starts MPI, which a lone process must not need
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"--comm {self.name}: no usable MPI library ({error}); install impi-rt") from None
        self._mpi = MPI
        self._comm = MPI.COMM_WORLD
        self.rank = self._comm.Get_rank()
        self.world_size = self._comm.Get_size()

    def all_reduce_(self, x: torch.Tensor) -> None:
        assert x.dtype == torch.float32 and x.is_contiguous()
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
