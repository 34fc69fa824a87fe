"""Where kernels meet communication: the tensor-parallel layers (Shoeybi et al., arXiv 1909.08053)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distinf.comm import Group
from distinf.kernels import Kernels
from distinf.kernels.batch import Batch, LayerCache


@dataclass(frozen=True)
class LinearWeight:
    """A packed weight of this rank and its fp32 bias, if any."""

    weight: Any  # PackedWeight of the kernels in use
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class ColumnParallelLinear:
    """This rank's output columns from the whole input: no communication."""

    linear: LinearWeight
    kernels: Kernels

    def __call__(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """x [T, k] -> [T, n_local], act_dtype unless `out_dtype` says fp32."""
        return self.kernels.linear(x, self.linear.weight, self.linear.bias, out_dtype)


@dataclass(frozen=True)
class RowParallelLinear:
    """The whole output from this rank's input columns: partial sums, all-reduced. The bias is on rank 0 only."""

    linear: LinearWeight
    kernels: Kernels
    group: Group

    def __call__(self, x: torch.Tensor) -> Any:
        """x [T, k_local] -> fp32 [T, n], for RMSNorm's `add_` or kernels.settle: see Kernels.partial_linear."""
        return self.kernels.partial_linear(x, self.linear.weight, self.linear.bias, self.group)


@dataclass(frozen=True)
class RMSNorm:
    """Root mean square norm of the fp32 residual stream."""

    weight: torch.Tensor  # fp32 [hidden]
    eps: float
    kernels: Kernels

    def __call__(self, x: torch.Tensor, add_: Any = None) -> torch.Tensor:
        """x fp32 [T, hidden] += add_ (a tensor, or what RowParallelLinear gave), then its norm in act_dtype."""
        return self.kernels.rms_norm(x, self.weight, self.eps, add_)


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention over this rank's heads, which may cut a group in two."""

    qkv: ColumnParallelLinear
    o: RowParallelLinear
    heads: range  # of the whole model
    kv_heads: range
    group_size: int  # query heads per KV head in the whole model
    head_dim: int
    window: int
    kernels: Kernels

    def __call__(self, x: torch.Tensor, batch: Batch, cache: LayerCache) -> Any:
        """x [T, hidden] act_dtype -> what `o` gives; appends keys and values to the cache."""
        n, n_kv = len(self.heads), len(self.kv_heads)
        qkv = self.qkv(x).unflatten(1, (n + 2 * n_kv, self.head_dim)) if n else x.new_empty(len(x), 0, self.head_dim)
        if n:
            self.kernels.rope_(qkv[:, : n + n_kv], batch.cos, batch.sin)
            self.kernels.kv_append_(qkv[:, n : n + n_kv], qkv[:, n + n_kv :], cache, batch)
            offset = self.heads.start - self.kv_heads.start * self.group_size
            qkv = self.kernels.attention(qkv[:, :n], cache, batch, self.group_size, offset, self.window)
        return self.o(qkv.flatten(1))


@dataclass(frozen=True)
class MLP:
    """Gated feed-forward block: down(silu(gate(x)) * up(x))."""

    gate_up: ColumnParallelLinear
    down: RowParallelLinear
    kernels: Kernels

    def __call__(self, x: torch.Tensor) -> Any:
        """x [T, hidden] act_dtype -> what `down` gives."""
        return self.down(self.kernels.silu_mul(self.gate_up(x)))
