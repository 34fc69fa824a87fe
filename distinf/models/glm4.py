"""GLM-4-0414: GLM with norms on both sides of attention and MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distinf.config import ModelConfig
from distinf.models.fields import read_config
from distinf.models.gemma2 import build, sandwich_norms
from distinf.models.glm import glm_config, part_params
from distinf.models.llama import outer_params
from distinf.models.params import Param

__all__ = ["build", "config_from_hf", "params"]

_NORMS = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family."""
    return read_config(hf, lambda f: glm_config(f, bias=False))


def params(config: ModelConfig) -> list[Param]:
    """See distinf.models.Family."""
    table = outer_params(config)
    for i in range(config.n_layers):
        source, name = f"model.layers.{i}.", f"layers.{i}."
        table += sandwich_norms(source, name, config, _NORMS)
        table += part_params(source, name, config)
    return table
