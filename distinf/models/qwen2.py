"""Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama's layout with biases on query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distinf.config import ModelConfig
from distinf.models import llama
from distinf.models.llama import build, params

__all__ = ["build", "config_from_hf", "params"]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family. Raises ValueError for a sliding window, which differs by layer here."""
    if hf.get("use_sliding_window"):
        raise ValueError("config: use_sliding_window is not supported for model_type 'qwen2'")
    return replace(llama.config_from_hf(hf), qkv_bias=True)
