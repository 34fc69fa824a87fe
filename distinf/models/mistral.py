"""Mistral 7B (Jiang et al., arXiv 2310.06825): Llama's layout, with a sliding window in its first release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distinf.config import ModelConfig
from distinf.models.fields import read_config
from distinf.models.llama import build, llama_config, params, windows

__all__ = ["build", "config_from_hf", "params"]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family."""
    return read_config(hf, lambda f: llama_config(f, windows=windows(f, lambda layer: True)))
