"""Sums in shared memory inside a node, and through MPI or oneCCL between the nodes' first ranks."""

from __future__ import annotations

import mmap
from typing import Any

import torch

from distinf.comm import ccl
from distinf.comm.mpi import MPIGroup
from distinf.comm.segment import map_shared
from distinf.kernels import extension


class NoSharedMemory(OSError):
    """On every rank: the ranks of some node cannot have memory together."""


class ShmGroup(MPIGroup):
    """See distinf.comm.Group. csrc/all_reduce.h has the method; what is small and rare goes through MPI."""

    name = "shm"
    between = "mpi"

    def _all_reduce(self, wire_bf16: bool) -> Any:
        """Raises ValueError without the extension, and NoSharedMemory."""
        if not extension.AVAILABLE:
            raise ValueError(f"--comm {self.name} needs the native extension; run `pip install .`")
        self._mates = self._node()
        rank, ranks = self._mates.Get_rank(), self._mates.Get_size()
        capacity = extension.AllReduce.LEAST_CAPACITY
        memory, problem = self._map(capacity)
        if memory is None:
            raise NoSharedMemory(problem)
        self._memory = memory  # as long as the group: native code has its address
        self._settled = False  # the rank has its cores, and its slots are near them
        several = ranks < self.world_size
        self.name = f"shm+{self.between}" if several else "shm"
        calls = self._inter_node(self._comm.Split(int(rank > 0), self.rank), rank == 0) if several else None
        return extension.AllReduce(memory.data_ptr(), capacity, rank, ranks, wire_bf16, several, calls)

    def make_room(self, numbers: int) -> str:
        """See distinf.comm.Group. What there was before lies where the rank happened to be: none of it is kept."""
        before, page = self.native.capacity, mmap.PAGESIZE // 4
        wanted = max(-(-numbers // page) * page, before)
        if self._settled and wanted == before:
            return ""
        self._settled = True
        with self._waiting("start of collectives"):
            memory, problem = self._map(wanted)
            if memory is None:
                wanted, (memory, _) = before, self._map(before)
        if memory is not None:
            self.native.move(memory.data_ptr(), wanted)
            self._memory = memory
        return problem

    def _map(self, capacity: int) -> tuple[torch.Tensor | None, str]:
        """The node's memory for slots of so many numbers; None, on every rank, and why, where a rank has no room."""
        reduce = extension.AllReduce
        sizes = reduce.part_bytes(capacity), reduce.memory_bytes(self._mates.Get_size(), capacity)
        memory, problem = map_shared(self._mates, *sizes)
        problems = self._comm.allgather(problem)
        text, rank = next(((text, rank) for rank, text in enumerate(problems) if text), ("", 0))
        return (None, f"{text} (rank {rank})") if text else (memory, "")

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
