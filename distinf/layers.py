"""Where kernels meet communication: the tensor-parallel layers (Shoeybi et al., arXiv 1909.08053)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from distinf.comm import Group
from distinf.kernels import Kernels
from distinf.kernels.batch import Batch, LayerCache
from distinf.kernels.routing import Router


@dataclass(frozen=True)
class LinearWeight:
    """A packed weight of this rank and its fp32 bias, if any."""

    weight: Any  # PackedWeight of the kernels in use
    bias: torch.Tensor | None = None
    use: float = 1.0  # part of the tokens that pass through it


@dataclass(frozen=True)
class ColumnParallelLinear:
    """This rank's output columns from the whole input: no communication."""

    linear: LinearWeight
    kernels: Kernels

    def __call__(self, x: torch.Tensor, out_dtype: torch.dtype | None = None, act: str | None = None) -> torch.Tensor:
        """x [T, k] -> [T, n_local], act_dtype unless `out_dtype` says fp32. `act`: see Kernels.linear."""
        return self.kernels.linear(x, self.linear.weight, self.linear.bias, out_dtype, act)


@dataclass(frozen=True)
class RowParallelLinear:
    """The whole output from this rank's input columns: partial sums, all-reduced. The bias is on rank 0 only."""

    linear: LinearWeight
    kernels: Kernels
    group: Group

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, k_local] -> fp32 [T, n]: this rank's part of the sum alone."""
        return self.kernels.linear(x, self.linear.weight, self.linear.bias, torch.float32)

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> Any:
        """x [T, k_local] -> fp32 [T, n], for a norm's `add_` or kernels.settle: see Kernels.partial_linear.

        `plus` is another layer's `partial`: two results that are added anyway are reduced once.
        """
        return self.kernels.partial_linear(x, self.linear.weight, self.linear.bias, self.group, plus)


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
class LayerNorm:
    """Layer norm of the fp32 residual stream."""

    weight: torch.Tensor  # fp32 [hidden]
    bias: torch.Tensor  # fp32 [hidden]
    eps: float
    kernels: Kernels

    def __call__(self, x: torch.Tensor, add_: Any = None) -> torch.Tensor:
        """See RMSNorm."""
        return self.kernels.layer_norm(x, self.weight, self.bias, self.eps, add_)


Norm = RMSNorm | LayerNorm


