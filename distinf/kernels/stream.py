"""Where a GPU rank's weights lie: on the device while there is room, else in pinned host memory, a layer ahead of use.

Streamed weights of a layer are one piece of host memory and come over as one copy, into one of two buffers: while a
layer computes, the next one's copy runs. After the last layer comes the first, for the next token. An odd number of
layers takes a third buffer, as large as the smallest of them, so that each always has the same place: recorded steps
hold addresses.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from distinf.kernels.gpu import Gpu

# What weights take of a device without --gpu-memory-gb: the rest is for activations, the KV cache and graphs.
_PART_FOR_WEIGHTS = 15 / 16
# What is left of the weights' memory after an allocation has failed.
_LOWER = 7 / 8
_ALIGN = 256  # bytes; what CUDA's own allocations have, and its widest loads ask for


@dataclass(eq=False)
class Stored:
    """The tensors of one weight."""

    home: list[torch.Tensor]  # on the device, or on the host
    tensors: list[torch.Tensor] | None = None  # what ops read: those on the device, or a buffer; None: not placed yet
    group: int | None = None  # streamed with these

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, each tensor aligned."""
        return sum(_aligned(t.nbytes) for t in self.home)


@dataclass(frozen=True)
class _Group:
    """Weights that come over together."""

    host: torch.Tensor  # pinned uint8
    buffer: torch.Tensor  # uint8 on the device, as long


def buffer_of(group_bytes: Sequence[int]) -> list[int]:
    """The buffer of each streamed group: two that follow each other, the first after the last too, have different ones.

    Two take turns; of an odd number of groups the smallest has a third to itself.
    """
    n = len(group_bytes)
    if n % 2 == 0 or n == 1:
        return [i % 2 for i in range(n)]
    third = min(range(n), key=lambda i: group_bytes[i])
    return [2 if i == third else (i - third - 1) % n % 2 for i in range(n)]


def buffer_bytes(group_bytes: Sequence[int]) -> list[int]:
    """Size of each buffer: the largest group that it has to hold. Groups of nothing need none."""
    sizes = [size for size in group_bytes if size]
    found = [0] * (1 + max(buffer_of(sizes), default=-1))
    for buffer, size in zip(buffer_of(sizes), sizes, strict=True):
        found[buffer] = max(found[buffer], size)
    return found


def resident(groups: Sequence[Sequence[int]], limit: float) -> set[tuple[int, int]]:
    """(group, place) of the weights, given by their bytes, that stay on a device with room for `limit` bytes.

    Buffers for the others count. In a step every streamed byte takes the link the same time, so each resident one
    saves as much; what differs is whether the link has something to do while the device computes. So all layers stream
    alike: the first weight of every layer becomes resident, then the second.
    """
    streamed = [sum(group) for group in groups]
    if sum(streamed) <= limit:
        return {(g, i) for g, group in enumerate(groups) for i in range(len(group))}
    kept, used = set(), 0
    for i, g in sorted((i, g) for g, group in enumerate(groups) for i in range(len(group))):
        size = groups[g][i]
        streamed[g] -= size
        if used + size + sum(buffer_bytes(streamed)) <= limit:
            kept.add((g, i))
            used += size
        else:
            streamed[g] += size
    return kept


def check_limit(groups: Sequence[int], limit: float) -> None:
    """Raises ValueError when groups of these bytes neither fit `limit` bytes nor can be streamed within it."""
    least = min(sum(groups), sum(buffer_bytes(groups)))
    if least > limit:
        raise ValueError(
            f"--gpu-memory-gb {limit / 1e9:g}: the GPU's share takes {sum(groups) / 1e9:.3f} GB, and streaming it "
            f"{least / 1e9:.3f} GB for the buffers of two layers; expected that, or a smaller --gpu-fraction"
        )


