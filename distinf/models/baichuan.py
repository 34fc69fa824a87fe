"""Baichuan and Baichuan 2 (Yang et al., arXiv 2309.10305): Llama's layout with one tensor for query, key, value.

The 7B models rotate their heads, the 13B ones have slopes (ALiBi).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distinf.config import ModelConfig
from distinf.models.fields import Fields, read_config
from distinf.models.llama import build, llama_config, mlp_params, norm_params, outer_params, output_param, rope_config
from distinf.models.params import Param
from distinf.models.phi3 import fused_qkv

__all__ = ["build", "config_from_hf", "params"]

_HIDDEN_13B = 5120
_SECOND_VOCAB = 125696


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family."""

    def read(fields: Fields) -> ModelConfig:
        hidden, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        # The second release has a loss on the size of its logits, a larger vocabulary, and a head of unit rows.
        second = fields.get("z_loss_weight", default=None) is not None or fields.integer("vocab_size") == _SECOND_VOCAB
        # Nothing in config.json says so; this entry is in the 7B models' files only.
        sloped = fields.integer("max_position_embeddings", default=0) == 0 or hidden == _HIDDEN_13B
        positions = fields.integer("model_max_length", "max_position_embeddings", default=0)
        if sloped:
            return llama_config(fields, rope=None, alibi_scale=1.0, max_positions=positions, unit_head=second)
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
