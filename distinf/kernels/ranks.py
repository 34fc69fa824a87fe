"""What a kernel has to know of the other ranks: how partial sums come together."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Ranks(Protocol):
    """Those who hold the other parts of a weight; a distinf.comm.Group is one."""

    world_size: int
    native: Any  # extension.AllReduce, which a recorded step may contain; None: all_reduce_ only

    def all_reduce_(self, x: torch.Tensor) -> None:
        """Sum fp32 x over ranks, in place, the same bits on every rank."""