@dataclass
class WeightStore:
    """All weights of a rank. `version` changes when their places do: recorded steps are then to be captured again."""

    gpu: Gpu
    limit_bytes: float | None = None  # None: what the device has
    stream_all: bool = False  # keep nothing there
    version: int = 0
    _weights: list[list[Stored]] = field(default_factory=list)
    _kept: set[tuple[int, int]] = field(default_factory=set)
    _groups: list[_Group] = field(default_factory=list)
    _current: int | None = None  # the group that is being read
    _coming: tuple[int, object] | None = None  # the group whose copy was begun last, and its event

    def arrange(self, groups: Sequence[Sequence[Stored]]) -> None:
        """Place every weight; `groups` are in the order of their use. Raises ValueError where the limit is too low."""
        self._weights = [[w for w in group if w.nbytes] for group in groups]
        if self.stream_all:
            self._fit(0.0)
            return
        limit = self.limit_bytes
        if limit is None:
            limit = _PART_FOR_WEIGHTS * self.gpu.free_bytes()
        else:
            check_limit([sum(w.nbytes for w in group) for group in self._weights], limit)
        self._fit(limit)

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return sum(w.nbytes for group in self._weights for w in group)

    def lower(self) -> bool:
        """Stream some of what is resident, since memory ran out. False when nothing is."""
        if not self._kept:
            return False
        self._fit(_LOWER * self._used_bytes())
        streamed = sum(len(group.host) for group in self._groups)
        logging.getLogger(__name__).warning(
            "distinf: %s is out of memory: %.3f GB of weights stay there, %.3f GB are streamed from now on",
            self.gpu.name, self._kept_bytes() / 1e9, streamed / 1e9,
        )  # fmt: skip
        return True

    def group_of(self, weight: Stored) -> int | None:
        """The group that `turn_to` has to bring before the weight is read; None: it is on the device for good."""
        if weight.tensors is None:  # kernels of a test or of the tuner, which have no plan
            weight.tensors = weight.home = self._on_device(weight.home)
        return weight.group

    def turn_to(self, group: int) -> None:
        """What is enqueued from here on reads this group; the next one's copy begins, unless that is so already."""
        if group == self._current:
            return
        if self._coming is None or self._coming[0] != group:
            self._fetch(group)  # the first of all, or one out of turn
        assert self._coming
        self.gpu.wait_for(self._coming[1])
        self._current = group
        if len(self._groups) > 1:
            self._fetch((group + 1) % len(self._groups))

    def _fetch(self, group: int) -> None:
        # The buffer's last reader was enqueued before: the group that reads now has another one.
        self._coming = group, self.gpu.copy_ahead(self._groups[group].buffer, self._groups[group].host)

    def _fit(self, limit: float) -> None:
        """Place the weights within `limit` bytes, or less where even that cannot be had."""
        while True:
            kept = resident([[w.nbytes for w in group] for group in self._weights], limit)
            try:
                self._place(kept)
                return
            except torch.OutOfMemoryError:
                if not kept:
                    raise
                limit = _LOWER * min(limit, self.bytes)

    def _place(self, kept: set[tuple[int, int]]) -> None:
        self.gpu.synchronize()
        self._groups, self._current, self._coming = [], None, None
        self._kept = kept
        self.version += 1
        streamed = [[w for i, w in enumerate(group) if (g, i) not in kept] for g, group in enumerate(self._weights)]
        streamed = [group for group in streamed if group]
        arenas = [self._gathered(group) for group in streamed]  # first of all: this is what frees memory
        sizes = [len(arena) for arena in arenas]
        self.gpu.trim()
        buffers = [self._buffer(size) for size in buffer_bytes(sizes)]
        for g, (group, arena, number) in enumerate(zip(streamed, arenas, buffer_of(sizes), strict=True)):
            self._groups.append(_Group(arena, buffers[number][: len(arena)]))
            for weight, parts in zip(group, _parts(group, buffers[number]), strict=True):
                weight.tensors, weight.group = parts, g
        for g, i in sorted(kept):
            weight = self._weights[g][i]
            if weight.tensors is not weight.home:
                weight.tensors = weight.home = self._on_device(weight.home)
                weight.group = None

    def _gathered(self, group: list[Stored]) -> torch.Tensor:
        """The weights of a group in one piece of pinned memory, which becomes their home."""
        arena = self.gpu.host_arena(sum(w.nbytes for w in group))
        for weight, parts in zip(group, _parts(group, arena), strict=True):
            for part, tensor in zip(parts, weight.home, strict=True):
                part.copy_(tensor)
            weight.home, weight.tensors = parts, None
        return arena

    def _on_device(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [t.to(self.gpu.device, copy=True) for t in tensors]

    def _buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.gpu.device)

    def _kept_bytes(self) -> int:
        return sum(self._weights[g][i].nbytes for g, i in self._kept)

    def _used_bytes(self) -> int:
        return self._kept_bytes() + sum(buffer_bytes([len(group.host) for group in self._groups]))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def _parts(group: list[Stored], memory: torch.Tensor) -> list[list[torch.Tensor]]:
    """For each weight its tensors' places in uint8 `memory`, one behind the other."""
    found, start = [], 0
    for weight in group:
        parts = []
        for t in weight.home:
            parts.append(memory[start : start + t.nbytes].view(t.dtype).view(t.shape))
            start += _aligned(t.nbytes)
        found.append(parts)
    return found
