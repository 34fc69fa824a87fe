"""Memory that the ranks of a node share: a file without a name in /dev/shm, which no end of a process leaves behind."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from typing import Any

import torch

DIRECTORY = "/dev/shm"


def map_shared(node: Any, part_bytes: int, total_bytes: int) -> tuple[torch.Tensor | None, str]:
    """Zeroed uint8 [total_bytes] that all ranks of `node` (an MPI communicator) have mapped, or None and the reason.

    Each rank's `part_bytes`, in rank order, lie in that rank's memory, and so does its part of what follows, which is
    divided among them. Collective over the node; a rank may get None where others do not.
    """
    rank, ranks = node.Get_rank(), node.Get_size()
    fd, problem = _attempt(lambda: _create(total_bytes)) if rank == 0 else (None, "")
    owner, owners_fd, identity = node.bcast((os.getpid(), fd, fd is not None and _identity(fd)))
    if owners_fd is None:
        return None, problem or "see the node's first rank"
    if rank:
        fd, problem = _attempt(lambda: _open(owner, owners_fd, identity))
    if fd is None:
        node.Barrier()
        return None, problem
    common = ranks * part_bytes
    begin, end = (common + (total_bytes - common) * r // ranks for r in (rank, rank + 1))

    def take() -> None:
        os.posix_fallocate(fd, rank * part_bytes, part_bytes)
        os.posix_fallocate(fd, begin, end - begin)

    _, problem = _attempt(take)
    if problem:
        free = os.statvfs(DIRECTORY)
        problem += f": {total_bytes / 1e6:.1f} MB are needed, {free.f_bavail * free.f_frsize / 1e6:.1f} MB are left"
    node.Barrier()  # the first rank's descriptor is open until all have theirs
    memory = None
    if not problem:
        memory, problem = _attempt(lambda: torch.frombuffer(mmap.mmap(fd, total_bytes), dtype=torch.uint8))
    os.close(fd)
    return memory, problem


def _create(size: int) -> int:
    fd = os.open(DIRECTORY, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.ftruncate(fd, size)
    return fd


def _open(owner: int, owners_fd: int, identity: tuple[int, int]) -> int:
    """The file that another process of this user has open; process numbers mean little across containers."""
    fd = os.open(f"/proc/{owner}/fd/{owners_fd}", os.O_RDWR)
    if _identity(fd) != identity:
        os.close(fd)
        raise OSError(f"process {owner} is not the node's first rank: its processes do not see each other")
    return fd


def _identity(fd: int) -> tuple[int, int]:
    stat = os.fstat(fd)
    return stat.st_dev, stat.st_ino


def _attempt(work: Callable[[], Any]) -> tuple[Any, str]:
    """Its result and "", or None and what went wrong: the ranks have to go on together."""
    try:
        return work(), ""
    except OSError as error:
        return None, f"{DIRECTORY}: {error}"
