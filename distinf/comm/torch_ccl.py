"""All ranks of an MPI job through oneccl_bindings_for_pytorch, where a site has it: it is on no public index."""

from __future__ import annotations

import importlib
import socket

import torch
from torch import distributed
from torch._C._distributed_c10d import Store, TCPStore  # torch.distributed's, where type checkers see them

from distinf.comm.mpi import MPIGroup

BINDINGS = "oneccl_bindings_for_pytorch"


class TorchCclGroup(MPIGroup):
    """See distinf.comm.Group. Only the all-reduce is torch.distributed's."""

    name = "torch-ccl"

    def _all_reduce(self, wire_bf16: bool) -> None:
        """Start torch's process group. Raises ValueError, on every rank, where one lacks the bindings."""
        from distinf.comm import agreed  # which imports this file

        agreed(self, load_bindings)
        if not distributed.is_initialized():  # a process has one such group
            distributed.init_process_group("ccl", store=self._meet(), rank=self.rank, world_size=self.world_size)
        self._wire_bf16 = wire_bf16

    def _meet(self) -> Store:
        """The ranks' common store: served by rank 0 on any free port, of which the others hear through MPI."""
        one_host = len(self.node_mates()) == self.world_size
        host = self.broadcast_object("localhost" if one_host else socket.gethostname())
        served = TCPStore(host, 0, is_master=True, wait_for_workers=False) if self.rank == 0 else None
        port = self.broadcast_object(served.port if served else None)
        return served or TCPStore(host, port, is_master=False)

    def all_reduce_(self, x: torch.Tensor) -> None:
        assert x.dtype == torch.float32 and x.is_contiguous()
        wire = x.bfloat16() if self._wire_bf16 else x
        distributed.all_reduce(wire)
        x.copy_(wire)


def load_bindings() -> None:
    """Import the bindings, which makes the backend "ccl" known to torch. Raises ValueError without them."""
    try:
        importlib.import_module(BINDINGS)
    except ImportError as error:
        raise ValueError(f"--comm torch-ccl: {BINDINGS} cannot be imported ({error}); use --comm ccl") from None
