"""Bytes of a checkpoint file: only those that are asked for, and never past its end."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch


class RawFile:
    """A file that several threads read at once. Slices are read, not mapped: what was read does not stay resident."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError naming the file when it cannot be opened or is none."""
        self.path = path
        if not path.is_file():
            raise ValueError(f"{path}: the file is missing")
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        self.size = os.fstat(self._fd).st_size

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    @property
    def identity(self) -> str:
        """Changes when the file is replaced or written to."""
        status = os.fstat(self._fd)
        return f"{self.path.name} {status.st_size} {status.st_mtime_ns}"

    def head(self, n: int) -> bytes:
        """The first n bytes, or all of a shorter file."""
        return os.pread(self._fd, n, 0)

    def mapped(self, offset: int, n: int) -> torch.Tensor:
        """n bytes as a view of the mapped file: uint8 [n]. Ranks of a machine share these pages."""
        assert offset >= 0 and offset + n <= self.size
        if not n:
            return torch.empty(0, dtype=torch.uint8)
        page = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        # Copy on write, because torch wants writable memory; nobody writes.
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        view = mmap.mmap(self._fd, offset - page + n, mmap.MAP_PRIVATE, protection, offset=page)
        return torch.frombuffer(view, dtype=torch.uint8)[offset - page :]

    def read(self, offset: int, row_bytes: int, rows: Sequence[int], first: int, n: int) -> torch.Tensor:
        """Bytes first .. first + n of each of `rows` of a matrix at `offset`: uint8 [len(rows), n].

        Raises ValueError naming the file when it has become shorter since it was opened.
        """
        out = torch.empty(len(rows), n, dtype=torch.uint8)
        if not out.numel():
            return out
        assert first >= 0 and first + n <= row_bytes and offset + max(rows) * row_bytes + first + n <= self.size
        if n == row_bytes and not isinstance(rows, range):
            order = np.argsort(rows)
            out[torch.from_numpy(order)] = self._ascending(offset, n, np.asarray(rows)[order])
            return out
        memory = memoryview(out.numpy().data).cast("B")
        if n == row_bytes and isinstance(rows, range) and rows.step == 1:
            self._fill(memory, offset + rows.start * row_bytes)
            return out
        for i, row in enumerate(rows):
            self._fill(memory[i * n : (i + 1) * n], offset + row * row_bytes + first)
        return out

    def _ascending(self, offset: int, n: int, rows: np.ndarray) -> torch.Tensor:
        """Whole rows of n bytes, those behind one another at once: uint8 [len(rows), n]."""
        out = torch.empty(len(rows), n, dtype=torch.uint8)
        memory = memoryview(out.numpy().data).cast("B")
        ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        for start, end in zip([0, *ends], ends, strict=False):
            self._fill(memory[start * n : end * n], offset + int(rows[start]) * n)
        return out

    def _fill(self, memory: memoryview, offset: int) -> None:
        done = 0
        while done < len(memory):
            got = os.preadv(self._fd, [memory[done:]], offset + done)
            if not got:
                raise ValueError(f"{self.path}: the file ends at {offset + done} bytes; it was {self.size} when opened")
            done += got
