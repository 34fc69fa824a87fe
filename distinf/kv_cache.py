"""Paged keys and values of this rank's heads."""

from __future__ import annotations

from collections.abc import Callable

import torch

from distinf.kernels.batch import LayerCache

BLOCK_SIZE = 64  # positions a block holds: two AMX tiles of keys deep; kBlockSize in csrc/kernel_table.h


class KVCache:
    """Keys and values of all layers for a fixed set of sequences, in blocks of BLOCK_SIZE positions."""

    def __init__(
        self,
        n_layers: int,
        n_kv_heads_local: int,
        head_dim: int,
        max_lengths: list[int],
        dtype: torch.dtype,
        latent: bool,
        empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor],
    ) -> None:
        """Room for sequences of `max_lengths` tokens each, in `dtype` (int8: with a scale for each token and head).

        `latent`: values lie within the keys and need no memory of their own. Memory comes from `empty` (Kernels.empty)
        and is touched only as positions are written.
        """
        blocks = [-(-n // BLOCK_SIZE) for n in max_lengths]
        self.max_length = max(blocks) * BLOCK_SIZE  # of any sequence
        shape = (sum(blocks), n_kv_heads_local, BLOCK_SIZE, head_dim)

        def half() -> tuple[torch.Tensor, torch.Tensor | None]:
            return empty(shape, dtype), empty(shape[:3], torch.float32) if dtype == torch.int8 else None

        def layer() -> LayerCache:
            k, k_scale = half()
            v, v_scale = (k, k_scale) if latent else half()
            return LayerCache(k, v, k_scale, v_scale)

        self.layers = [layer() for _ in range(n_layers)]
        self.block_table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
        first = 0
        for sequence, n in enumerate(blocks):
            self.block_table[sequence, :n] = torch.arange(first, first + n, dtype=torch.int32)
            first += n

    @staticmethod
    def bytes_per_token(
        n_layers: int, n_kv_heads_local: int, head_dim: int, dtype: torch.dtype, latent: bool = False
    ) -> int:
        """Bytes that one more position of one sequence costs this rank."""
        scale_bytes = torch.float32.itemsize if dtype == torch.int8 else 0
        return (1 if latent else 2) * n_layers * n_kv_heads_local * (head_dim * dtype.itemsize + scale_bytes)
