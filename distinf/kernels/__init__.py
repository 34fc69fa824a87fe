"""The op list: what a model is computed with. `load` returns one implementation; it is passed down, never global.

Rows T are the tokens of a step, of all sequences together. The residual stream is fp32; what enters a GEMM
is `act_dtype`. Trailing `_` means in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from distinf.kernels import extension, ipex, native
from distinf.kernels.batch import Batch
from distinf.kernels.formats import Format, Numbers
from distinf.kernels.ranks import Ranks
from distinf.kernels.reference import ReferenceKernels
from distinf.kernels.routing import Router, Routes

ACTS = ("silu", "gelu", "gelu_tanh", "relu")


class PackedWeight(Protocol):
    """A [n, k] weight in whatever order its kernels read it; opaque to everyone else."""

    n: int
    k: int
    gated: bool  # the first n / 2 rows are the gate of the others: see Kernels.linear

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weight reads."""


class Packer(Protocol):
    """A weight on its way from rows to packed."""

    def add(self, row: int, rows: torch.Tensor | Numbers, up: torch.Tensor | Numbers | None = None) -> None:
        """Rows [m, k] from `row` on: fp32 or bf16, which are quantised as the format says, or ready numbers.

        Of a gated weight they are rows of the gate, and `up` has the same ones of its other half, in the same form.
        `row` is a multiple of 32, and so is m unless these are the last rows. Threads may add different rows.
        """

    def weight(self) -> Any:
        """The PackedWeight, once every row was added."""


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
    device: torch.device  # where the ops' tensors lie; token ids, tables and batches come from the host

    def thread_ids(self) -> list[int]:
        """The kernel's ids of the threads that compute, the caller's first; only that one where torch has them."""

    def packer(self, n: int, k: int, form: Format, gated: bool = False) -> Packer:
        """Memory for an [n, k] weight, to be filled by rows; n or k may be 0."""

    def pack(self, weight: torch.Tensor, form: Format, gated: bool = False) -> Any:
        """[n, k] fp32 or bf16, rows may be strided -> PackedWeight, quantised as `form` says; n or k may be 0."""

    def arrange(self, groups: Sequence[Sequence[Any]]) -> None:
        """Every weight is packed: those of each layer together, in the order of use. Which stay on a device is decided.

        Raises ValueError when a device has too little memory even to have them brought layer by layer.
        """

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory where the ops' tensors lie, not initialised."""

    def linear(
        self,
        x: torch.Tensor,
        weight: Any,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        act: str | None = None,
    ) -> torch.Tensor:
        """x [T, k] act_dtype -> act(x . weight^T + bias): [T, n] in out_dtype (act_dtype or fp32); bias fp32 [n].

        With a gated weight the first n / 2 of these results go through `act` and are multiplied by the others:
        [T, n / 2]. Shazeer, arXiv 2002.05202 (SwiGLU and its kin). Nothing is rounded before the result.

        `act` is one of ACTS; a gated weight needs it. relu; silu, x / (1 + e^-x); gelu, x times the normal
        distribution's integral up to x; gelu_tanh, near it: x / (1 + e^(-2 u)) with
        u = sqrt(2 / pi) (x + 0.044715 x^3). Hendrycks and Gimpel, arXiv 1606.08415.
        """

    def partial_linear(
        self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None, ranks: Ranks, plus: torch.Tensor | None = None
    ) -> Any:
        """x . weight^T + bias summed over `ranks`, fp32 [T, n], as a norm takes it for `add_`; `settle` gives it out.

        `plus` fp32 [T, n], this rank's part of another sum, is added before.
        The sum may be formed only when it is read, so one such result is used up before the next is made.
        """

    def settle(self, y: Any) -> torch.Tensor:
        """What partial_linear returned, as a tensor: fp32 [T, n], the same bits on every rank."""

    def all_reduce_(self, y: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        """y fp32 [T, n] summed over `ranks`, in place; returns it, the same bits on every rank."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, add_: Any = None) -> torch.Tensor:
        """x fp32 [T, hidden] += add_ (when given), then x / sqrt(mean(x^2) + eps) * weight: act_dtype.

        add_ is fp32 [T, hidden] or what partial_linear gave; weight is fp32 [hidden]. Zhang and Sennrich, arXiv
        1910.07467.
        """

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, add_: Any = None
    ) -> torch.Tensor:
        """x fp32 [T, hidden] += add_ (as in rms_norm), then its layer norm in act_dtype.

        (x - mean) / sqrt(variance + eps) * weight + bias, with mean and variance of the row; weight and bias are fp32
        [hidden]. Ba et al., arXiv 1607.06450.
        """

    def head_norm_(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        """rms_norm of each vector of x [T, heads, head_dim] act_dtype (rows may be strided), in place.

        weight is fp32 [head_dim].
        """

    def add_(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x fp32 [T, n] += y, which is fp32 or act_dtype."""

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
        self,
        q: torch.Tensor,
        cache: Any,
        batch: Any,
        group: int,
        group_offset: int,
        window: int = 0,
        scale: float | None = None,
        softcap: float = 0.0,
        slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal softmax(scale q k^T) v over the cache: q [T, heads, head_dim] -> same shape.

        `group` query heads of the whole model share a KV head; local head h reads local KV head
        (group_offset + h) // group. `window` > 0 limits a row to its last `window` positions. `scale` None is
        1 / sqrt(head_dim). `softcap` c > 0 makes a score s c tanh(s / c) (Gemma 2, arXiv 2408.00118). `slopes`
        fp32 [heads] then lower it by the head's slope for each position from the key to the row (ALiBi, Press et al.,
        arXiv 2108.12409).
        """

    def head_linear(self, x: torch.Tensor, weight: Any, tail: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, heads, k] act_dtype, each head times its part [n, k] of weight [heads * n, k] -> [T, heads, n].

        n is a multiple of 32; x may be strided in rows and heads. `tail` [T, heads, m] is put behind the result, which
        then is [T, heads, n + m].
        """

    def route(self, logits: torch.Tensor, bias: torch.Tensor | None, router: Router) -> Routes:
        """logits fp32 [T, experts] -> each token's experts and their weights, and the order of the grouped rows.

        `bias` fp32 [experts] is added to the scores for the choice, not for the weights. All experts are meant: a rank
        that has some of them replaces `routes.experts`. What stands in the grouped rows of others is not defined.
        """

    def expert_rows(self, x: torch.Tensor, routes: Routes) -> torch.Tensor:
        """x [T, n] act_dtype -> grouped rows [T * top_k, n]: each token once for each of its experts."""

    def expert_linear(
        self,
        x: torch.Tensor,
        weights: Sequence[Any],
        routes: Routes,
        n: int,
        out_dtype: torch.dtype | None = None,
        act: str | None = None,
    ) -> torch.Tensor:
        """Grouped rows x [R, k], each times its expert's weight: [R, n], out_dtype and `act` as in linear.

        `weights` are those of routes.experts, which may be none. An expert that nobody has chosen is not read.
        """

    def expert_sum(
        self, y: torch.Tensor, routes: Routes, plus: torch.Tensor | None = None, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Grouped rows y fp32 [T * top_k, n] -> fp32 [T, n]: the weighted sum of each token's.

        `plus` fp32 [T, n], of an expert that all tokens share, is added; times sigmoid(gate), fp32 [T, 1], if given.
        """

    def softcap_(self, x: torch.Tensor, cap: float) -> None:
        """x fp32 [T, n] becomes cap tanh(x / cap)."""

    def embedding(self, ids: torch.Tensor, table: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """ids int32 [T], table [vocab, hidden] in act_dtype -> scale times its rows, fp32 [T, hidden].

        Both lie on the host.
        """

    def step_batch(self, batch: Batch) -> Batch:
        """A host's batch as the other ops of this step take it; a replay reads the host's again."""

    def to_host(self, x: torch.Tensor) -> torch.Tensor:
        """x where the host can read it, once the step is over."""

    def record(self, forward: Callable[[], torch.Tensor]) -> Step:
        """Run `forward` once and keep its ops, with their buffers and the host's calls, as a Step.

        `forward` may use torch for views only: what torch computes in it would not be recorded.
        """

    def host_call(self, function: Callable[[torch.Tensor], object], x: torch.Tensor) -> None:
        """function(x), as part of the step: a collective, for instance."""

    def link_gb_s(self) -> float:
        """Bandwidth, measured, from host memory to the device where weights are brought; 0: they are where they lie."""

    def read_probe(self) -> ReadProbe:
        """Memory of this rank to measure its read bandwidth on; freed with the object."""

    def measure_peak_tops(self, int8: bool) -> float:
        """Peak of this rank's threads with the instruction set in use, 1e12 bf16 (or int8) operations a second."""


@dataclass(frozen=True)
class Placement:
    """Where a rank computes: one core per thread (-1: unpinned), and whether other ranks share those cores."""

    cpus: tuple[int, ...]
    oversubscribed: bool = False


def load(name: str, isa: str, dtype: str, placement: Placement) -> Kernels:
    """Kernels by `--kernels` name, `--isa` and `--dtype`.

    Raises ValueError when the kernels or the instruction set that are asked for cannot be had.
    """
    if name == "auto":
        name = "native" if dtype != "fp32" and extension.best_isa() else "reference"
    if name == "native":
        if dtype == "fp32":
            raise ValueError("--kernels native cannot run --dtype fp32; expected --kernels reference or --dtype bf16")
        return native.NativeKernels(extension.resolve_isa(isa), list(placement.cpus), placement.oversubscribed)
    if isa != "auto":
        raise ValueError(f"--isa {isa} needs the native kernels, but --kernels {name} --dtype {dtype} is in use")
    if name == "ipex":
        ipex.check_dtype(dtype)
        return ipex.IpexKernels(len(placement.cpus))
    return ReferenceKernels(torch.float32 if dtype == "fp32" else torch.bfloat16, len(placement.cpus))
