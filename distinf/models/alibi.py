"""Positions by slopes (ALiBi: Press et al., arXiv 2108.12409): a head's scores fall with the distance of the key."""

from __future__ import annotations

import torch


def slopes(n_heads: int) -> torch.Tensor:
    """fp32 [n_heads]: how much a score falls with each position between query and key.

    With n heads, n a power of two, head i (from 1) has 2^(-8 i / n). Other numbers of heads take the n below them, and
    then every other one of the 2 n above, as the authors' code does (section 3 leaves it open).
    """
    n = 1 << (n_heads.bit_length() - 1)
    exponents = [8 * i / n for i in range(1, n + 1)] + [4 * i / n for i in range(1, 2 * (n_heads - n), 2)]
    return 2.0 ** -torch.tensor(exponents)
