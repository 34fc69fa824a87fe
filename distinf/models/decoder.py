"""The frame that every family has, embedding to logits, and how its layers are made of loaded weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distinf.comm import Group
from distinf.config import ModelConfig
from distinf.kernels import Kernels
from distinf.kernels.batch import Batch
from distinf.kernels.routing import Router
from distinf.kv_cache import KVCache
from distinf.layers import (
    MLP,
    Attention,
    ColumnParallelLinear,
    Experts,
    HeadNorm,
    LatentAttention,
    LayerNorm,
    LinearWeight,
    Norm,
    RMSNorm,
    RowParallelLinear,
)
from distinf.models import alibi
from distinf.models.blocks import Block
from distinf.models.params import Weights
from distinf.models.rope import Rotary
from distinf.shard import Shard

# Latent vectors are normed with this whatever config.json says of the other norms.
MLA_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Decoder:
    """See distinf.models.Model."""

    config: ModelConfig
    shard: Shard
    embed: torch.Tensor  # [vocab, hidden], each rank whole: ids travel, embeddings do not
    positions: torch.Tensor | None  # [max_positions, hidden]: learned ones
    ropes: Sequence[Rotary]
    blocks: Sequence[Block]
    norm: Norm
    head: ColumnParallelLinear
    kernels: Kernels

    def batch(
        self, positions: torch.Tensor, sequence: torch.Tensor, block_table: torch.Tensor, lengths: torch.Tensor
    ) -> Batch:
        """See distinf.models.Model."""
        turns = [rope(positions, lengths) for rope in self.ropes] or [(torch.empty(len(positions), 0),) * 2]
        return Batch(positions, sequence, block_table, *(torch.stack(x) for x in zip(*turns, strict=True)))

    def forward(self, ids: torch.Tensor, batch: Batch, cache: KVCache, last: torch.Tensor | None) -> torch.Tensor:
        """See distinf.models.Model."""
        x = self.kernels.embedding(ids, self.embed, self.config.embed_scale)
        if self.positions is not None:
            self.kernels.add_(x, self.kernels.embedding(batch.positions, self.positions))
        batch = self.kernels.step_batch(batch)
        delta = None
        for block, layer_cache in zip(self.blocks, cache.layers, strict=True):
            delta = block(x, delta, batch, layer_cache)
        normed = self.norm(x, delta)
        logits = self.head(normed if last is None else normed[last], torch.float32)
        if self.config.logit_softcap:
            self.kernels.softcap_(logits, self.config.logit_softcap)
        return self.kernels.to_host(logits)


@dataclass(frozen=True)
class Parts:
    """Layers around this rank's weights, by the names of the split table."""

    config: ModelConfig
    shard: Shard
    weights: Weights
    kernels: Kernels
    group: Group

    def norm(self, name: str) -> Norm:
        """RMSNorm, or LayerNorm with the bias beside the weight."""
        tensors, eps = self.weights.tensors, self.config.norm_eps
        if self.config.layer_norm:
            return LayerNorm(tensors[name], tensors[name + ".bias"], eps, self.kernels)
        return RMSNorm(tensors[name], eps, self.kernels)

    def column(self, name: str) -> ColumnParallelLinear:
        """Column-parallel linear."""
        return ColumnParallelLinear(self.weights.linears[name], self.kernels)

    def row(self, name: str) -> RowParallelLinear:
        """Row-parallel linear."""
        return RowParallelLinear(self.weights.linears[name], self.kernels, self.group)

    def attention(self, layer: int) -> Attention:
        """Attention of a layer, from `qkv` and `o`."""
        config, name, window = self.config, f"layers.{layer}.", self.config.window(layer)

        def head_norm(which: str) -> HeadNorm | None:
            weight = self.weights.tensors.get(name + which)
            return None if weight is None else HeadNorm(weight, config.norm_eps, self.kernels)

        return Attention(
            qkv=self.column(name + "qkv"),
            o=self.row(name + "o"),
            heads=self.shard.q_heads,
            kv_heads=self.shard.kv_heads,
            group_size=config.n_heads // config.n_kv_heads,
            head_dim=config.head_dim,
            kernels=self.kernels,
            rope=None if config.rope is None else int(config.local_rope is not None and window > 0),
            window=window,
            scale=config.score_scale,
            softcap=config.score_softcap,
            slopes=self._slopes(),
            q_norm=head_norm("q_norm"),
            k_norm=head_norm("k_norm"),
        )

    def _slopes(self) -> torch.Tensor | None:
        heads = self.shard.q_heads
        scale = self.config.alibi_scale
        if not scale:
            return None
        return (scale * alibi.slopes(self.config.n_heads)[heads.start : heads.stop]).to(self.kernels.device)

    def latent_attention(self, layer: int) -> LatentAttention:
        """Multi-head latent attention of a layer."""
        config, mla, name = self.config, self.config.mla, f"layers.{layer}."
        assert mla and config.score_scale

        def norm(which: str) -> HeadNorm:
            return HeadNorm(self.weights.tensors[name + which], MLA_NORM_EPS, self.kernels)

        return LatentAttention(
            q_down=self.column(name + "q_down") if mla.q_rank else None,
            q_norm=norm("q_norm") if mla.q_rank else None,
            q=self.column(name + "q"),
            kv_down=self.column(name + "kv_down"),
            kv_norm=norm("kv_norm"),
            k_up=self.weights.linears[name + "k_up"],
            v_up=self.weights.linears[name + "v_up"],
            o=self.row(name + "o"),
            heads=self.shard.q_heads,
            nope_dim=mla.nope_dim,
            kv_rank=mla.kv_rank,
            n_heads=config.n_heads,
            scale=config.score_scale,
            kernels=self.kernels,
        )

    def mlp(self, layer: int, gated: bool = True, which: str = "") -> MLP:
        """MLP of a layer, from `gate_up` (`up` without a gate) and `down`; `which` is a prefix of these names."""
        name = f"layers.{layer}.{which}"
        up = self.column(name + ("gate_up" if gated else "up"))
        return MLP(up, self.row(name + "down"), self.config.act)

    def experts(self, layer: int) -> Experts:
        """Mixture of experts of a layer."""
        moe, name, linears = self.config.moe, f"layers.{layer}.", self.weights.linears
        assert moe

        def each(which: str) -> list[LinearWeight]:
            return [linears[f"{name}experts.{e}.{which}"] for e in self.shard.experts]

        return Experts(
            gate=self.column(name + "router"),
            choice_bias=self.weights.tensors.get(name + "choice_bias"),
            router=Router(moe.top_k, moe.sigmoid, moe.normalise, moe.scale, moe.groups, moe.top_groups, moe.group_best),
            experts=self.shard.experts,
            ffn=len(self.shard.expert_ffn),
            gate_up=each("gate_up"),
            down=each("down"),
            act=self.config.act,
            shared=self.mlp(layer, which="shared.") if moe.shared_ffn else None,
            shared_gate=self.column(name + "shared_gate") if moe.shared_gate else None,
            kernels=self.kernels,
            group=self.group,
        )

    def decoder(self, blocks: Sequence[Block]) -> Decoder:
        """The model around its layers."""
        config = self.config
        return Decoder(
            config=config,
            shard=self.shard,
            embed=self.weights.tensors["embed"],
            positions=self.weights.tensors.get("positions"),
            ropes=[Rotary(rope) for rope in (config.rope, config.local_rope) if rope],
            blocks=blocks,
            norm=self.norm("norm"),
            head=self.column("head"),
            kernels=self.kernels,
        )
