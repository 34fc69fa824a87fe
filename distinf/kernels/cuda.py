"""The ops on a GPU, by torch: an ordinary rank whose partial sums enter the all-reduce from pinned host memory.

The engine's tensors stay on the host; what a step needs of them crosses when it is used. The residual stream, weights
and KV cache live on the device. Sums over ranks and logits come back to the host, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from distinf.kernels.batch import Batch, LayerCache
from distinf.kernels.formats import Format, quantise_activations, quantised
from distinf.kernels.ranks import Ranks
from distinf.kernels.reference import ReferenceKernels, _quantise
from distinf.kernels.stream import Streamed, Streamer


@dataclass(frozen=True)
class CudaWeight:
    """A weight [n, k]: act_dtype, or the numbers of a quantised one; two of int4 in a byte, the even one low."""

    n: int
    k: int
    form: Format
    data: torch.Tensor | Streamed
    scale: torch.Tensor | None = None  # act_dtype [n, groups, 1], on the device
    offset: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.n * self.k * self.form.bits // 8


class CudaStep:
    """See distinf.kernels.Step: CUDA graphs, with the host's part between them."""

    def __init__(self, inputs: list[tuple[Callable[[], torch.Tensor], torch.Tensor]]) -> None:
        self._inputs = inputs
        self.parts: list[Callable[[], object]] = []
        self.result = torch.empty(0)

    def replay(self) -> torch.Tensor:
        for source, on_device in self._inputs:
            on_device.copy_(source())
        for part in self.parts:
            part()
        torch.cuda.current_stream().synchronize()
        return self.result


