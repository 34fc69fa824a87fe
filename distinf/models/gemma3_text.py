"""Gemma 3, text (arXiv 2503.19786): Gemma 2 with norms of heads, and ropes of their own for layers with a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distinf.config import ModelConfig, RopeConfig
from distinf.models.fields import Fields, read_config
from distinf.models.gemma2 import build, gemma_config, params
from distinf.models.llama import rope_config, rope_of, windows

__all__ = ["build", "config_from_hf", "params"]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family."""

    def read(fields: Fields) -> ModelConfig:
        period = fields.integer("sliding_window_pattern", default=6)  # its last layer sees everything
        rope, local = ropes(fields)
        seen = windows(fields, lambda layer: (layer + 1) % period != 0)
        return gemma_config(fields, qk_norm=True, rope=rope, local_rope=local, windows=seen)

    return read_config(hf, read)


def ropes(fields: Fields) -> tuple[RopeConfig, RopeConfig]:
    """Of layers that see everything and of those with a window."""
    head_dim, positions = fields.integer("head_dim"), fields.integer("max_position_embeddings")
    local_theta = fields.number("rope_local_base_freq", default=0.0)
    both = fields.entries("rope_parameters")
    if "sliding_attention" in both:
        everywhere, local = (dict(both[kind]) for kind in ("full_attention", "sliding_attention"))
        return rope_of(everywhere, 0.0, 1.0, head_dim, positions), rope_of(local, 0.0, 1.0, head_dim, positions)
    return rope_config(fields, head_dim), rope_of({}, local_theta, 1.0, head_dim, positions)
