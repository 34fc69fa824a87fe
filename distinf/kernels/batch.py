"""What a kernel is told of a step besides its tensors: the rows, and where their keys and values lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """The rows of one step: T tokens of B sequences, each sequence's rows adjacent and in order.

    A row sees the cached positions 0 .. positions[row] of its own sequence, itself included.
    """

    positions: torch.Tensor  # int32 [T]
    sequence: torch.Tensor  # int32 [T], index into block_table
    block_table: torch.Tensor  # int32 [B, max_blocks]: cache block of positions i * block_size ...
    cos: torch.Tensor  # fp32 [ropes, T, rope_dim / 2]: a model may turn its layers by more than one rope, or none
    sin: torch.Tensor  # fp32 [ropes, T, rope_dim / 2]


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values of this rank's KV heads; in int8, x = scale * stored."""

    k: torch.Tensor  # [blocks, kv_heads_local, block_size, head_dim], act_dtype or int8
    v: torch.Tensor
    k_scale: torch.Tensor | None = None  # fp32 [blocks, kv_heads_local, block_size]; None: not quantised
    v_scale: torch.Tensor | None = None
