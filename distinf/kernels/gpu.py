"""One CUDA device, as much of it as a rank needs: memory, copies beside the computation, graphs.

Tests hand the same ops a stand-in that works in host memory. Nothing in this file has run on a GPU yet.
"""

from __future__ import annotations

import gc
import time
import warnings
import weakref
from typing import Any, Protocol

import torch

_PROBE_BYTES = 256 << 20  # long enough, at some 50 GB/s, for a launch not to count


class Graph(Protocol):
    """Ops that were enqueued between `begin` and `end`, as one launch."""

    def begin(self) -> None:
        """From here on ops are noted down, not executed; memory comes from the graph's pool."""

    def end(self) -> None:
        """The last op has been noted down."""

    def replay(self) -> None:
        """Enqueue them all, on the memory that they were noted down with."""


class Gpu:
    """Everything is enqueued on one stream, which becomes this thread's; copies of weights have another."""

    def __init__(self, index: int) -> None:
        """Raises ValueError when torch finds no such device."""
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if index >= count:
            raise ValueError(
                f"--device cuda:{index}: torch {torch.__version__} finds {count} CUDA devices on this host"
            )
        self.device = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(self.device)
        torch.cuda.set_device(self.device)
        self._compute, self._copies = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.set_stream(self._compute)  # not the default one: that cannot be captured

    def free_bytes(self) -> int:
        """What can still be had, torch's own cache included."""
        self.trim()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def trim(self) -> None:
        """Give back what torch keeps of freed memory, for pieces of other sizes."""
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for everything that was enqueued, copies included."""
        self._compute.synchronize()
        self._copies.synchronize()

    def wait(self) -> None:
        """Wait for the computation that was enqueued."""
        self._compute.synchronize()

    def host_buffer(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Pinned host memory, which copies reach without the host's help. Not while capturing."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def host_arena(self, nbytes: int) -> torch.Tensor:
        """Pinned uint8 [nbytes] of any size; torch's own pinned memory is rounded up to a power of two."""
        memory = torch.empty(nbytes, dtype=torch.uint8)
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0))
        # The storage, which views share, outlives the registration, which ends with this tensor.
        weakref.finalize(memory, _unregister, memory.untyped_storage()).atexit = False
        return memory

    def copy_ahead(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Copy pinned memory to the device beside what is computed, once all that is enqueued now has read `target`.

        Returns an event for `wait_for`.
        """
        was_read, filled = torch.cuda.Event(), torch.cuda.Event()
        was_read.record(self._compute)
        self._copies.wait_event(was_read)
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            filled.record(self._copies)
        return filled

    def wait_for(self, filled: Any) -> None:
        """What is enqueued from here on comes after the copy."""
        self._compute.wait_event(filled)

    def h2d_gb_s(self) -> float:
        """Bandwidth from pinned memory to the device, best of five copies."""
        host = self.host_arena(_PROBE_BYTES)
        target, times = torch.empty_like(host, device=self.device), []
        for _ in range(5):
            self.synchronize()
            start = time.perf_counter()
            self.copy_ahead(target, host)
            self.synchronize()
            times.append(time.perf_counter() - start)
        return _PROBE_BYTES / min(times) / 1e9

    def matmul(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [T, k] . weight [n, k]^T -> fp32 [T, n], never rounded on the way."""
        if x.dtype == torch.float32 or not weight.numel():  # an empty shard gives zeros, or nothing
            return (x @ weight.T).float()
        return torch.mm(x, weight.T, out_dtype=torch.float32)

    def new_pool(self) -> Any:
        """Memory for graphs that are replayed one after the other, in the order of their capture."""
        self.synchronize()  # freeing, which torch may do now, is not allowed while capturing
        gc.collect()
        self.trim()
        return torch.cuda.graph_pool_handle()

    def new_graph(self, pool: Any) -> Graph:
        """A graph that is empty."""
        return _CudaGraph(pool)


class _CudaGraph:
    """See Graph."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()
        self.replay = self._graph.replay

    def begin(self) -> None:
        # Other threads, such as the watchdog, may do as they like meanwhile.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        with warnings.catch_warnings():  # between two parts of the host there may be nothing
            warnings.filterwarnings("ignore", message=".*graph is empty", category=UserWarning)
            self._graph.capture_end()


def _unregister(storage: torch.UntypedStorage) -> None:
    torch.cuda.cudart().cudaHostUnregister(storage.data_ptr())
