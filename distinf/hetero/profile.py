"""What the ranks' GEMMs and reductions take, measured with all ranks at work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
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
from distinf.kernels.formats import Format
from distinf.kernels.routing import Router, Routes
from distinf.models.params import Param
from distinf.plan import Plan, split_model
from distinf.shard import PhaseShares, Shard
from distinf.weights.load import Cuts

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
    link_gb_s: list[float] = field(default_factory=list)  # of each rank; see Kernels.link_gb_s


def measure(plan: Plan, group: Group, new_kernels: Callable[[], Kernels], rows: tuple[int, ...]) -> Profile:
    """Time every phase at every share and number of rows, on all ranks at once. Collective; the same on every rank.

    `new_kernels` makes kernels of this rank; weights packed by them go with them.
    """
    points: dict[tuple[int, str], list[tuple[float, float]]] = {(t, phase): [] for t in rows for phase in PHASES}
    for phase in PHASES:
        for shard in _shards(plan):
            for t, point in _timed(plan, group, new_kernels, rows, phase, shard).items():
                if point[0]:  # a quarter of one head is none
                    points[t, phase].append(point)
    everyone = group.all_gather_object({key: fit(found) for key, found in points.items()})
    lines = {t: {phase: [line[t, phase] for line in everyone] for phase in PHASES} for t in rows}
    reduce_s = {t: max(group.all_gather_object(_reduction_s(group, t * plan.config.hidden))) for t in rows}
    return Profile(lines, reduce_s, group.all_gather_object(new_kernels().link_gb_s()))


def _timed(
    plan: Plan, group: Group, new_kernels: Callable[[], Kernels], rows: tuple[int, ...], phase: str, shard: Shard
) -> dict[int, tuple[float, float]]:
    """rows -> (the shard's share, seconds) of one layer of a phase, or of the head."""
    config, kernels = plan.config, new_kernels()
    linears = _linears(plan, shard, phase)
    layer_bytes = sum(linear.form.nbytes(linear.n, linear.k) * linear.chosen for linear in linears)
    copies = 1 if phase == "vocab" else min(config.n_layers, -(-_BEYOND_CACHES // max(layer_bytes, 1)))
    layers = [[linear.pack(kernels) for linear in linears] for _ in range(copies)]
    found = {}
    for t in rows:
        inputs = _inputs(config, kernels, linears, t)  # as long as the step
        # What many rows are multiplied with is read once for all of them: caches hardly matter, one layer does.
        used = layers[: max(1, copies // t)]
        step = kernels.record(partial(_phase, kernels, linears, used, inputs))
        times = []
        for _ in range(_REPEATS if t < _MANY_ROWS else 2):
            group.barrier()
            start = time.perf_counter()
            step.replay()
            times.append(time.perf_counter() - start)
        found[t] = (width(config, shard, phase), min(times) / len(used))  # the least disturbed
    return found


@dataclass(frozen=True)
class _Linear:
    """A linear of this rank, or the same one of every expert."""

    n: int
    k: int
    form: Format
    out_dtype: torch.dtype | None
    sums: bool  # over ranks: it ends the phase
    experts: int  # 0: no expert's
    chosen: int  # of the experts, by one token

    def pack(self, kernels: Kernels) -> list[Any]:
        """Its weights, all equal."""
        numbers = torch.full((self.n, self.k), 2**-7, dtype=torch.bfloat16)
        form = replace(self.form, scales=torch.bfloat16)  # kernels quantise with these only
        return [kernels.pack(numbers, form) for _ in range(self.experts or 1)]


def _linears(plan: Plan, shard: Shard, phase: str) -> list[_Linear]:
    """Of one layer, in its order. The last one is summed over ranks, or gives the logits."""
    params, moe = phase_params(plan, phase), plan.config.moe
    found = []
    for param in params:
        n, k = _shape(plan.config, shard, param)
        expert = moe is not None and param.use < 1
        experts, chosen = (moe.n_experts, moe.top_k) if moe and expert else (0, 1)
        fp32 = phase == "vocab" or param.columns is not None
        sums = phase != "vocab" and param is params[-1]
        out_dtype = torch.float32 if fp32 else None
        found.append(_Linear(n, k, plan.formats[param.name], out_dtype, sums, experts, chosen))
    return found


@dataclass(frozen=True)
class _Inputs:
    """What a step's linears multiply, by their input features."""

    tokens: dict[int, torch.Tensor]
    grouped: dict[int, torch.Tensor]
    routes: Routes | None


def _inputs(config: ModelConfig, kernels: Kernels, linears: list[_Linear], rows: int) -> _Inputs:
    def ones(each: int, of_experts: bool) -> dict[int, torch.Tensor]:
        sizes = {linear.k for linear in linears if bool(linear.experts) == of_experts}
        return {k: kernels.empty((rows * each, k), kernels.act_dtype).fill_(1) for k in sizes}

    tokens = ones(1, False)
    if config.moe is None:
        return _Inputs(tokens, {}, None)
    logits = torch.randn(rows, config.moe.n_experts, generator=torch.Generator().manual_seed(0))
    routes = kernels.route(logits.to(kernels.device), None, Router(config.moe.top_k))
    return _Inputs(tokens, ones(config.moe.top_k, True), routes)


def _phase(kernels: Kernels, linears: list[_Linear], layers: list[list[list[Any]]], inputs: _Inputs) -> torch.Tensor:
    """Every layer's linears; sums over this rank alone."""
    y = torch.empty(0)
    for layer in layers:
        for linear, weights in zip(linears, layer, strict=True):
            if linear.experts:
                assert inputs.routes is not None
                y = kernels.expert_linear(inputs.grouped[linear.k], weights, inputs.routes, linear.n, linear.out_dtype)
                if linear.sums:
                    y = kernels.all_reduce_(y, _ALONE)
            elif linear.sums:
                y = kernels.settle(kernels.partial_linear(inputs.tokens[linear.k], weights[0], None, _ALONE))
            else:
                y = kernels.linear(inputs.tokens[linear.k], weights[0], None, linear.out_dtype)
    return y


_ALONE = SingleGroup()


def phase_params(plan: Plan, phase: str) -> list[Param]:
    """The linears of one phase: of the first layer that has experts, or of the first; or the head.

    Of experts the first one's, whose like the others are.
    """
    if phase == "vocab":
        return [p for p in plan.params if p.name == "head"]
    cuts = {"attention": {"q_heads"}, "ffn": {"ffn", "expert_ffn", "shared_ffn"}}[phase]
    config = plan.config
    layer = next((i for i in range(config.n_layers) if config.has_experts(i)), 0)
    return [
        p
        for p in plan.params
        if p.kind == "linear"
        and p.name.startswith(f"layers.{layer}.")
        and cuts & {p.columns, *(source.rows for source in p.sources)}
        and p.expert in (None, 0)
    ]


def _shards(plan: Plan) -> list[Shard]:
    """Those of SHARES that the model can be cut into: a very small one only whole."""
    found = []
    for share in SHARES:
        with suppress(ValueError):
            found.append(one_shard(plan, share))
    return found


def one_shard(plan: Plan, share: Fraction) -> Shard:
    """The first rank's shard when it has `share` of everything. Raises ValueError when one of two would be empty."""
    return split_model(plan.config, PhaseShares.of([share, 1 - share]), plan.ffn_multiple)[0]


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


def phase_bytes(plan: Plan) -> dict[str, int]:
    """Bytes of each phase's weights in the whole model, as if all its layers were like the one that is timed."""
    whole = one_shard(plan, Fraction(1))

    def layer_bytes(phase: str) -> int:
        return sum(li.form.nbytes(li.n, li.k) * (li.experts or 1) for li in _linears(plan, whole, phase))

    return {phase: layer_bytes(phase) * (1 if phase == "vocab" else plan.config.n_layers) for phase in PHASES}
