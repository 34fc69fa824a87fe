"""What a rank will hold, and what its machine has left: known before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of one rank."""

    weights: int
    kv_cache: int
    kv_tokens: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache


def available_bytes() -> int:
    """Memory that this machine can still give, within the limit of this process's cgroup."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        return free
    return min(free, limit - used)


def check_memory(needs: list[MemoryNeed], available: int) -> None:
    """Raises ValueError with the numbers when ranks that share a machine need more than it has available."""
    total = sum(need.total for need in needs)
    if total <= available:
        return
    weights, cache = sum(n.weights for n in needs), sum(n.kv_cache for n in needs)
    raise ValueError(
        f"{len(needs)} rank{'s' * (len(needs) > 1)} on {os.uname().nodename} need {weights / 1e9:.1f} GB for weights "
        f"and {cache / 1e9:.1f} GB for a KV cache of {needs[0].kv_tokens} tokens, but {available / 1e9:.1f} GB "
        "of memory is available; use more ranks on other machines, a smaller --dtype, or fewer tokens"
    )
