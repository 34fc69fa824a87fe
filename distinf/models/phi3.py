"""Phi-3, Phi-3.5 and Phi-4 (Abdin et al., arXiv 2404.14219): Llama's layout with fused projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distinf.config import ModelConfig
from distinf.models.fields import Fields, read_config
from distinf.models.llama import build, down_param, llama_config, norm_params, outer_params, output_param, windows
from distinf.models.params import Param, Source

__all__ = ["build", "config_from_hf", "params"]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family."""

    def read(fields: Fields) -> ModelConfig:
        fields.expect("attention_bias", False)
        return llama_config(fields, windows=windows(fields, lambda layer: True))

    return read_config(hf, read)


def params(config: ModelConfig) -> list[Param]:
    """See distinf.models.Family."""
    table = outer_params(config)
    for i in range(config.n_layers):
        source, name = f"model.layers.{i}.", f"layers.{i}."
        table += [
            *norm_params(source, name, config),
            fused_qkv(source + "self_attn.qkv_proj.weight", name, config),
            output_param(source + "self_attn.", name, config),
            fused_gate_up(source + "mlp.gate_up_proj.weight", name, config),
            down_param(source + "mlp.", name, config),
        ]
    return table


def fused_qkv(source: str, name: str, config: ModelConfig, pairs: int = 0) -> Param:
    """Query, key and value behind one another in one tensor. `pairs`: see Source."""
    head_dim = config.head_dim if pairs else 0
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shape = (q + 2 * kv, config.hidden)
    parts = (
        Source(source, shape, "q_heads", part=range(q), pairs=pairs, head_dim=head_dim),
        Source(source, shape, "kv_heads", part=range(q, q + kv), pairs=pairs, head_dim=head_dim),
        Source(source, shape, "kv_heads", part=range(q + kv, q + 2 * kv)),
    )
    return Param(name + "qkv", "linear", parts, bias=config.qkv_bias)


def fused_gate_up(source: str, name: str, config: ModelConfig) -> Param:
    """Gate and up projections behind one another in one tensor."""
    shape = (2 * config.ffn, config.hidden)
    halves = (range(config.ffn), range(config.ffn, 2 * config.ffn))
    sources = tuple(Source(source, shape, "ffn", part=half) for half in halves)
    return Param(name + "gate_up", "linear", sources, gated=True)
