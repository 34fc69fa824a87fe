"""The group of one rank: nothing to exchange."""

from __future__ import annotations

import sys
from typing import Any

import torch

from distinf.comm.watchdog import DEFAULT_TIMEOUT_S


class SingleGroup:
    """See distinf.comm.Group."""

    name = "single"
    rank = 0
    world_size = 1
    timeout_s = DEFAULT_TIMEOUT_S

    def begin(self, step: str, at_least_s: float = 0) -> None:
        pass

    native = None

    def __init__(self, wire_bf16: bool = False) -> None:
        """Nothing travels: `wire_bf16` has no effect."""

    def make_room(self, numbers: int) -> str:
        return ""

    def all_reduce_(self, x: torch.Tensor) -> None:
        pass

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x[None]

    def all_gather_object(self, x: Any) -> list[Any]:
        return [x]

    def broadcast_object(self, x: Any) -> Any:
        return x

    def barrier(self) -> None:
        pass

    def node_mates(self) -> list[int]:
        return [0]

    def abort(self) -> None:
        sys.exit(1)
