"""Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama's layout with biases on query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distinf.config import ModelConfig
from distinf.models.fields import Fields, read_config
from distinf.models.llama import build, llama_config, params, windows

__all__ = ["build", "config_from_hf", "params"]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family."""
    return read_config(hf, lambda f: llama_config(f, qkv_bias=True, windows=qwen_windows(f)))


def qwen_windows(fields: Fields) -> tuple[int, ...]:
    """With use_sliding_window, the layers from max_window_layers on have the window; without it none has."""
    first = fields.integer("max_window_layers", default=0)
    in_use = fields.flag("use_sliding_window")
    every = windows(fields, lambda layer: layer >= first)
    return every if in_use else ()
