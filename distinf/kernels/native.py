"""The ops in C++ (csrc/): this file checks shapes and dtypes and passes addresses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from distinf.kernels.batch import Batch, LayerCache
from distinf.kernels.formats import Format
from distinf.kernels.packed import NativePacker, NativeWeight
from distinf.kernels.ranks import Ranks
from distinf.kernels.routing import Router, Routes

with suppress(ImportError):  # extension.py says so
    from distinf.kernels import _native

BF16 = torch.bfloat16
FP32 = torch.float32


@dataclass(frozen=True)
class PartialSum:
    """fp32 [rows, n] to be: every rank's part lies in its slot, and who reads it adds them up."""

    rows: int
    n: int
    all_reduce: _native.AllReduce


class NativeStep:
    """See distinf.kernels.Step: native programs, with the host's calls between them."""

    def __init__(self, rt: _native.Runtime) -> None:
        self._rt = rt
        self.parts: list[Callable[[], object]] = []
        self.buffers: list[torch.Tensor] = []  # what the programs point to, kept from being freed
        self.result = torch.empty(0)

    def open_segment(self) -> None:
        """What is executed from here on goes into a new program."""
        program = _native.StepProgram()
        self._rt.record(program)
        self.parts.append(lambda: self._rt.replay(program))

    def replay(self) -> torch.Tensor:
        for part in self.parts:
            part()
        return self.result


