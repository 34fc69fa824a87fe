"""What the ranks' GEMMs and reductions take, measured with all ranks at work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch

from distinf.comm import Group
from distinf.comm.single import SingleGroup
from distinf.config import ModelConfig
from distinf.device import PHASES
from distinf.hetero.solve import Lines, fit, width
from distinf.kernels import Kernels
from distinf.models import family
from distinf.models.params import Param
from distinf.shard import PhaseShares, Shard, ShardPlan
from distinf.weights.load import Cuts, Formats

# Shares at which a rank is timed: few, since times are nearly linear, and up to the whole, since a fit that is
# stretched beyond its points is worth less.
SHARES = (Fraction(1, 4), Fraction(1, 2), Fraction(1))
# Weights that a decode step reads come from memory: as many layers are timed as no cache holds.
_BEYOND_CACHES = 64 << 20
_REPEATS = 5
_MANY_ROWS = 128  # such steps are long enough for two repeats


@dataclass(frozen=True)
class Profile:
    """Measured times of a model's phases on these ranks."""

    lines: dict[int, Lines]  # by rows
    reduce_s: dict[int, float]  # by rows: one sum of [rows, hidden] over ranks


def measure(
    config: ModelConfig, formats: Formats, group: Group, new_kernels: Callable[[], Kernels], rows: tuple[int, ...]
) -> Profile:
    """Time every phase at every share and number of rows, on all ranks at once. Collective; the same on every rank.

    `new_kernels` makes kernels of this rank; weights packed by them go with them.
    """
    points: dict[tuple[int, str], list[tuple[float, float]]] = {(t, phase): [] for t in rows for phase in PHASES}
    for phase in PHASES:
        for shard in _shards(config):
            for t, point in _timed(config, formats, group, new_kernels, rows, phase, shard).items():
                if point[0]:  # a quarter of one head is none
                    points[t, phase].append(point)
    everyone = group.all_gather_object({key: fit(found) for key, found in points.items()})
    lines = {t: {phase: [line[t, phase] for line in everyone] for phase in PHASES} for t in rows}
    reduce_s = {t: max(group.all_gather_object(_reduction_s(group, t * config.hidden))) for t in rows}
    return Profile(lines, reduce_s)


def _timed(
    config: ModelConfig,
    formats: Formats,
    group: Group,
    new_kernels: Callable[[], Kernels],
    rows: tuple[int, ...],
    phase: str,
    shard: Shard,
) -> dict[int, tuple[float, float]]:
    """rows -> (the shard's share, seconds) of one layer of a phase, or of the head."""
    kernels = new_kernels()
    form = formats.head if phase == "vocab" else formats.body
    shapes = [(_shape(config, shard, param), param.columns is not None) for param in phase_params(config, phase)]
    layer_bytes = sum(n * k for (n, k), _ in shapes) * form.bits // 8
    copies = 1 if phase == "vocab" else min(config.n_layers, -(-_BEYOND_CACHES // max(layer_bytes, 1)))
    layers = [
        [(kernels.pack(torch.full(shape, 2**-7, dtype=torch.bfloat16), form), sums) for shape, sums in shapes]
        for _ in range(copies)
    ]
    out_dtype = torch.float32 if phase == "vocab" else None
    found = {}
    for t in rows:
        inputs = {k: torch.ones(t, k, dtype=kernels.act_dtype) for (_, k), _ in shapes}  # as long as the step
        # What many rows are multiplied with is read once for all of them: caches hardly matter, one layer does.
        used = layers[: max(1, copies // t)]
        step = kernels.record(partial(_phase, kernels, used, inputs, out_dtype))
        times = []
        for _ in range(_REPEATS if t < _MANY_ROWS else 2):
            group.barrier()
            start = time.perf_counter()
            step.replay()
            times.append(time.perf_counter() - start)
        found[t] = (width(config, shard, phase), min(times) / len(used))  # the least disturbed
    return found


def _phase(
    kernels: Kernels, layers: list[list[tuple[Any, bool]]], inputs: dict[int, torch.Tensor], out_dtype: Any
) -> torch.Tensor:
    """Every layer's linears; sums over this rank alone."""
    y = inputs[layers[0][0][0].k]
    for layer in layers:
        for weight, is_partial in layer:
            x = inputs[weight.k]
            if is_partial:
                y = kernels.settle(kernels.partial_linear(x, weight, None, _ALONE))
            else:
                y = kernels.linear(x, weight, None, out_dtype)
    return y


_ALONE = SingleGroup()


def phase_params(config: ModelConfig, phase: str) -> list[Param]:
    """The linears of one phase: of the first layer, or the head."""
    linears = [p for p in family(config.model_type).params(config) if p.kind == "linear"]
    if phase == "vocab":
        return [p for p in linears if p.name == "head"]
    cut = {"attention": "q_heads", "ffn": "ffn"}[phase]
    first = [p for p in linears if p.name.startswith("layers.0.")]
    return [p for p in first if cut in (p.columns, *(source.rows for source in p.sources))]


def _shards(config: ModelConfig) -> list[Shard]:
    """Those of SHARES that the model can be cut into: a very small one only whole."""
    found = []
    for share in SHARES:
        with suppress(ValueError):
            found.append(one_shard(config, share))
    return found


def one_shard(config: ModelConfig, share: Fraction) -> Shard:
    """The first rank's shard when it has `share` of everything. Raises ValueError when one of two would be empty."""
    shares = PhaseShares.of([share, 1 - share])
    return ShardPlan.build(config.n_heads, config.n_kv_heads, config.ffn, config.vocab, shares).shards[0]


def _shape(config: ModelConfig, shard: Shard, param: Param) -> tuple[int, int]:
    cuts = Cuts(config, shard)
    return sum(len(cuts.rows(source)) for source in param.sources), len(cuts.columns(param))


def _reduction_s(group: Group, n: int) -> float:
    """Median time of a sum of n numbers over ranks."""
    x, times = torch.zeros(n), []
    for _ in range(20):
        group.barrier()
        start = time.perf_counter()
        group.all_reduce_(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def phase_bytes(config: ModelConfig, formats: Formats) -> dict[str, int]:
    """Bytes of each phase's weights in the whole model, scales left out."""
    whole = one_shard(config, Fraction(1))
    return {
        phase: sum(
            n * k * (formats.head if phase == "vocab" else formats.body).bits // 8
            for n, k in (_shape(config, whole, param) for param in phase_params(config, phase))
        )
        * (1 if phase == "vocab" else config.n_layers)
        for phase in PHASES
    }
