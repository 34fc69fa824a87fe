"""Matrices that lie across the file, output features along its lines: a rank's part is read at once, used in pieces.

A few output features are a few bytes of every line: read on their own they were 166 bytes a read of an AWQ
checkpoint, on average.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch

from distinf.weights.safetensors import StoredTensor


@dataclass
class _Held:
    """What was read of one tensor, and the output features that are still to be taken from it."""

    data: torch.Tensor
    left: int


@dataclass
class _Strip:
    """A linear's output features that are read in pieces, each once."""

    rows: range
    lock: threading.Lock = field(default_factory=threading.Lock)
    held: dict[tuple[str, range], _Held] = field(default_factory=dict)

    def take(self, tensor: StoredTensor, lines: range, columns: range, n: int) -> torch.Tensor:
        """These columns of the lines, held until all output features have been taken; now `n` are."""
        with self.lock:
            held = self.held.get((tensor.name, lines))
            if held is None:
                held = self.held[tensor.name, lines] = _Held(tensor.read(lines, columns), len(self.rows))
            held.left -= n
            if held.left <= 0:
                del self.held[tensor.name, lines]
            return held.data


class Strips:
    """The strips of a checkpoint. Several threads may take pieces at once."""

    def __init__(self) -> None:
        self._strips: dict[str, list[_Strip]] = {}

    def announce(self, linear: str, rows: range) -> None:
        """Output features of a linear that will be taken in pieces, each once."""
        self._strips.setdefault(linear, []).append(_Strip(rows))

    def read(self, linear: str, tensor: StoredTensor, lines: range, rows: range, per: int = 1) -> torch.Tensor:
        """The columns of a tensor of `linear` that hold `rows`, `per` of them to a column: [lines, columns]."""
        mine = _columns(rows, per)
        for strip in self._strips.get(linear, ()):
            if strip.rows.start <= rows.start and rows.stop <= strip.rows.stop:
                whole = _columns(strip.rows, per)
                data = strip.take(tensor, lines, whole, len(rows))
                return data[:, mine.start - whole.start : mine.stop - whole.start]
        return tensor.read(lines, mine)


def _columns(rows: range, per: int) -> range:
    return range(rows.start // per, -(-rows.stop // per))
