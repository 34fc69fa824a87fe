"""The ops in plain torch: the oracle of every kernel test, and the fallback where native kernels cannot run."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from distinf.kernels.batch import Batch, LayerCache
from distinf.kernels.formats import Format, Numbers, quantise, quantise_activations
from distinf.kernels.ranks import Ranks
from distinf.kernels.routing import Router, Routes

_ACTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class ReferenceWeight:
    """A weight [n, k] in act_dtype, or in fp32 what a quantised one stands for."""

    data: torch.Tensor
    form: Format
    gated: bool = False

    @property
    def n(self) -> int:
        return self.data.shape[0]

    @property
    def k(self) -> int:
        return self.data.shape[1]

    @property
    def nbytes(self) -> int:
        return self.n * self.k * self.form.bits // 8


@dataclass(frozen=True)
class RowPacker:
    """See distinf.kernels.Packer."""

    data: torch.Tensor
    form: Format
    gated: bool = False

    def add(self, row: int, rows: torch.Tensor | Numbers, up: torch.Tensor | Numbers | None = None) -> None:
        self._keep(row, rows)
        if up is not None:
            self._keep(len(self.data) // 2 + row, up)

    def _keep(self, row: int, rows: torch.Tensor | Numbers) -> None:
        if isinstance(rows, Numbers):
            rows = rows.dequantised(self.form)
        elif self.form.bits < 16 and rows.numel():
            rows = quantise(rows, self.form)
        self.data[row : row + len(rows)] = rows

    def weight(self) -> ReferenceWeight:
        return ReferenceWeight(self.data, self.form, self.gated)


class ReferenceKernels:
    """See distinf.kernels.Kernels for shapes. Computes in fp32 and rounds each result once to its dtype."""

    name = "reference"
    isa = "torch"
    device = torch.device("cpu")

    def __init__(self, act_dtype: torch.dtype, threads: int) -> None:
        self.act_dtype = act_dtype
        self.threads = threads
        torch.set_num_threads(threads)

    def thread_ids(self) -> list[int]:
        return [threading.get_native_id()]  # torch starts the others when it needs them

    def packer(self, n: int, k: int, form: Format, gated: bool = False) -> RowPacker:
        return RowPacker(torch.empty(n, k, dtype=torch.float32 if form.bits < 16 else self.act_dtype), form, gated)

    def pack(self, weight: torch.Tensor, form: Format, gated: bool = False) -> ReferenceWeight:
        n, k = weight.shape
        packer = self.packer(n, k, form, gated)
        packer.add(0, *weight.chunk(1 + gated))
        return packer.weight()

    def arrange(self, groups: Sequence[Sequence[Any]]) -> None:
        pass

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def linear(
        self,
        x: torch.Tensor,
        weight: Any,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        act: str | None = None,
    ) -> torch.Tensor:
        y = self._product(*self._operands(x, weight), bias)
        return activated(y, act, weight.gated).to(out_dtype or self.act_dtype)

    def _operands(self, x: torch.Tensor, weight: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What is multiplied: x as the weight's format rounds it, and the weight [n, k]."""
        digits = weight.form.digits
        return quantise_activations(x, digits) if digits and x.numel() else x.float(), weight.data.float()

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, k] . weight [n, k]^T + bias: fp32."""
        return F.linear(x, weight, bias)

    def partial_linear(
        self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None, ranks: Ranks, plus: torch.Tensor | None = None
    ) -> torch.Tensor:
        y = self.linear(x, weight, bias, torch.float32)
        return self.all_reduce_(y if plus is None else y.add_(plus), ranks)

    def all_reduce_(self, y: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        ranks.all_reduce_(y)
        return y

    def settle(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, add_: torch.Tensor | None = None
    ) -> torch.Tensor:
        if add_ is not None:
            x += add_
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight).to(self.act_dtype)

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, add_: torch.Tensor | None = None
    ) -> torch.Tensor:
        if add_ is not None:
            x += add_
        return F.layer_norm(x, x.shape[1:], weight, bias, eps).to(self.act_dtype)

    def head_norm_(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        y = x.float()
        x.copy_(y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight)

    def add_(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x += y

    def rope_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        half = cos.shape[1]
        first, second = x[..., :half].float(), x[..., half : 2 * half].float()
        c, s = cos[:, None], sin[:, None]
        # Assigned together: in fp32 `first` is a view of what the first assignment overwrites.
        x[..., : 2 * half] = torch.cat((first * c - second * s, second * c + first * s), -1).to(x.dtype)

    def kv_append_(self, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, batch: Batch) -> None:
        size = cache.k.shape[2]
        place = batch.block_table[batch.sequence, batch.positions // size], slice(None), batch.positions % size
        for x, stored, scales in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
            if scales is None:
                stored[place] = x
            else:
                stored[place], scales[place] = _quantise(x)

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
        scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
        kv_head = (group_offset + torch.arange(q.shape[1])) // group
        out = torch.empty(q.shape, dtype=self.act_dtype)
        for sequence in batch.sequence.unique():
            rows = batch.sequence == sequence
            position = batch.positions[rows]
            length = int(position.max()) + 1
            blocks = batch.block_table[sequence]
            k = _gather(cache.k, cache.k_scale, blocks, length)[kv_head]
            v = _gather(cache.v, cache.v_scale, blocks, length)[kv_head]
            distance = position[:, None] - torch.arange(length)  # [rows, length]
            hidden = (distance < 0) | ((distance >= window) if window else False)
            heads = q[rows].transpose(0, 1)
            attended = self._attend(heads, k, v, distance, hidden, scale, softcap, slopes)
            out[rows] = attended.transpose(0, 1).to(self.act_dtype)
        return out

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        distance: torch.Tensor,
        hidden: torch.Tensor,
        scale: float,
        softcap: float,
        slopes: torch.Tensor | None,
    ) -> torch.Tensor:
        """q [..., heads, rows, dim] over k and v [..., heads, length, dim], but for those `hidden`: like q.

        `distance` and `hidden` are [..., rows, length] for all heads. See Kernels.attention for the rest.
        """
        scores = q.float() @ k.float().transpose(-1, -2) * scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        if slopes is not None:
            scores -= slopes[:, None, None] * distance
        return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v.float()

    def head_linear(self, x: torch.Tensor, weight: Any, tail: torch.Tensor | None = None) -> torch.Tensor:
        rows, parts = self._operands(x, weight)
        y = torch.einsum("thk,hnk->thn", rows, parts.unflatten(0, (x.shape[1], -1))).to(self.act_dtype)
        return y if tail is None else torch.cat((y, tail), 2)

    def route(self, logits: torch.Tensor, bias: torch.Tensor | None, router: Router) -> Routes:
        scores = logits.sigmoid() if router.sigmoid else logits.softmax(-1)
        choice = scores if bias is None else scores + bias
        if router.groups > 1:
            groups = choice.unflatten(1, (router.groups, -1))
            best = groups.topk(router.group_best, -1).values.sum(-1).topk(router.top_groups, -1).indices
            kept = torch.zeros(groups.shape[:2], dtype=torch.bool, device=best.device).scatter_(1, best, True)
            choice = groups.masked_fill(~kept[..., None], -math.inf).flatten(1)
        ids = choice.topk(router.top_k, -1).indices
        weights = scores.gather(1, ids)
        if router.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        place = torch.empty_like(ids).view(-1)
        place[ids.view(-1).argsort(stable=True)] = torch.arange(ids.numel(), device=ids.device)
        every = range(logits.shape[1])
        experts = torch.arange(len(every) + 1, device=ids.device)
        starts = torch.searchsorted(ids.view(-1).sort().values, experts)
        return Routes(ids.int(), weights * router.scale, place.view_as(ids).int(), starts.int(), every)

    def expert_rows(self, x: torch.Tensor, routes: Routes) -> torch.Tensor:
        rows = x.new_empty(routes.place.numel(), x.shape[1])
        rows[routes.place.view(-1)] = x.repeat_interleave(routes.place.shape[1], 0)
        return rows

    def expert_linear(
        self,
        x: torch.Tensor,
        weights: Sequence[Any],
        routes: Routes,
        n: int,
        out_dtype: torch.dtype | None = None,
        act: str | None = None,
    ) -> torch.Tensor:
        out = x.new_full((len(x), n), math.nan, dtype=out_dtype or self.act_dtype)
        bounds = routes.bounds.tolist()
        for weight, a, b in zip(weights, bounds[:-1], bounds[1:], strict=True):
            if a < b:
                out[a:b] = self.linear(x[a:b], weight, None, out_dtype, act)
        return out

    def expert_sum(
        self,
        y: torch.Tensor,
        routes: Routes,
        plus: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        there = (routes.place >= routes.bounds[0]) & (routes.place < routes.bounds[-1])
        parts = torch.where(there[..., None], y[routes.place] * routes.weights[..., None], 0.0)
        total = parts.sum(1)
        if plus is None:
            return total
        return total + (plus if gate is None else gate.sigmoid() * plus)

    def softcap_(self, x: torch.Tensor, cap: float) -> None:
        x.copy_(cap * (x / cap).tanh())

    def embedding(self, ids: torch.Tensor, table: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return table[ids].float() * scale

    def step_batch(self, batch: Batch) -> Batch:
        return batch

    def to_host(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def record(self, forward: Callable[[], torch.Tensor]) -> Any:
        return EagerStep(forward, forward())

    def host_call(self, function: Callable[[torch.Tensor], object], x: torch.Tensor) -> None:
        function(x)

    def link_gb_s(self) -> float:
        return 0.0

    def read_probe(self) -> TorchReadProbe:
        return TorchReadProbe(self.device)

    def measure_peak_tops(self, int8: bool) -> float:
        a = torch.ones(1024, 1024, dtype=self.act_dtype, device=self.device)
        return max(2 * 1024**3 / _seconds(lambda: (a @ a)[0, 0].item()) / 1e12 for _ in range(5))


@dataclass
class EagerStep:
    """See distinf.kernels.Step: torch has nothing to record, so a replay is the forward pass again."""

    forward: Callable[[], torch.Tensor]
    result: torch.Tensor

    def replay(self) -> torch.Tensor:
        self.result = self.forward()
        return self.result


class TorchReadProbe:
    """See distinf.kernels.ReadProbe: a sum by torch, which reads at about the memory's speed."""

    bytes = 256 << 20

    def __init__(self, device: torch.device) -> None:
        self._data = torch.ones(self.bytes // 4, device=device)

    def read_s(self, prefetch: bool) -> float:
        return _seconds(lambda: self._data.sum().item())


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def activated(y: torch.Tensor, act: str | None, gated: bool) -> torch.Tensor:
    """What Kernels.linear makes of its sums y [T, n]."""
    assert act or not gated
    if act is None:
        return y
    gate, *up = y.float().chunk(1 + gated, dim=-1)
    return _ACTS[act](gate) * up[0] if gated else _ACTS[act](gate)


def _quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, heads, dim] -> int8 and the scale of each vector, [T, heads]; see Kernels.kv_append_."""
    largest = x.float().abs().amax(-1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (x.float() / scale[..., None]).round().to(torch.int8), scale


def _gather(cache: torch.Tensor, scale: torch.Tensor | None, blocks: torch.Tensor, length: int) -> torch.Tensor:
    """Blocks of one sequence [blocks, heads, size, dim] -> fp32 [heads, length, dim]."""
    used = blocks[: -(-length // cache.shape[2])]
    x = cache[used].float() if scale is None else cache[used] * scale[used][..., None]
    return x.transpose(0, 1).flatten(1, 2)[:, :length]
