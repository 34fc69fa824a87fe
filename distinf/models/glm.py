"""GLM-4 of 2024 (arXiv 2406.12793): Llama's layout; half of each head rotates, in pairs of neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distinf.config import ModelConfig
from distinf.models.fields import Fields, read_config
from distinf.models.llama import (
    attention_params,
    build,
    down_param,
    llama_config,
    norm_params,
    outer_params,
    rope_config,
)
from distinf.models.params import Param
from distinf.models.phi3 import fused_gate_up

__all__ = ["build", "config_from_hf", "params"]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family."""
    return read_config(hf, lambda f: glm_config(f, bias=True))


def glm_config(fields: Fields, bias: bool) -> ModelConfig:
    """What GLM-4's releases have in common; `bias`: of query, key and value where config.json does not say."""
    hidden, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", default=hidden // n_heads)
    rope = rope_config(fields, head_dim, rotary_factor=0.5)
    return llama_config(fields, rope=rope, qkv_bias=fields.flag("attention_bias", bias))


def params(config: ModelConfig) -> list[Param]:
    """See distinf.models.Family."""
    table = outer_params(config)
    for i in range(config.n_layers):
        source, name = f"model.layers.{i}.", f"layers.{i}."
        table += norm_params(source, name, config)
        table += part_params(source, name, config)
    return table


def part_params(source: str, name: str, config: ModelConfig) -> list[Param]:
    """A layer's attention and MLP; `source` and `name` are prefixes."""
    assert config.rope
    return [
        *attention_params(source + "self_attn.", name, config, pairs=config.rope.dim),
        fused_gate_up(source + "mlp.gate_up_proj.weight", name, config),
        down_param(source + "mlp.", name, config),
    ]
