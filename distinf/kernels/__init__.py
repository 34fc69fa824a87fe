"""The op list: what a model is computed with. `load` returns one implementation; it is passed down, never global.

Rows T are the tokens of a step, of all sequences together. The residual stream is fp32; what enters a GEMM
is `act_dtype`. Trailing `_` means in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from distinf.kernels import cuda, ipex, native
from distinf.kernels.formats import Format
from distinf.kernels.ranks import Ranks
from distinf.kernels.reference import ReferenceKernels


class PackedWeight(Protocol):
    """A [n, k] weight in whatever order its kernels read it; opaque to everyone else."""

    n: int
    k: int

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weight reads."""


class Step(Protocol):
    """A recorded forward pass."""

    result: torch.Tensor  # what forward returned; replays write it again

    def replay(self) -> torch.Tensor:
        """The same ops on the same buffers, with what they hold now; returns `result`."""


class ReadProbe(Protocol):
    """Memory far larger than the caches."""

    @property
    def bytes(self) -> int:
        """Its size."""

    def read_s(self, prefetch: bool) -> float:
        """Read all of it once with the rank's threads: seconds. With software prefetch, or without."""


class Kernels(Protocol):
    """The ops. All tensors are contiguous in their last dimension; shapes are asserted, not broadcast."""

    name: str  # "native", "reference", "ipex" or "cuda"
    isa: str  # instruction set really used
    threads: int
    act_dtype: torch.dtype  # bf16, or fp32 where the run asked for it

    def pack(self, weight: torch.Tensor, form: Format) -> Any:
        """[n, k] fp32 or bf16, rows may be strided -> PackedWeight, quantised as `form` says; n or k may be 0."""

    def linear(
        self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """x [T, k] act_dtype -> x . weight^T + bias: [T, n] in out_dtype (act_dtype or fp32); bias fp32 [n]."""

    def partial_linear(self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None, ranks: Ranks) -> Any:
        """x . weight^T + bias summed over `ranks`, fp32 [T, n], as rms_norm takes it for `add_`; `settle` gives it out.

        The sum may be formed only when it is read, so one such result is used up before the next is made.
        """

    def settle(self, y: Any) -> torch.Tensor:
        """What partial_linear returned, as a tensor: fp32 [T, n], the same bits on every rank."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, add_: Any = None) -> torch.Tensor:
        """x fp32 [T, hidden] += add_ (when given), then x / sqrt(mean(x^2) + eps) * weight: act_dtype.

        add_ is fp32 [T, hidden] or what partial_linear gave; weight is fp32 [hidden]. Zhang and Sennrich, arXiv
        1910.07467.
        """

    def rope_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotate x [T, heads, head_dim] (rows may be strided) by cos, sin fp32 [T, half], in place.

        Element i of the first `half` pairs with element i + half (the "rotate half" order of Hugging Face);
        elements past 2 * half stay. Su et al., arXiv 2104.09864.
        """

    def kv_append_(self, k: torch.Tensor, v: torch.Tensor, cache: Any, batch: Any) -> None:
        """Write k, v [T, kv_heads, head_dim] (rows strided alike) to each row's position in a LayerCache.

        An int8 cache gets round(x / scale), ties to even, with scale = max |x| / 127 of each head's vector.
        """

    def attention(
        self, q: torch.Tensor, cache: Any, batch: Any, group: int, group_offset: int, window: int = 0
    ) -> torch.Tensor:
        """Causal softmax(q k^T / sqrt(head_dim)) v over the cache: q [T, heads, head_dim] -> same shape.

        `group` query heads of the whole model share a KV head; local head h reads local KV head
        (group_offset + h) // group. `window` > 0 limits a row to its last `window` positions.
        """

    def silu_mul(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, 2 n] -> silu(x[:, :n]) * x[:, n:]: [T, n]. Shazeer, arXiv 2002.05202 (SwiGLU)."""

    def embedding(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """ids int32 [T], table [vocab, hidden] in act_dtype -> fp32 [T, hidden]."""

    def record(self, forward: Callable[[], torch.Tensor]) -> Step:
        """Run `forward` once and keep its ops, with their buffers and the host's calls, as a Step.

        `forward` may use torch for views only: what torch computes in it would not be recorded.
        """

    def host_call(self, function: Callable[[torch.Tensor], object], x: torch.Tensor) -> None:
        """function(x), as part of the step: a collective, for instance."""

    def read_probe(self) -> ReadProbe:
        """Memory of this rank to measure its read bandwidth on; freed with the object."""

    def measure_peak_tops(self, int8: bool) -> float:
        """Peak of this rank's threads with the instruction set in use, 1e12 bf16 (or int8) operations a second."""


@dataclass(frozen=True)
class Placement:
    """Where a rank computes: one core per thread (-1: unpinned), and whether other ranks share those cores."""

    cpus: tuple[int, ...]
    oversubscribed: bool = False


def load(
    name: str,
    isa: str,
    dtype: str,
    placement: Placement,
    gpu: int | None = None,
    gpu_memory_bytes: float = float("inf"),
) -> Kernels:
    """Kernels by `--kernels` name, `--isa` and `--dtype`; on a rank with a GPU, those of this CUDA device.

    Weights beyond `gpu_memory_bytes` are streamed to the GPU at each use. Raises ValueError when the kernels, the
    instruction set or the GPU that are asked for cannot be had.
    """
    if gpu is not None:
        act_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
        return cuda.CudaKernels(torch.device("cuda", gpu), act_dtype, gpu_memory_bytes)
    if name == "auto":
        name = "native" if dtype != "fp32" and native.best_isa() else "reference"
    if name == "native":
        if dtype == "fp32":
            raise ValueError("--kernels native cannot run --dtype fp32; expected --kernels reference or --dtype bf16")
        return native.NativeKernels(native.resolve_isa(isa), list(placement.cpus), placement.oversubscribed)
    if isa != "auto":
        raise ValueError(f"--isa {isa} needs the native kernels, but --kernels {name} --dtype {dtype} is in use")
    if name == "ipex":
        ipex.check_dtype(dtype)
        return ipex.IpexKernels(len(placement.cpus))
    return ReferenceKernels(torch.float32 if dtype == "fp32" else torch.bfloat16, len(placement.cpus))
