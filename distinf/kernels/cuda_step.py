"""A decode step on a GPU: CUDA graphs of what lies between two parts that the host does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any, Protocol

import torch

from distinf.kernels.gpu import Gpu, Graph
from distinf.kernels.stream import WeightStore


class Recorder(Protocol):
    """The kernels that are recorded."""

    gpu: Gpu
    store: WeightStore

    def recorded(self, step: CudaStep) -> AbstractContextManager[None]:
        """In the body the ops belong to this step."""

    def fixed(self) -> AbstractContextManager[None]:
        """In the body no weight changes its place."""


class CudaStep:
    """See distinf.kernels.Step.

    The first pass computes, meets the other ranks, and has all memory that a capture may not ask for: the device's
    side of the host's inputs, and pinned buffers. The second pass only captures; it is made again whenever weights
    have changed their places.
    """

    def __init__(self, kernels: Recorder, forward: Callable[[], torch.Tensor]) -> None:
        self._kernels, self._forward = kernels, forward
        self._inputs: list[tuple[Callable[[], torch.Tensor], torch.Tensor]] = []
        self._buffers: list[torch.Tensor] = []
        self._taken = 0  # of the buffers, by the capturing pass
        self._parts: list[Callable[[], object]] = []
        self._graph: Graph | None = None  # that is being captured
        self._pool: Any = None
        self._group: int | None = None  # of streamed weights, in the capturing pass
        self._version = -1  # of the places of weights that was captured
        with kernels.recorded(self):
            self.result = forward()

    @property
    def capturing(self) -> bool:
        """Whether ops are noted down and not executed."""
        return self._graph is not None

    def replay(self) -> torch.Tensor:
        """See distinf.kernels.Step."""
        while self._version != self._kernels.store.version:
            self._capture()
        with self._kernels.fixed():
            for source, on_device in self._inputs:
                on_device.copy_(source())
            for part in self._parts:
                part()
            self._kernels.gpu.wait()
        return self.result

    def buffer(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Memory that every replay uses again: made in the first pass, and the same in a capturing one."""
        if not self.capturing:
            self._buffers.append(make())
            return self._buffers[-1]
        self._taken += 1
        return self._buffers[self._taken - 1]

    def input(self, source: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What the host gives the step, on the device: `source` is asked again before each replay."""
        on_device = self.buffer(lambda: source().to(self._kernels.gpu.device, copy=True))
        if not self.capturing:
            self._inputs.append((source, on_device))
        return on_device

    def host_part(self, function: Callable[[], object]) -> None:
        """While capturing: `function` comes between what was captured and what follows."""
        self._close()
        self._parts.append(function)
        self._open()

    def reads_group(self, group: int) -> None:
        """While capturing: what follows reads these streamed weights."""
        if group != self._group:
            self._group = group
            self.host_part(partial(self._kernels.store.turn_to, group))

    def _capture(self) -> None:
        """Raises torch.OutOfMemoryError when there is too little memory and nothing left to make room."""
        store = self._kernels.store
        self._parts, self._taken, self._group = [], 0, None  # the old graphs' memory is free
        version = store.version
        self._pool = self._kernels.gpu.new_pool()
        failed = None
        try:
            with self._kernels.recorded(self), self._kernels.fixed():
                self._open()
                self.result = self._forward()
                self._close()
            self._version = version
        except BaseException as error:
            self._abandon()
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            failed = error.with_traceback(None)  # its frames hold memory
        if failed and not store.lower():
            raise failed

    def _open(self) -> None:
        graph = self._kernels.gpu.new_graph(self._pool)
        graph.begin()
        self._graph = graph

    def _close(self) -> None:
        assert self._graph is not None
        graph, self._graph = self._graph, None
        graph.end()
        self._parts.append(graph.replay)

    def _abandon(self) -> None:
        """End a capture that an op has left by an exception."""
        graph, self._graph, self._parts = self._graph, None, []
        if graph is not None:
            with suppress(RuntimeError):  # it may not be valid any more
                graph.end()