@dataclass(frozen=True)
class HeadNorm:
    """Root mean square norm of each query or key head."""

    weight: torch.Tensor  # fp32 [head_dim]
    eps: float
    kernels: Kernels

    def __call__(self, x: torch.Tensor) -> None:
        """x [T, heads, head_dim] act_dtype, in place."""
        self.kernels.head_norm_(x, self.weight, self.eps)


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention over this rank's heads, which may cut a group in two."""

    qkv: ColumnParallelLinear
    o: RowParallelLinear
    heads: range  # of the whole model
    kv_heads: range
    group_size: int  # query heads per KV head in the whole model
    head_dim: int
    kernels: Kernels
    rope: int | None = 0  # which of the batch's rotations; None: positions are learned
    window: int = 0  # keys a token sees, itself included; 0: all
    scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    softcap: float = 0.0  # of the scores; 0: none
    slopes: torch.Tensor | None = None  # fp32, of this rank's heads; see Kernels.attention
    q_norm: HeadNorm | None = None
    k_norm: HeadNorm | None = None

    def heads_of(self, x: torch.Tensor, batch: Batch, cache: LayerCache) -> torch.Tensor:
        """x [T, hidden] act_dtype -> this rank's heads [T, heads_local * head_dim] before the output projection.

        Appends keys and values to the cache.
        """
        n, n_kv = len(self.heads), len(self.kv_heads)
        if not n:
            return x[:, :0]
        qkv = self.qkv(x).unflatten(1, (n + 2 * n_kv, self.head_dim))
        if self.q_norm and self.k_norm:
            self.q_norm(qkv[:, :n])
            self.k_norm(qkv[:, n : n + n_kv])
        if self.rope is not None:
            self.kernels.rope_(qkv[:, : n + n_kv], batch.cos[self.rope], batch.sin[self.rope])
        self.kernels.kv_append_(qkv[:, n : n + n_kv], qkv[:, n + n_kv :], cache, batch)
        offset = self.heads.start - self.kv_heads.start * self.group_size
        attended = self.kernels.attention(
            qkv[:, :n], cache, batch, self.group_size, offset, self.window, self.scale, self.softcap, self.slopes
        )
        return attended.flatten(1)

    def __call__(self, x: torch.Tensor, batch: Batch, cache: LayerCache) -> Any:
        """x [T, hidden] act_dtype -> what `o` gives."""
        return self.o(self.heads_of(x, batch, cache))

    def partial(self, x: torch.Tensor, batch: Batch, cache: LayerCache) -> torch.Tensor:
        """fp32 [T, hidden]: this rank's part of it alone; see RowParallelLinear."""
        return self.o.partial(self.heads_of(x, batch, cache))


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) over this rank's heads.

    What is cached of a token is one vector for all heads: the latent c and one rotated key. A head's key from c is
    W_k c, so a query meets c itself once it is W_k^T q; the mean of the values W_v c is W_v times that of c. Every
    rank computes and caches c, and the heads are divided.
    """

    q_down: ColumnParallelLinear | None  # to the queries' own latent vector
    q_norm: HeadNorm | None
    q: ColumnParallelLinear  # all heads' parts that do not rotate, behind them those that do
    kv_down: ColumnParallelLinear
    kv_norm: HeadNorm
    k_up: LinearWeight  # W_k^T of each head
    v_up: LinearWeight  # W_v of each head
    o: RowParallelLinear
    heads: range
    nope_dim: int
    kv_rank: int
    n_heads: int  # of the whole model
    scale: float
    kernels: Kernels

    def __call__(self, x: torch.Tensor, batch: Batch, cache: LayerCache) -> Any:
        """x [T, hidden] act_dtype -> what `o` gives; appends c and the rotated key to the cache."""
        n, kernels = len(self.heads), self.kernels
        if not n:
            return self.o(x[:, :0])
        q = self.q(self._queries_latent(x))
        nope, rope = (part.unflatten(1, (n, -1)) for part in q.tensor_split([n * self.nope_dim], 1))
        latent = self.kv_down(x)[:, None]  # [T, 1, kv_rank + rope_dim]
        self.kv_norm(latent[..., : self.kv_rank])
        kernels.rope_(latent[..., self.kv_rank :], batch.cos[0], batch.sin[0])
        kernels.rope_(rope, batch.cos[0], batch.sin[0])
        kernels.kv_append_(latent, latent, cache, batch)
        q = kernels.head_linear(nope, self.k_up.weight, rope)  # [T, heads, kv_rank + rope_dim]
        mean = kernels.attention(q, cache, batch, self.n_heads, self.heads.start, 0, self.scale)
        values = kernels.head_linear(mean[..., : self.kv_rank], self.v_up.weight)
        return self.o(values.flatten(1))

    def _queries_latent(self, x: torch.Tensor) -> torch.Tensor:
        if self.q_down is None or self.q_norm is None:
            return x
        latent = self.q_down(x)
        self.q_norm(latent[:, None])
        return latent


@dataclass(frozen=True)
class MLP:
    """Feed-forward block: down(act(up(x))), or with a gate down(act(gate(x)) * up(x))."""

    up: ColumnParallelLinear  # a gated weight holds the gate, too
    down: RowParallelLinear
    act: str

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> Any:
        """x [T, hidden] act_dtype -> what `down` gives. `plus`: see RowParallelLinear."""
        return self.down(self.up(x, act=self.act), plus)

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [T, hidden]: this rank's part of it alone; see RowParallelLinear."""
        return self.down.partial(self.up(x, act=self.act))


@dataclass(frozen=True)
class Experts:
    """Mixture of experts (Shazeer et al., arXiv 1701.06538): a rank has columns of each, or some of them whole."""

    gate: ColumnParallelLinear  # whole on every rank; see models.moe.router_param
    choice_bias: torch.Tensor | None  # fp32 [experts]; see Kernels.route
    router: Router
    experts: range  # those of this rank, whose weights follow
    ffn: int  # columns of each here
    gate_up: Sequence[LinearWeight]
    down: Sequence[LinearWeight]
    act: str
    shared: MLP | None  # an expert that all tokens use
    shared_gate: ColumnParallelLinear | None
    kernels: Kernels
    group: Group

    def __call__(self, x: torch.Tensor) -> Any:
        """x [T, hidden] act_dtype -> fp32 [T, hidden], as RowParallelLinear gives it."""
        kernels = self.kernels
        chosen = kernels.route(self.gate(x, torch.float32), self.choice_bias, self.router)
        routes = replace(chosen, experts=self.experts)
        rows = kernels.expert_rows(x, routes)
        hidden = kernels.expert_linear(rows, [w.weight for w in self.gate_up], routes, self.ffn, act=self.act)
        y = kernels.expert_linear(hidden, [w.weight for w in self.down], routes, x.shape[1], torch.float32)
        shared = self.shared.partial(x) if self.shared else None
        weight = self.shared_gate(x, torch.float32) if self.shared_gate else None
        return kernels.all_reduce_(kernels.expert_sum(y, routes, shared, weight), self.group)
