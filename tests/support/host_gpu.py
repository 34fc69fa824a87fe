"""A stand-in for distinf.kernels.gpu.Gpu that works in host memory, and is as unkind as a GPU may be.

A copy beside the computation spoils its target at once and comes only when it is waited for. A graph's ops are not
executed while it is captured: their results are NaN until it is replayed, on the same memory. What may not be captured
is refused. Memory runs out when a test says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Ops that need the device's numbers on the host.
_SYNC = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "unique_consecutive", "unique_dim")


class HostGpu:
    """See Gpu."""

    def __init__(self, memory_bytes: int = 1 << 40) -> None:
        """`memory_bytes`: what free_bytes tells."""
        self.device, self.name = torch.device("cpu"), "a GPU of host memory"
        self.memory_bytes = memory_bytes
        self.capturing: _HostGraph | None = None
        self.copies: list[_Copy] = []  # all that were asked for
        self.graphs = 0
        self.matmuls = 0
        self.fails_at: set[int] = set()  # numbers of the matmuls that run out of memory

    def free_bytes(self) -> int:
        self._not_while_capturing()
        return self.memory_bytes

    def trim(self) -> None:
        self._not_while_capturing()

    def synchronize(self) -> None:
        self._not_while_capturing()
        for copy in self.copies:
            copy.finish()

    def wait(self) -> None:
        self._not_while_capturing()

    def host_buffer(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        self._not_while_capturing()
        return torch.empty(shape, dtype=dtype)

    def host_arena(self, nbytes: int) -> torch.Tensor:
        self._not_while_capturing()
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy_ahead(self, target: torch.Tensor, source: torch.Tensor) -> _Copy:
        self._not_while_capturing()
        self.copies.append(_Copy(target, source))
        return self.copies[-1]

    def wait_for(self, filled: _Copy) -> None:
        self._not_while_capturing()
        filled.finish()

    def h2d_gb_s(self) -> float:
        return 24.0

    def matmul(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.matmuls += 1
        if self.matmuls - 1 in self.fails_at:
            raise torch.OutOfMemoryError("a GPU's message of many lines")
        return x.float() @ weight.float().T

    def new_pool(self) -> Any:
        self.synchronize()
        return object()

    def new_graph(self, pool: Any) -> _HostGraph:
        self.graphs += 1
        return _HostGraph(self)

    def _not_while_capturing(self) -> None:
        assert self.capturing is None, "this may not be captured"


class _Copy:
    """One that comes as late as it may."""

    def __init__(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.shape == source.shape
        self.target, self.source, self.finished = target, source, False
        target.fill_(0xFF)  # NaN in every floating-point type

    def finish(self) -> None:
        if not self.finished:
            self.target.copy_(self.source)
        self.finished = True


class _HostGraph(TorchDispatchMode):
    """See distinf.kernels.gpu.Graph: every op below autograd, with its tensors."""

    def __init__(self, gpu: HostGpu) -> None:
        super().__init__()
        self._gpu = gpu
        self._ops: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def begin(self) -> None:
        assert self._gpu.capturing is None
        self._gpu.capturing = self
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)
        self._gpu.capturing = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        assert name not in _SYNC, f"{name} waits for the device: it may not be captured"
        written = [a for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        if written:  # in place: nothing happens now
            self._ops.append((func, args, kwargs, None))
            return args[0]
        out = func(*args, **kwargs)
        if func.is_view or func._schema.returns[0].alias_info:
            return out
        self._ops.append((func, args, kwargs, out))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                x.fill_(torch.nan if x.is_floating_point() else 0)
        return out

    def replay(self) -> None:
        assert self._gpu.capturing is None
        for func, args, kwargs, out in self._ops:
            again = func(*args, **kwargs)
            for x, y in zip(tree_leaves(out), tree_leaves(again), strict=True) if out is not None else ():
                if isinstance(x, torch.Tensor):
                    x.copy_(y)
