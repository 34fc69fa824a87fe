"""Weights that a GPU has no room for: kept in pinned host memory, brought over one ahead of their use."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Streamed:
    """A tensor in pinned host memory."""

    host: torch.Tensor
    index: int  # in order of first use


@dataclass
class Streamer:
    """Two buffers on the device, filled in turn on a stream of their own: one is read while the other is written.

    The order of use is learned in the first pass and is every later pass's: a model has no branches. While a
    tensor is used, the copy of the next one runs; after the last comes the first, for the next token.
    """

    device: torch.device
    order: list[Streamed] = field(default_factory=list)
    _buffers: list[torch.Tensor] = field(default_factory=list)
    _stream: torch.cuda.Stream | None = None
    _filled: list[torch.cuda.Event] = field(default_factory=list)
    _read: list[torch.cuda.Event] = field(default_factory=list)
    _coming: Streamed | None = None  # whose copy has begun
    _turn: int = 0  # buffer of the tensor in use

    def keep(self, data: torch.Tensor) -> Streamed:
        """Take a tensor over: contiguous, of any dtype."""
        pinned = torch.empty(data.shape, dtype=data.dtype, pin_memory=self.device.type == "cuda").copy_(data)
        tensor = Streamed(pinned, len(self.order))
        self.order.append(tensor)
        return tensor

    def use(self, tensor: Streamed) -> torch.Tensor:
        """The tensor on the device, for what is enqueued before the next call."""
        if not self._buffers:
            self._begin()
        if self._coming is not tensor:  # the first of all, or one that is used out of turn
            self._fetch(tensor, self._turn ^ 1)
        self._turn ^= 1
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._filled[self._turn])
            # What is enqueued from here on reads this buffer; what was before has read the other one.
            self._read[self._turn ^ 1].record(torch.cuda.current_stream(self.device))
        self._fetch(self.order[(tensor.index + 1) % len(self.order)], self._turn ^ 1)
        return _shaped(self._buffers[self._turn], tensor.host)

    def _begin(self) -> None:
        largest = max(tensor.host.nbytes for tensor in self.order)
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(2)]
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            self._filled = [torch.cuda.Event() for _ in range(2)]
            self._read = [torch.cuda.Event() for _ in range(2)]

    def _fetch(self, tensor: Streamed, turn: int) -> None:
        """Begin to copy a tensor into a buffer, when what it held has been read."""
        self._coming = tensor
        target = _shaped(self._buffers[turn], tensor.host)
        if self._stream is None:
            target.copy_(tensor.host)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._read[turn])
            target.copy_(tensor.host, non_blocking=True)
            self._filled[turn].record(self._stream)


def _shaped(buffer: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return buffer[: like.nbytes].view(like.dtype).view(like.shape)
