"""Rotary angles, with the frequency scalings that checkpoints ask for."""

from __future__ import annotations

import math

import torch

from distinf.config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> torch.Tensor:
    """fp32 [dim / 2] rotation per position of each pair of elements: theta^(-2 i / dim), scaled if asked.

    Raises ValueError for a scaling that is not known.
    """
    exponent = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    frequencies = 1.0 / rope.theta**exponent
    scaling = rope.scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / float(scaling["factor"])
    if kind == "llama3":
        return _llama3(frequencies, scaling)
    raise ValueError(f"config: rope_scaling {kind!r} is not supported; expected default, linear or llama3")


def _llama3(frequencies: torch.Tensor, scaling: dict[str, float]) -> torch.Tensor:
    """Llama 3.1: long wavelengths stretched by `factor`, short ones kept, a linear ramp between."""
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = float(scaling["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / float(scaling["factor"]))


def rotations(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [T], fp32 [half] -> cos, sin fp32 [T, half]."""
    angles = positions[:, None].float() * frequencies
    return angles.cos(), angles.sin()
