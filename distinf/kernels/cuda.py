"""The ops on a GPU, by torch: an ordinary rank, whose partial sums enter the all-reduce from pinned host memory.

The ops are the reference's, on the device's tensors; what is here is what they leave out. GEMMs take operands of
act_dtype and sum in fp32; quantised weights are stored as they are and dequantised in front of the GEMM. Token ids,
tables and batches lie on the host and cross when a step begins; sums over ranks and logits cross to the host, in fp32.

Run so far on a stand-in for the GPU in host memory only (tests/support/host_gpu.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial, wraps
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F

from distinf.kernels.batch import Batch, LayerCache
from distinf.kernels.cuda_step import CudaStep
from distinf.kernels.formats import Format, Numbers, quantise_activations, quantised
from distinf.kernels.gpu import Gpu
from distinf.kernels.ranks import Ranks
from distinf.kernels.reference import ReferenceKernels
from distinf.kernels.routing import Routes
from distinf.kernels.stream import Stored, WeightStore

T = TypeVar("T")


@dataclass(frozen=True)
class CudaWeight:
    """A weight [n, k] in act_dtype, or the numbers of a quantised one with scales, and offsets if any, [n, groups]."""

    n: int
    k: int
    form: Format
    stored: Stored  # numbers are uint8, two of int4 in a byte, the even one low
    gated: bool

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.stored.home)


class CudaPacker:
    """See distinf.kernels.Packer: fills host memory, which `arrange` then places."""

    def __init__(self, n: int, k: int, form: Format, gated: bool, act_dtype: torch.dtype) -> None:
        home = [torch.empty(n, k, dtype=act_dtype)]
        if form.bits < 16:
            assert form.bits == 8 or k % 2 == 0, f"k is {k}: numbers of 4 bits are kept in pairs"
            groups = k // form.group if form.group else 1
            home = [torch.empty(n, k * form.bits // 8, dtype=torch.uint8)]
            home += [torch.empty(n, groups, dtype=form.scales) for _ in range(1 + form.zero_points)]
        self._weight = CudaWeight(n, k, form, Stored(home), gated)

    def add(self, row: int, rows: torch.Tensor | Numbers, up: torch.Tensor | Numbers | None = None) -> None:
        self._keep(row, rows)
        if up is not None:
            self._keep(self._weight.n // 2 + row, up)

    def _keep(self, row: int, rows: torch.Tensor | Numbers) -> None:
        form, home = self._weight.form, self._weight.stored.home
        place = slice(row, row + len(rows))
        if not self._weight.n * self._weight.k:
            return
        if form.bits >= 16:
            home[0][place] = rows.dequantised(form) if isinstance(rows, Numbers) else rows
            return
        if isinstance(rows, Numbers):
            number, *grid = (x for x in (rows.number, rows.scale, rows.offset) if x is not None)
        else:
            number, *grid = (x.flatten(1) for x in quantised(rows, form))
            number = number.to(torch.uint8)
        home[0][place] = number[:, ::2] | number[:, 1::2] << 4 if form.bits == 4 else number
        for to, x in zip(home[1:], grid, strict=False):  # an offset of the middle is known without
            to[place] = x

    def weight(self) -> CudaWeight:
        return self._weight


@dataclass(frozen=True)
class DeviceBatch(Batch):
    """A batch on the device, and what the host knows of it."""

    spans: list[tuple[slice, int]]  # of prompts: each sequence's rows, and its length with them; []: a row each


class CudaKernels(ReferenceKernels):
    """See distinf.kernels.Kernels for shapes. `gpu` may be a stand-in in host memory."""

    name = "cuda"

    def __init__(
        self,
        gpu: Gpu,
        act_dtype: torch.dtype,
        threads: int,
        limit_bytes: float | None = None,
        stream_all: bool = False,
    ) -> None:
        """Weights beyond `limit_bytes` (None: what the device has) are streamed, or with `stream_all` all of them.

        `threads` are the host's, for what it looks up.
        """
        super().__init__(act_dtype, threads)
        self.gpu, self.device, self.isa = gpu, gpu.device, gpu.name
        self.store = WeightStore(gpu, limit_bytes, stream_all)
        self._step: CudaStep | None = None  # that is being recorded
        self._fixed = False  # whether weights have to stay where they are

    def packer(self, n: int, k: int, form: Format, gated: bool = False) -> Any:
        return CudaPacker(n, k, form, gated, self.act_dtype)

    def arrange(self, groups: Sequence[Sequence[CudaWeight]]) -> None:
        self.store.arrange([[weight.stored for weight in group] for group in groups])

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _operands(self, x: torch.Tensor, weight: CudaWeight) -> tuple[torch.Tensor, torch.Tensor]:
        if weight.form.digits == 1 and x.numel():  # two digits are finer than act_dtype
            x = quantise_activations(x, 1).to(self.act_dtype)
        return x, self._dequantised(weight)

    def _dequantised(self, weight: CudaWeight) -> torch.Tensor:
        """[n, k] in act_dtype."""
        data, *grid = self._tensors(weight.stored)
        if not grid:
            return data
        if not data.numel():
            return data.new_zeros(weight.n, weight.k, dtype=self.act_dtype)
        if weight.form.bits == 4:
            data = torch.stack((data & 15, data >> 4), -1).flatten(1)
        scale, *offsets = (x[..., None].float() for x in grid)
        offset = offsets[0] if offsets else -weight.form.middle * scale
        groups = data.float().unflatten(1, (scale.shape[1], -1))
        return torch.addcmul(offset, groups, scale).flatten(1).to(self.act_dtype)

    def _tensors(self, weight: Stored) -> list[torch.Tensor]:
        """On the device, for what is enqueued until weights of another layer are asked for."""
        group = self.store.group_of(weight)
        if group is not None:
            if self._step is not None and self._step.capturing:
                self._step.reads_group(group)
            else:
                self.store.turn_to(group)
        assert weight.tensors is not None
        return weight.tensors

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = self.gpu.matmul(x, weight)
        return y if bias is None else y.add_(bias)

    def all_reduce_(self, y: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        if ranks.world_size == 1:
            return y
        host = self._pinned(y)
        self.host_call(ranks.all_reduce_, host)
        return y.copy_(host, non_blocking=True)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, add_: torch.Tensor | None = None
    ) -> torch.Tensor:
        if add_ is not None:
            x += add_  # not when the rest is tried again
        return self._with_room(partial(super().rms_norm, x, weight, eps))

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, add_: torch.Tensor | None = None
    ) -> torch.Tensor:
        if add_ is not None:
            x += add_
        return self._with_room(partial(super().layer_norm, x, weight, bias, eps))

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
        assert isinstance(batch, DeviceBatch)
        scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
        kv_head = (group_offset + torch.arange(q.shape[1], device=self.device)) // group

        def attend(rows: torch.Tensor, sequence: torch.Tensor, position: torch.Tensor, length: int) -> torch.Tensor:
            """rows [B, R, heads, dim] of sequences [B] at positions [B, R]."""
            key = torch.arange(length, device=self.device)
            distance = position[..., None] - key  # [B, R, length]
            hidden = (distance < 0) | (distance >= (window or length))
            # Behind the last position lies what nobody has written: the last one is read instead, and hidden.
            key = torch.minimum(key, position.amax(1, keepdim=True))  # [B, length]
            size = cache.k.shape[2]
            place = batch.block_table[sequence[:, None], key // size], slice(None), key % size
            k = self._read(cache.k, cache.k_scale, place)[:, kv_head]
            v = self._read(cache.v, cache.v_scale, place)[:, kv_head]
            heads, of_all = rows.transpose(1, 2), (distance[:, None], hidden[:, None])
            return self._attend(heads, k, v, *of_all, scale, softcap, slopes).transpose(1, 2)

        if not batch.spans:  # over the whole length, whatever the positions are: a recorded step has one shape
            length = batch.block_table.shape[1] * cache.k.shape[2]
            out = attend(q[:, None], batch.sequence, batch.positions[:, None], length)[:, 0]
        else:
            parts = [
                attend(q[None, rows], batch.sequence[rows][:1], batch.positions[None, rows], length)[0]
                for rows, length in batch.spans
            ]
            out = torch.cat(parts)
        return out.to(self.act_dtype).contiguous()

    def _read(self, cache: torch.Tensor, scale: torch.Tensor | None, place: tuple[Any, ...]) -> torch.Tensor:
        """act_dtype [B, kv_heads, length, dim] at these places, [B, length] each."""
        x = cache[place]  # [B, length, kv_heads, dim]
        if scale is not None:
            x = x * scale[place][..., None]
        return x.to(self.act_dtype).transpose(1, 2)

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
        if softcap or slopes is not None:
            return super()._attend(q, k, v, distance, hidden, scale, softcap, slopes)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden, scale=scale)

    def expert_linear(
        self,
        x: torch.Tensor,
        weights: Sequence[Any],
        routes: Routes,
        n: int,
        out_dtype: torch.dtype | None = None,
        act: str | None = None,
    ) -> torch.Tensor:
        # The host has to know how many rows each expert has: no graph may contain that.
        out = self.empty((len(x), n), out_dtype or self.act_dtype)
        linear = super().expert_linear
        self._between(lambda: out.copy_(linear(x, weights, routes, n, out_dtype, act)))
        return out

    def embedding(self, ids: torch.Tensor, table: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        look_up = super().embedding
        return self._input(lambda: look_up(ids, table, scale))

    def step_batch(self, batch: Batch) -> DeviceBatch:
        on_device = {field.name: self._input(partial(getattr, batch, field.name)) for field in fields(Batch)}
        return DeviceBatch(**on_device, spans=_spans(batch))

    def to_host(self, x: torch.Tensor) -> torch.Tensor:
        host = self._pinned(x)
        if self._step is None or not self._step.capturing:
            self.gpu.wait()
        return host

    def record(self, forward: Callable[[], torch.Tensor]) -> CudaStep:
        return CudaStep(self, forward)

    @contextmanager
    def recorded(self, step: CudaStep) -> Iterator[None]:
        """See distinf.kernels.cuda_step.Recorder."""
        self._step = step
        try:
            yield
        finally:
            self._step = None

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """See distinf.kernels.cuda_step.Recorder."""
        self._fixed = True
        try:
            yield
        finally:
            self._fixed = False

    def link_gb_s(self) -> float:
        return self.gpu.h2d_gb_s()

    def host_call(self, function: Callable[[torch.Tensor], object], x: torch.Tensor) -> None:
        def when_it_has_come() -> None:
            self.gpu.wait()
            function(x)

        self._between(when_it_has_come)

    def _between(self, part: Callable[[], object]) -> None:
        """What no graph may contain: at once, or when the step is replayed."""
        if self._step is not None and self._step.capturing:
            self._step.host_part(part)
        else:
            part()

    def _input(self, source: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What the host gives a step, on the device."""
        if self._step is not None:
            return self._step.input(source)
        return source().to(self.device, copy=True)

    def _pinned(self, x: torch.Tensor) -> torch.Tensor:
        """A copy in pinned host memory, there once what was enqueued is done."""

        def make() -> torch.Tensor:
            return self.gpu.host_buffer(x.shape, x.dtype)

        host = make() if self._step is None else self._step.buffer(make)
        return host.copy_(x, non_blocking=True)

    def _with_room(self, op: Callable[[], T]) -> T:
        """The op, again and again while memory does not do and resident weights can make room."""
        while True:
            try:
                return op()
            except torch.OutOfMemoryError as error:
                if self._fixed:
                    raise
                failed = error.with_traceback(None)  # its frames hold memory
            if not self.store.lower():
                raise failed


def _spans(batch: Batch) -> list[tuple[slice, int]]:
    """See DeviceBatch. By numpy, since torch's ops are what a step records."""
    sequence, positions = batch.sequence.numpy(), batch.positions.numpy()
    starts = [0, *(np.flatnonzero(np.diff(sequence)) + 1).tolist()]
    if len(starts) == len(sequence):
        return []
    ends = [*starts[1:], len(sequence)]
    return [(slice(a, b), int(positions[a:b].max()) + 1) for a, b in zip(starts, ends, strict=True)]


def _roomy(op: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(op)
    def in_room(self: CudaKernels, *args: Any, **more: Any) -> Any:
        return self._with_room(partial(op, self, *args, **more))

    return in_room


# Ops that ask for memory and may be tried again: none has changed anything by then. Sums are in rms_norm and
# layer_norm, which are not here, and ranks meet in partial_linear.
for _name in (
    "empty", "linear", "head_norm_", "rope_", "kv_append_", "attention", "head_linear", "route",
    "expert_rows", "expert_linear", "expert_sum", "softcap_", "_input",
):  # fmt: skip
    setattr(CudaKernels, _name, _roomy(cast(Any, getattr(CudaKernels, _name))))