class NativeKernels:
    """See distinf.kernels.Kernels. One thread team and one weight arena each; torch keeps to one thread."""

    name = "native"
    act_dtype = BF16
    device = torch.device("cpu")

    def __init__(self, isa: str, cpus: list[int], oversubscribed: bool) -> None:
        """`isa` is a resolved level. The calling thread becomes thread 0 of the team, pinned to cpus[0]."""
        torch.set_num_threads(1)
        self.isa = isa
        self.threads = len(cpus)
        self._rt = _native.Runtime(getattr(_native.Isa, isa), cpus, oversubscribed)
        self._recording: NativeStep | None = None

    def thread_ids(self) -> list[int]:
        return self._rt.thread_ids()

    def record(self, forward: Callable[[], torch.Tensor]) -> NativeStep:
        step = NativeStep(self._rt)
        self._recording = step
        step.open_segment()
        try:
            step.result = forward()
        finally:
            self._rt.record(None)
            self._recording = None
        return step

    def host_call(self, function: Callable[[torch.Tensor], object], x: torch.Tensor) -> None:
        function(x)
        if self._recording is not None:
            self._recording.parts.append(lambda: function(x))
            self._recording.open_segment()

    def _new(self, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype)
        if self._recording is not None:
            self._recording.buffers.append(out)
        return out

    def packer(self, n: int, k: int, form: Format, gated: bool = False) -> NativePacker:
        return NativePacker(self._rt, n, k, form, gated)

    def pack(self, weight: torch.Tensor, form: Format, gated: bool = False) -> NativeWeight:
        n, k = weight.shape
        packer = self.packer(n, k, form, gated)
        packer.add(0, *weight.chunk(1 + gated))
        return packer.weight()

    def arrange(self, groups: Sequence[Sequence[NativeWeight]]) -> None:
        pass  # each lies in the arena already

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def linear(
        self,
        x: torch.Tensor,
        weight: NativeWeight,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        act: str | None = None,
    ) -> torch.Tensor:
        m, k = x.shape
        assert k == weight.k and x.dtype == BF16 and (x.stride(1) == 1 or not k), (x.shape, x.dtype, weight)
        assert bias is None or (bias.dtype == FP32 and bias.shape == (weight.n,))
        assert act or not weight.gated
        dtype = out_dtype or BF16
        out = self._new(m, weight.columns, dtype=dtype)
        if k == 0:  # an empty shard adds nothing
            assert act is None
            self.host_call(lambda y: y.copy_(bias.expand_as(y)) if bias is not None else y.zero_(), out)
            return out
        if weight.packed:
            epilogue = _address(bias), _act(act)
            self._rt.linear(x.data_ptr(), x.stride(0), weight.packed, *epilogue, out.data_ptr(), dtype == FP32, m)
        return out

    def partial_linear(
        self,
        x: torch.Tensor,
        weight: NativeWeight,
        bias: torch.Tensor | None,
        ranks: Ranks,
        plus: torch.Tensor | None = None,
    ) -> torch.Tensor | PartialSum:
        rows, n = len(x), weight.n
        assert plus is None or (plus.dtype == FP32 and plus.shape == (rows, n) and plus.is_contiguous())
        fits = ranks.native is not None and rows * n <= ranks.native.capacity
        if fits and weight.packed:
            added = _address(bias), _address(plus)
            self._rt.partial_linear(x.data_ptr(), x.stride(0), weight.packed, *added, rows, ranks.native)
            return PartialSum(rows, n, ranks.native)
        if fits and bias is None and plus is None:
            self._rt.partial_zeros(rows * n, ranks.native)
            return PartialSum(rows, n, ranks.native)
        y = self.linear(x, weight, bias, FP32)
        if plus is not None:
            self.add_(y, plus)
        return self.all_reduce_(y, ranks)

    def all_reduce_(self, y: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        if ranks.native is not None:
            self._rt.all_reduce(ranks.native, y.data_ptr(), y.numel())
        elif ranks.world_size > 1:
            self.host_call(ranks.all_reduce_, y)
        return y

    def settle(self, y: torch.Tensor | PartialSum) -> torch.Tensor:
        if isinstance(y, torch.Tensor):
            return y
        out = self._new(y.rows, y.n, dtype=FP32)
        self._rt.settle(y.all_reduce, out.data_ptr(), out.numel())
        return out

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, add_: torch.Tensor | PartialSum | None = None
    ) -> torch.Tensor:
        return self._norm(x, weight, None, eps, add_)

    def layer_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        add_: torch.Tensor | PartialSum | None = None,
    ) -> torch.Tensor:
        return self._norm(x, weight, bias, eps, add_)

    def _norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        add_: torch.Tensor | PartialSum | None,
    ) -> torch.Tensor:
        assert x.dtype == weight.dtype == FP32 and x.is_contiguous() and weight.shape == x.shape[1:]
        assert bias is None or (bias.dtype == FP32 and bias.shape == weight.shape)
        out = self._new(*x.shape)
        rest = weight.data_ptr(), _address(bias), out.data_ptr(), *x.shape, eps
        if isinstance(add_, PartialSum):
            assert x.shape == (add_.rows, add_.n)
            self._rt.all_reduce_norm(x.data_ptr(), add_.all_reduce, *rest)
        else:
            assert add_ is None or (add_.shape == x.shape and add_.dtype == FP32 and add_.is_contiguous())
            self._rt.norm(x.data_ptr(), _address(add_), *rest)
        return out

    def head_norm_(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        rows, heads, head_dim = x.shape
        assert x.dtype == BF16 and _heads_adjacent(x) and weight.dtype == FP32 and weight.shape == (head_dim,)
        self._rt.head_norm(x.data_ptr(), x.stride(0), weight.data_ptr(), rows, heads, head_dim, eps)

    def add_(self, x: torch.Tensor, y: torch.Tensor) -> None:
        assert (
            x.dtype == FP32
            and y.dtype in (BF16, FP32)
            and x.shape == y.shape
            and x.is_contiguous()
            and y.is_contiguous()
        )
        self._rt.add_rows(x.data_ptr(), y.data_ptr(), y.dtype == FP32, x.numel())

    def rope_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        rows, heads, head_dim = x.shape
        half = cos.shape[1]
        assert x.dtype == BF16 and _heads_adjacent(x) and 2 * half <= head_dim
        assert cos.shape == sin.shape == (rows, half) and cos.dtype == sin.dtype == FP32 and cos.is_contiguous()
        self._rt.rope(x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), rows, heads, head_dim, half)

    def kv_append_(self, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, batch: Batch) -> None:
        assert k.shape == v.shape and k.stride(0) == v.stride(0) and k.dtype == v.dtype == BF16
        assert _heads_adjacent(k) and _heads_adjacent(v) and k.shape[1:] == cache.k.shape[1::2]
        self._rt.kv_append(k.data_ptr(), v.data_ptr(), k.stride(0), _cache_args(cache), _batch_args(batch))

    def attention(
        self,
        q: torch.Tensor,
        cache: LayerCache,
        batch: Batch,
        group: int,
        group_offset: int,
        window: int = 0,
        scale: float | None = None,
        softcap: float = 0.0,
        slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows, heads, head_dim = q.shape
        assert slopes is None or (slopes.dtype == FP32 and slopes.shape == (heads,) and slopes.is_contiguous())
        assert q.dtype == BF16 and _heads_adjacent(q) and head_dim == cache.k.shape[3]
        assert (group_offset + heads - 1) // group < cache.k.shape[1], "a query head without its KV head"
        out = self._new(rows, heads, head_dim)
        self._rt.attention(
            q.data_ptr(), q.stride(0), out.data_ptr(), heads, group, group_offset, window,
            1 / math.sqrt(head_dim) if scale is None else scale, softcap, _address(slopes),
            _cache_args(cache), _batch_args(batch),
        )  # fmt: skip
        return out

    def head_linear(self, x: torch.Tensor, weight: NativeWeight, tail: torch.Tensor | None = None) -> torch.Tensor:
        rows, heads, k = x.shape
        assert x.dtype == BF16 and x.stride(2) == 1 and weight.packed and weight.k == k and weight.n % heads == 0
        assert tail is None or (tail.dtype == BF16 and tail.shape[:2] == x.shape[:2] and _heads_adjacent(tail))
        n, tail_n = weight.n // heads, 0 if tail is None else tail.shape[2]
        out = self._new(rows, heads, n + tail_n)
        self._rt.head_linear(
            x.data_ptr(), x.stride(0), x.stride(1), weight.packed, heads,
            _address(tail), 0 if tail is None else tail.stride(0), tail_n, out.data_ptr(), rows,
        )  # fmt: skip
        return out

    def route(self, logits: torch.Tensor, bias: torch.Tensor | None, router: Router) -> Routes:
        rows, experts = logits.shape
        assert logits.dtype == FP32 and logits.is_contiguous() and experts % router.groups == 0
        assert bias is None or (bias.dtype == FP32 and bias.shape == (experts,))
        chosen = rows, router.top_k
        ids, place, starts = (self._new(*s, dtype=torch.int32) for s in (chosen, chosen, (experts + 1,)))
        routes = Routes(ids, self._new(*chosen, dtype=FP32), place, starts, range(experts))
        self._rt.route(
            logits.data_ptr(), _address(bias), rows, experts, router.top_k, router.sigmoid, router.normalise,
            router.scale, router.groups, router.top_groups, router.group_best,
            *(x.data_ptr() for x in (routes.ids, routes.weights, routes.place, routes.starts)),
        )  # fmt: skip
        return routes

    def expert_rows(self, x: torch.Tensor, routes: Routes) -> torch.Tensor:
        assert x.dtype == BF16 and x.is_contiguous()
        rows, top_k = routes.place.shape
        out = self._new(rows * top_k, x.shape[1])
        self._rt.expert_rows(
            x.data_ptr(), routes.place.data_ptr(), *_bounds(routes), rows, top_k, 2 * x.shape[1], out.data_ptr()
        )
        return out

    def expert_linear(
        self,
        x: torch.Tensor,
        weights: Sequence[NativeWeight],
        routes: Routes,
        n: int,
        out_dtype: torch.dtype | None = None,
        act: str | None = None,
    ) -> torch.Tensor:
        dtype = out_dtype or BF16
        assert x.dtype == BF16 and x.is_contiguous() and len(weights) == len(routes.experts)
        assert all((w.columns, w.k) == (n, x.shape[1]) and (act or not w.gated) for w in weights), (n, x.shape, act)
        out = self._new(len(x), n, dtype=dtype)
        packed = [w.packed for w in weights if w.packed]
        if packed:
            assert len(packed) == len(weights)
            first, _ = _bounds(routes)
            self._rt.expert_linear(x.data_ptr(), packed, first, _act(act), out.data_ptr(), dtype == FP32, len(x))
        elif n and weights:  # an empty shard adds nothing
            self.host_call(torch.Tensor.zero_, out)
        return out

    def expert_sum(
        self,
        y: torch.Tensor,
        routes: Routes,
        plus: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows, top_k = routes.place.shape
        assert y.dtype == FP32 and y.is_contiguous() and len(y) == rows * top_k
        assert plus is None or (plus.dtype == FP32 and plus.shape == (rows, y.shape[1]) and plus.is_contiguous())
        assert gate is None or (gate.dtype == FP32 and gate.shape == (rows, 1))
        out = self._new(rows, y.shape[1], dtype=FP32)
        self._rt.expert_sum(
            y.data_ptr(), routes.weights.data_ptr(), routes.place.data_ptr(), *_bounds(routes), _address(plus),
            _address(gate), rows, top_k, y.shape[1], out.data_ptr(),
        )  # fmt: skip
        return out

    def softcap_(self, x: torch.Tensor, cap: float) -> None:
        assert x.dtype == FP32 and x.is_contiguous()
        self._rt.softcap(x.data_ptr(), x.numel(), cap)

    def embedding(self, ids: torch.Tensor, table: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        assert ids.dtype == torch.int32 and table.dtype == BF16 and table.is_contiguous()
        out = self._new(len(ids), table.shape[1], dtype=FP32)
        self._rt.embedding(ids.data_ptr(), table.data_ptr(), scale, out.data_ptr(), *out.shape)
        return out

    def step_batch(self, batch: Batch) -> Batch:
        return batch

    def to_host(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def link_gb_s(self) -> float:
        return 0.0

    def read_probe(self) -> Any:
        return _native.ReadProbe(self._rt)

    def measure_peak_tops(self, int8: bool) -> float:
        return self._rt.peak_tops(int8, 5)


def _bounds(routes: Routes) -> tuple[int, int]:
    """Where the first grouped row of the experts that are meant stands, and where the end of the last one's."""
    bounds = routes.bounds
    return bounds.data_ptr(), bounds[-1:].data_ptr()


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _act(act: str | None) -> _native.Act:
    kind: _native.Act = getattr(_native.Act, act or "none")
    return kind


def _heads_adjacent(x: torch.Tensor) -> bool:
    """[T, heads, head_dim] whose rows may be strided but whose heads lie one behind the other."""
    return not x.numel() or (x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2]))


def _cache_args(cache: LayerCache) -> _native.Cache:
    _, kv_heads, block_size, head_dim = cache.k.shape
    assert block_size == _native.BLOCK_SIZE and cache.k.is_contiguous() and cache.v.is_contiguous()
    assert cache.k.dtype == cache.v.dtype == (BF16 if cache.k_scale is None else torch.int8)
    for scale in (cache.k_scale, cache.v_scale):
        assert scale is None or (scale.dtype == FP32 and scale.shape == cache.k.shape[:3] and scale.is_contiguous())
    return _native.Cache(
        cache.k.data_ptr(), cache.v.data_ptr(), _address(cache.k_scale), _address(cache.v_scale), kv_heads, head_dim
    )


def _batch_args(batch: Batch) -> _native.Batch:
    return _native.Batch(
        batch.positions.data_ptr(), batch.sequence.data_ptr(), batch.block_table.data_ptr(),
        batch.block_table.shape[1], len(batch.positions),
    )  # fmt: skip
