"""The three shapes that a transformer layer has: norms before, norms on both sides, attention beside the MLP.

x fp32 [T, hidden] is the residual stream. A block takes in what the layer before left to add (`delta`, None when
that is in x already) and returns what it leaves itself: the next norm adds it on its way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from distinf.kernels import Kernels
from distinf.kernels.batch import Batch, LayerCache
from distinf.layers import MLP, Attention, Experts, LatentAttention, Norm


class Block(Protocol):
    """One transformer layer."""

    def __call__(self, x: torch.Tensor, delta: Any, batch: Batch, cache: LayerCache) -> Any:
        """See above."""


@dataclass(frozen=True)
class PreNormBlock:
    """x += attention(norm(x)); x += mlp(norm(x)). GPT-2, Llama and most others."""

    input_norm: Norm
    attention: Attention | LatentAttention
    post_norm: Norm
    mlp: MLP | Experts

    def __call__(self, x: torch.Tensor, delta: Any, batch: Batch, cache: LayerCache) -> Any:
        """See Block."""
        attended = self.attention(self.input_norm(x, delta), batch, cache)
        return self.mlp(self.post_norm(x, attended))


@dataclass(frozen=True)
class SandwichBlock:
    """x += norm(attention(norm(x))); x += norm(mlp(norm(x))). Gemma 2 and 3, GLM-4."""

    input_norm: Norm
    attention: Attention
    attention_norm: Norm
    mlp_input_norm: Norm
    mlp: MLP
    mlp_norm: Norm
    kernels: Kernels

    def __call__(self, x: torch.Tensor, delta: Any, batch: Batch, cache: LayerCache) -> None:
        """See Block; nothing is left to add."""
        attended = self.kernels.settle(self.attention(self.input_norm(x, delta), batch, cache))
        self.kernels.add_(x, self.attention_norm(attended))
        fed = self.kernels.settle(self.mlp(self.mlp_input_norm(x)))
        self.kernels.add_(x, self.mlp_norm(fed))


@dataclass(frozen=True)
class ParallelBlock:
    """x += attention(norm(x)) + mlp(norm(x)): one reduction. GPT-NeoX, Falcon."""

    input_norm: Norm
    attention: Attention
    mlp_norm: Norm | None  # None: the MLP reads what the attention reads
    mlp: MLP

    def __call__(self, x: torch.Tensor, delta: Any, batch: Batch, cache: LayerCache) -> Any:
        """See Block."""
        normed = self.input_norm(x, delta)
        attended = self.attention.partial(normed, batch, cache)
        return self.mlp(self.mlp_norm(x) if self.mlp_norm else normed, plus=attended)