class CudaKernels(ReferenceKernels):
    """See distinf.kernels.Kernels for shapes. On device "cpu" the same code runs, for tests, without graphs."""

    name = "cuda"

    def __init__(self, device: torch.device, act_dtype: torch.dtype, memory_bytes: float = float("inf")) -> None:
        """Weights beyond `memory_bytes` are streamed. Raises ValueError when there is no such GPU."""
        if device.type == "cuda":
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if (device.index or 0) >= count:
                raise ValueError(
                    f"--device {device}: torch {torch.__version__} finds {count} CUDA devices on this host"
                )
            torch.cuda.set_device(device)
        super().__init__(act_dtype, 1)
        self.isa = device.type if device.type == "cpu" else torch.cuda.get_device_name(device)
        self._device, self._left = device, memory_bytes
        self._streamer = Streamer(device)
        self._mirrors: Any = WeakTensorKeyDictionary()  # of the host's tensors, on the device
        self._host: dict[tuple[str, torch.Size], torch.Tensor] = {}
        self._inputs: list[tuple[Callable[[], torch.Tensor], torch.Tensor]] | None = None  # of the pass being recorded
        self._given: list[torch.Tensor] = []  # the same on the device, in the order of the capturing pass
        self._capture: _Capture | None = None

    def pack(self, weight: torch.Tensor, form: Format) -> Any:
        n, k = weight.shape
        if form.bits >= 16 or not weight.numel():
            return CudaWeight(n, k, form, self._place(weight.to(self.act_dtype)))
        number, scale, offset = quantised(weight, form)
        packed = number.flatten(1).to(torch.uint8)
        if form.bits == 4:
            pairs = packed.unflatten(1, (-1, 2))
            packed = pairs[..., 0] | pairs[..., 1] << 4
        return CudaWeight(n, k, form, self._place(packed), scale.to(self._device), offset.to(self._device))

    def _place(self, data: torch.Tensor) -> torch.Tensor | Streamed:
        """On the device while there is room: in decode every byte of a dense weight saves the same time."""
        if data.nbytes <= self._left:
            try:
                resident = data.to(self._device, copy=True).contiguous()
                self._left -= data.nbytes
                return resident
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                self._left = 0
        return self._streamer.keep(data)

    def _weight(self, weight: CudaWeight) -> torch.Tensor:
        """[n, k] in act_dtype."""
        data = self._streamer.use(weight.data) if isinstance(weight.data, Streamed) else weight.data
        if weight.scale is None or weight.offset is None:
            return data
        if weight.form.bits == 4:
            data = torch.stack((data & 15, data >> 4), -1).flatten(1)
        groups = data.unflatten(1, (weight.scale.shape[1], -1))
        dequantised: torch.Tensor = weight.scale * groups + weight.offset
        return dequantised.flatten(1).to(self.act_dtype)

    def linear(
        self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        y = self._linear(x, weight, bias)
        if out_dtype != torch.float32:
            return y.to(self.act_dtype)
        logits = self._to_host("logits", y.float())
        if self._capture is None:
            self._wait()
        return logits

    def _linear(self, x: torch.Tensor, weight: CudaWeight, bias: torch.Tensor | None) -> torch.Tensor:
        """In act_dtype, or fp32 with a bias; an empty shard gives zeros."""
        if weight.form.digits == 1 and x.numel():  # w8a8 rounds activations; two digits are finer than bf16
            x = quantise_activations(x, 1).to(self.act_dtype)
        y = F.linear(x, self._weight(weight)) if weight.k and weight.n else x.new_zeros(len(x), weight.n)
        return y if bias is None else self._constant(bias) + y.float()

    def partial_linear(self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None, ranks: Ranks) -> torch.Tensor:
        sums = self._to_host("sums", self._linear(x, weight, bias).float())
        self.host_call(ranks.all_reduce_, sums)
        return sums

    def settle(self, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, add_: torch.Tensor | None = None
    ) -> torch.Tensor:
        add_ = None if add_ is None else add_.to(self._device, non_blocking=True)
        return super().rms_norm(x, self._constant(weight), eps, add_)

    def rope_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        super().rope_(x, self._input(lambda: cos), self._input(lambda: sin))

    def kv_append_(self, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, batch: Batch) -> None:
        size = cache.k.shape[2]
        block = self._input(lambda: batch.block_table[batch.sequence, batch.positions // size].long())
        place = block, slice(None), self._input(lambda: (batch.positions % size).long())
        for x, stored, scales in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
            if scales is None:
                self._mirror(stored)[place] = x
            else:
                self._mirror(stored)[place], self._mirror(scales)[place] = _quantise(x)

    def attention(
        self, q: torch.Tensor, cache: LayerCache, batch: Batch, group: int, group_offset: int, window: int = 0
    ) -> torch.Tensor:
        heads = self._input(lambda: (group_offset + torch.arange(q.shape[1])) // group)
        sequences, counts = batch.sequence.unique_consecutive(return_counts=True)
        if len(sequences) == len(q):  # decode: all rows at once, over the whole length, whatever the positions are
            table = self._input(lambda: batch.block_table[batch.sequence].long())
            position = self._input(lambda: batch.positions[:, None].long())
            return self._attend(q[:, None], cache, table, position, heads, window)[:, 0]
        size, parts, end = cache.k.shape[2], [], 0
        for sequence, count in zip(sequences.tolist(), counts.tolist(), strict=True):
            rows = slice(end, end := end + count)
            blocks = int(batch.positions[rows].max()) // size + 1
            table = batch.block_table[None, sequence, :blocks].long().to(self._device)
            position = batch.positions[None, rows].long().to(self._device)
            parts.append(self._attend(q[None, rows], cache, table, position, heads, window)[0])
        return torch.cat(parts)

    def _attend(
        self,
        q: torch.Tensor,
        cache: LayerCache,
        table: torch.Tensor,
        position: torch.Tensor,
        heads: torch.Tensor,
        window: int,
    ) -> torch.Tensor:
        """q [B, R, heads, dim] at position [B, R] over the blocks of table [B, blocks] -> the same shape."""
        k, v = (
            self._gather(stored, scales, table, heads)
            for stored, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
        )
        distance = position[:, :, None] - torch.arange(k.shape[2], device=self._device)  # [B, R, length]
        visible = (distance >= 0) & ((distance < window) if window else True)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=visible[:, None])
        return out.transpose(1, 2).contiguous()

    def _gather(
        self, stored: torch.Tensor, scales: torch.Tensor | None, table: torch.Tensor, heads: torch.Tensor
    ) -> torch.Tensor:
        """[B, blocks] -> act_dtype [B, heads, blocks * size, dim]."""
        x = self._mirror(stored)[table][:, :, heads]
        if scales is not None:
            x = x * self._mirror(scales)[table][:, :, heads][..., None]
        return x.to(self.act_dtype).transpose(1, 2).flatten(2, 3)

    def embedding(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        # A copy: the residual stream is added to in place.
        return self._input(lambda: table[ids].float()).clone()

    def record(self, forward: Callable[[], torch.Tensor]) -> Any:
        """Graphs of the stretches between two sums over ranks.

        The first pass computes, and meets the other ranks; the second is captured and computes nothing.
        Streamed weights come by copies that no graph may contain: then every step is eager.
        """
        if self._device.type == "cpu" or self._streamer.order:
            return super().record(forward)
        self._inputs = []
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            first = forward().clone()
            self._given = [on_device for _, on_device in self._inputs]
            step, self._inputs = CudaStep(self._inputs), None
            self._capture = _Capture(step, stream)
            try:
                step.result = forward()
                self._capture.close()
            finally:
                self._capture = None
        step.result.copy_(first)
        return step

    def host_call(self, function: Callable[[torch.Tensor], object], x: torch.Tensor) -> None:
        def when_it_has_come() -> None:
            self._wait()
            function(x)

        if self._capture is not None:
            self._capture.host_part(when_it_has_come)
        else:
            when_it_has_come()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _input(self, source: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What the host gives a step, on the device; a recorded step asks `source` again at each replay."""
        if self._capture is not None:
            return self._given.pop(0)
        on_device = source().to(self._device)
        if self._inputs is not None:
            self._inputs.append((source, on_device))
        return on_device

    def _constant(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor of the model on the device, brought there once."""
        if x not in self._mirrors:
            self._mirrors[x] = x.to(self._device)
        return cast(torch.Tensor, self._mirrors[x])

    def _mirror(self, x: torch.Tensor) -> torch.Tensor:
        """Memory on the device in the place of the cache's on the host, which is never touched. Zeros: masked keys are
        multiplied by nothing, which must not be an invalid number.
        """
        if x not in self._mirrors:
            self._mirrors[x] = torch.zeros(x.shape, dtype=x.dtype, device=self._device)
        return cast(torch.Tensor, self._mirrors[x])

    def _to_host(self, purpose: str, y: torch.Tensor) -> torch.Tensor:
        """Into pinned memory that results of this kind and shape share: one is used up before the next is made."""
        key = purpose, y.shape
        if key not in self._host:
            self._host[key] = torch.empty(y.shape, pin_memory=self._device.type == "cuda")
        return self._host[key].copy_(y, non_blocking=True)


class _Capture:
    """The graph that is being captured, and those before it."""

    def __init__(self, step: CudaStep, stream: torch.cuda.Stream) -> None:
        self._step, self._stream = step, stream
        self._pool = torch.cuda.graph_pool_handle()
        self._open()

    def _open(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=self._pool)

    def close(self) -> None:
        """The captured stretch becomes a part of the step."""
        self._graph.capture_end()
        self._step.parts.append(self._graph.replay)

    def host_part(self, function: Callable[[], object]) -> None:
        """`function` comes between what was captured and what follows."""
        self.close()
        self._step.parts.append(function)
        self._open()
