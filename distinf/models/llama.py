"""Llama 1, 2, 3 and what shares its layout (Touvron et al., arXiv 2302.13971)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distinf.comm import Group
from distinf.config import ModelConfig, RopeConfig
from distinf.kernels import Kernels
from distinf.kernels.batch import Batch, LayerCache
from distinf.kv_cache import KVCache
from distinf.layers import MLP, Attention, ColumnParallelLinear, RMSNorm, RowParallelLinear
from distinf.models.params import Param, Source, Weights
from distinf.models.rope import inverse_frequencies, rotations
from distinf.shard import Shard


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family."""
    try:
        hidden, n_heads = int(hf["hidden_size"]), int(hf["num_attention_heads"])
        head_dim = int(hf.get("head_dim") or hidden // n_heads)
        if hf.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config: hidden_act {hf['hidden_act']!r} is not supported; expected 'silu'")
        return ModelConfig(
            model_type=str(hf["model_type"]),
            hidden=hidden,
            ffn=int(hf["intermediate_size"]),
            n_layers=int(hf["num_hidden_layers"]),
            n_heads=n_heads,
            n_kv_heads=int(hf.get("num_key_value_heads") or n_heads),
            head_dim=head_dim,
            vocab=int(hf["vocab_size"]),
            max_positions=int(hf["max_position_embeddings"]),
            norm_eps=float(hf["rms_norm_eps"]),
            rope=rope_from_hf(hf, head_dim),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=bool(hf.get("attention_bias", False)),
            o_bias=bool(hf.get("attention_bias", False)),
            mlp_bias=bool(hf.get("mlp_bias", False)),
            eos_ids=eos_ids(hf),
        )
    except KeyError as error:
        raise ValueError(f"config: {error.args[0]!r} is missing") from None


def rope_from_hf(hf: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """Rotary settings: `rope_theta` and `rope_scaling`, or the newer `rope_parameters` that holds both.

    Raises ValueError when no base frequency is given: a guessed one gives wrong text without an error.
    """
    scaling = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", None) or hf.get("rope_theta")
    if theta is None:
        raise ValueError("config: 'rope_theta' is missing")
    rope = RopeConfig(theta=float(theta), dim=head_dim, scaling=scaling or None)
    inverse_frequencies(rope)  # an unknown scaling is refused here, before anything is loaded
    return rope


def eos_ids(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids: config.json has none, one or a list."""
    value = hf.get("eos_token_id")
    return () if value is None else tuple(value) if isinstance(value, list) else (int(value),)


def params(config: ModelConfig) -> list[Param]:
    """See distinf.models.Family."""
    embed = (config.vocab, config.hidden)
    head = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    table = [
        Param("embed", "table", (Source("model.embed_tokens.weight", embed),)),
        Param("norm", "vector", (Source("model.norm.weight", (config.hidden,)),)),
        Param("head", "linear", (Source(head, embed, "vocab"),)),
    ]
    for i in range(config.n_layers):
        table += layer_params(f"model.layers.{i}.", f"layers.{i}.", config)
    return table


def layer_params(source: str, name: str, config: ModelConfig) -> list[Param]:
    """One layer's rows of the split table; `source` and `name` are prefixes."""
    hidden, ffn = config.hidden, config.ffn
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attn, mlp = source + "self_attn.", source + "mlp."
    qkv = (
        Source(attn + "q_proj.weight", (q, hidden), "q_heads"),
        Source(attn + "k_proj.weight", (kv, hidden), "kv_heads"),
        Source(attn + "v_proj.weight", (kv, hidden), "kv_heads"),
    )
    gate_up = (
        Source(mlp + "gate_proj.weight", (ffn, hidden), "ffn"),
        Source(mlp + "up_proj.weight", (ffn, hidden), "ffn"),
    )
    o, down = Source(attn + "o_proj.weight", (hidden, q)), Source(mlp + "down_proj.weight", (hidden, ffn))
    return [
        Param(name + "input_norm", "vector", (Source(source + "input_layernorm.weight", (hidden,)),)),
        Param(name + "qkv", "linear", qkv, bias=config.qkv_bias),
        Param(name + "o", "linear", (o,), columns="q_heads", bias=config.o_bias),
        Param(name + "post_norm", "vector", (Source(source + "post_attention_layernorm.weight", (hidden,)),)),
        Param(name + "gate_up", "linear", gate_up, bias=config.mlp_bias),
        Param(name + "down", "linear", (down,), columns="ffn", bias=config.mlp_bias),
    ]


@dataclass(frozen=True)
class Block:
    """One transformer layer."""

    input_norm: RMSNorm
    attention: Attention
    post_norm: RMSNorm
    mlp: MLP

    def __call__(self, x: torch.Tensor, delta: Any, batch: Batch, cache: LayerCache) -> Any:
        """x fp32 [T, hidden] takes in what the layer before left to add; returns what this one leaves."""
        attended = self.attention(self.input_norm(x, delta), batch, cache)
        return self.mlp(self.post_norm(x, attended))


@dataclass(frozen=True)
class Llama:
    """See distinf.models.Model."""

    config: ModelConfig
    shard: Shard
    embed: torch.Tensor  # [vocab, hidden], each rank whole: ids travel, embeddings do not
    blocks: list[Block]
    norm: RMSNorm
    head: ColumnParallelLinear
    frequencies: torch.Tensor
    kernels: Kernels

    def batch(self, positions: torch.Tensor, sequence: torch.Tensor, block_table: torch.Tensor) -> Batch:
        return Batch(positions, sequence, block_table, *rotations(positions, self.frequencies))

    def forward(self, ids: torch.Tensor, batch: Batch, cache: KVCache, last: torch.Tensor | None) -> torch.Tensor:
        x = self.kernels.embedding(ids, self.embed)
        delta = None
        for block, layer_cache in zip(self.blocks, cache.layers, strict=True):
            delta = block(x, delta, batch, layer_cache)
        normed = self.norm(x, delta)
        return self.head(normed if last is None else normed[last], torch.float32)


def build(config: ModelConfig, shard: Shard, weights: Weights, kernels: Kernels, group: Group) -> Llama:
    """See distinf.models.Family."""
    linears, tensors = weights.linears, weights.tensors

    def block(name: str) -> Block:
        return Block(
            input_norm=RMSNorm(tensors[name + "input_norm"], config.norm_eps, kernels),
            attention=Attention(
                qkv=ColumnParallelLinear(linears[name + "qkv"], kernels),
                o=RowParallelLinear(linears[name + "o"], kernels, group),
                heads=shard.q_heads,
                kv_heads=shard.kv_heads,
                group_size=config.n_heads // config.n_kv_heads,
                head_dim=config.head_dim,
                window=config.window,
                kernels=kernels,
            ),
            post_norm=RMSNorm(tensors[name + "post_norm"], config.norm_eps, kernels),
            mlp=MLP(
                gate_up=ColumnParallelLinear(linears[name + "gate_up"], kernels),
                down=RowParallelLinear(linears[name + "down"], kernels, group),
                kernels=kernels,
            ),
        )

    return Llama(
        config=config,
        shard=shard,
        embed=tensors["embed"],
        blocks=[block(f"layers.{i}.") for i in range(config.n_layers)],
        norm=RMSNorm(tensors["norm"], config.norm_eps, kernels),
        head=ColumnParallelLinear(linears["head"], kernels),
        frequencies=inverse_frequencies(config.rope),
        kernels=kernels,
    )
