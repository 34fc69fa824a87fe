"""Sums in shared memory inside a node, and through MPI or oneCCL between the nodes' first ranks."""

from __future__ import annotations

from typing import Any

from distinf.comm import ccl
from distinf.comm.mpi import MPIGroup
from distinf.comm.segment import map_shared
from distinf.kernels import native


class NoSharedMemory(OSError):
    """On every rank: the ranks of some node cannot have memory together."""


class ShmGroup(MPIGroup):
    """See distinf.comm.Group. csrc/all_reduce.h has the method; what is small and rare goes through MPI."""

    name = "shm"
    between = "mpi"

    def _all_reduce(self, wire_bf16: bool) -> Any:
        """Raises ValueError without the extension, and NoSharedMemory."""
        if not native.AVAILABLE:
            raise ValueError(f"--comm {self.name} needs the native extension; run `pip install .`")
        node = self._node()
        rank, ranks = node.Get_rank(), node.Get_size()
        memory, problem = map_shared(node, native.AllReduce.PART_BYTES, native.AllReduce.memory_bytes(ranks))
        for other, text in enumerate(self.all_gather_object(problem)):
            if text:
                raise NoSharedMemory(f"{text} (rank {other})")
        assert memory is not None
        self._memory = memory  # as long as the group: native code has its address
        several = ranks < self.world_size
        self.name = f"shm+{self.between}" if several else "shm"
        calls = self._inter_node(self._comm.Split(int(rank > 0), self.rank), rank == 0) if several else None
        return native.AllReduce(memory.data_ptr(), rank, ranks, wire_bf16, several, calls)

    def _node(self) -> Any:
        """Communicator of the ranks that share memory: as MPI finds them, not by host names."""
        return self._comm.Split_type(self._mpi.COMM_TYPE_SHARED, key=self.rank)

    def _inter_node(self, leaders: Any, leads: bool) -> Any:
        """What sums over nodes, for the rank of each that `leads` it."""
        return self._calls(leaders) if leads else None


class ShmCclGroup(ShmGroup):
    """The same with oneCCL between nodes."""

    name = "shm+ccl"
    between = "ccl"

    def _inter_node(self, leaders: Any, leads: bool) -> Any:
        self._communicator, calls = ccl.connect(self, leaders.Get_rank() if leads else None, leaders.Get_size())
        return calls
