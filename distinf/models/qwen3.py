"""Qwen3 (arXiv 2505.09388): Llama's layout with a norm of each query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distinf.config import ModelConfig
from distinf.models.fields import Fields, read_config
from distinf.models.llama import build, llama_config, params
from distinf.models.qwen2 import qwen_windows

__all__ = ["build", "config_from_hf", "params"]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family."""

    def read(fields: Fields) -> ModelConfig:
        bias = fields.flag("attention_bias")
        return llama_config(fields, qk_norm=True, qkv_bias=bias, o_bias=bias, windows=qwen_windows(fields))

    return read_config(hf, read)
