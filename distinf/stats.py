"""What a run reached, in the field's words and against the machine's own ceiling."""

from __future__ import annotations

import itertools

import numpy as np

from distinf.comm import Group
from distinf.kernels import Kernels


def measure_read_gb_s(kernels: Kernels, group: Group, repeats: int = 10) -> float:
    """Memory read bandwidth of all ranks together now, GB/s: the ceiling that decode is held against. Collective.

    Ranks start each repeat together and the slowest ends it, so ranks that share a memory count it once.
    """
    probe = kernels.read_probe()
    total = sum(group.all_gather_object(probe.bytes))
    best = 0.0
    for i in range(repeats):
        group.barrier()
        best = max(best, total / max(group.all_gather_object(probe.read_s(prefetch=i % 2 == 0))) / 1e9)
    return best


def percentiles(values_ms: list[float]) -> dict[str, float]:
    """p50, p90 and p99 of milliseconds; empty without values."""
    if not values_ms:
        return {}
    return {f"p{p}": round(float(np.percentile(values_ms, p)), 3) for p in (50, 90, 99)}


def token_gaps_ms(token_times_s: list[float]) -> list[float]:
    """Time per output token after the first (TPOT samples), ms."""
    return [1e3 * (b - a) for a, b in itertools.pairwise(token_times_s)]


def decode_rates(weight_bytes: int, tpot_ms: float | None, ceiling_gb_s: float) -> dict[str, float | None]:
    """GB/s that decode read and its share of the measured ceiling.

    `weight_bytes`: read for each token by all ranks together; `ceiling_gb_s`: of all ranks together. The
    floor of a token's time is weight_bytes / ceiling, so the share (roofline) is that floor over the time.
    """
    read_gb_s = weight_bytes / tpot_ms / 1e6 if tpot_ms else None
    return {
        "read_gb_s": round(read_gb_s, 2) if read_gb_s else None,
        "roofline_read_gb_s": round(ceiling_gb_s, 2),
        "roofline": round(read_gb_s / ceiling_gb_s, 4) if read_gb_s else None,
    }
