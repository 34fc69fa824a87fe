"""Baichuan and Baichuan 2, 7B (Yang et al., arXiv 2309.10305): Llama's layout with one tensor for query, key, value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distinf.config import ModelConfig
from distinf.models.fields import Fields, read_config
from distinf.models.llama import build, llama_config, mlp_params, norm_params, outer_params, output_param, rope_config
from distinf.models.params import Param
from distinf.models.phi3 import fused_qkv

__all__ = ["build", "config_from_hf", "params"]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family. Refuses the 13B models: they have ALiBi instead of rotated heads."""

    def read(fields: Fields) -> ModelConfig:
        if fields.integer("max_position_embeddings", default=0) == 0:  # only the 7B models' files have it
            raise ValueError("config: 'max_position_embeddings' is missing; Baichuan 13B, with ALiBi, is not supported")
        fields.get("model_max_length", default=None)
        # The second release has both a loss on the size of its logits and a head of unit rows.
        second = fields.get("z_loss_weight", default=None) is not None
        hidden, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        rope = rope_config(fields, hidden // n_heads, theta=10000.0)
        return llama_config(fields, rope=rope, unit_head=second)

    return read_config(hf, read)


def params(config: ModelConfig) -> list[Param]:
    """See distinf.models.Family."""
    table = outer_params(config)
    for i in range(config.n_layers):
        source, name = f"model.layers.{i}.", f"layers.{i}."
        table += norm_params(source, name, config)
        table.append(fused_qkv(source + "self_attn.W_pack.weight", name, config))
        table.append(output_param(source + "self_attn.", name, config))
        table += mlp_params(source + "mlp.", name, config)
    return table
