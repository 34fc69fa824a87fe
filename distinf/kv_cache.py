"""Paged keys and values of this rank's heads."""

from __future__ import annotations

import torch

from distinf.kernels.batch import LayerCache

BLOCK_SIZE = 64  # positions a block holds: two AMX tiles of keys deep; kBlockSize in csrc/kernel_table.h


class KVCache:
    """Keys and values of all layers for a fixed set of sequences, in blocks of BLOCK_SIZE positions."""

    def __init__(
        self, n_layers: int, n_kv_heads_local: int, head_dim: int, max_lengths: list[int], dtype: torch.dtype
    ) -> None:
        """Room for sequences of `max_lengths` tokens each, in `dtype` (int8: with a scale for each token and head).

        Memory is touched only as positions are written.
        """
        blocks = [-(-n // BLOCK_SIZE) for n in max_lengths]
        self.max_length = max(blocks) * BLOCK_SIZE  # of any sequence
        shape = (sum(blocks), n_kv_heads_local, BLOCK_SIZE, head_dim)

        def scale() -> torch.Tensor | None:
            return torch.empty(shape[:3]) if dtype == torch.int8 else None

        self.layers = [
            LayerCache(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype), scale(), scale())
            for _ in range(n_layers)
        ]
        self.block_table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
        first = 0
        for sequence, n in enumerate(blocks):
            self.block_table[sequence, :n] = torch.arange(first, first + n, dtype=torch.int32)
            first += n

    @staticmethod
    def bytes_per_token(n_layers: int, n_kv_heads_local: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one more position of one sequence costs this rank."""
        scale_bytes = torch.float32.itemsize if dtype == torch.int8 else 0
        return 2 * n_layers * n_kv_heads_local * (head_dim * dtype.itemsize + scale_bytes)
