"""Ranks of other speeds than this machine has: real results, and times that follow a rate model.

The emulated world is this one slowed down. Its fastest rank multiplies at `read_gb_s` and `tflops`, HEADROOM of
what the ranks here reach when all of them multiply at once, so that every rank can keep its time; a rank of a
lower speed gets its part of that. All times are real: a rank that would be done early waits, and nothing is scaled
afterwards. Two ranks of one machine with `speed=2` and a plain cpu are a pair throttled 2:1.

A GEMM of an [n, k] weight on T rows takes max(weight bytes / read_gb_s, 2 T n k / tflops): the cost law of a
roofline (Williams et al., CACM 52(4), 2009); of T k experts chosen as many are read, or all. Time is kept by phases:
from a phase's first GEMM to the sum over ranks that ends it, or to the end of the step. An fp32 result (the logits of
head or router, a part of a sum) waits until the phase so far has had its time, and so does a sum before it is formed.
An emulated device adds to each phase in which it has work `latency_us`, and what crosses its link: the phase's input
in act_dtype, and the fp32 that leaves it. Attention, norms and reductions take the time that they really take; in a
phase they hide behind the GEMMs' time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from distinf.device import Device
from distinf.kernels.formats import Format
from distinf.kernels.ranks import Ranks
from distinf.kernels.routing import Routes

# Of what the ranks reach here: room for attention and norms, and for a virtual machine whose host moves its CPUs
# together after they were timed (memory is then 1.8 times slower, perf/LOG.md).
HEADROOM = 0.4
# Sleeping is exact to some 60 us on Linux (its timer slack is 50): the rest is spun away.
_SLEEP_SLACK_S = 300e-6


@dataclass(frozen=True)
class Rates:
    """How fast one rank multiplies."""

    read_gb_s: float
    tflops: float
    latency_s: float = 0.0
    link_gb_s: float = 0.0

    def gemm_s(self, rows: int, weight: Any) -> float:
        """Time of x [rows, k] . weight^T."""
        bytes_s = weight.nbytes / (1e9 * self.read_gb_s)
        return float(max(bytes_s, 2 * rows * weight.n * weight.k / (1e12 * self.tflops)))

    def experts_s(self, rows: int, weights: Sequence[Any]) -> float:
        """Time of grouped rows, each times its expert's weight: as many experts as there are rows, or all."""
        if not weights:
            return 0.0
        read_s = min(rows, len(weights)) * weights[0].nbytes / (1e9 * self.read_gb_s)
        return float(max(read_s, 2 * rows * weights[0].n * weights[0].k / (1e12 * self.tflops)))

    def crossing_s(self, nbytes: int) -> float:
        """Time that a phase's input and result take to the device and back."""
        return self.latency_s + (nbytes / (1e9 * self.link_gb_s) if self.link_gb_s else 0.0)


def world_rates(devices: Sequence[Device]) -> list[Rates]:
    """Each rank's rates in a world of which some rank is emulated, whose rates are known by now."""
    fastest = max(device.speed for device in devices)
    world = next(device for device in devices if device.kind == "emulated")
    return [
        Rates(
            world.read_gb_s * device.speed / fastest,
            world.tflops * device.speed / fastest,
            1e-6 * device.latency_us,
            device.link_gb_s,
        )
        for device in devices
    ]


def measure_rates(kernels: Any, form: Format) -> tuple[float, float]:
    """GB/s and TFLOP/s of this rank's GEMMs of one row and of 256, on weights beyond the caches.

    For the numbers of a world all ranks measure at once and the slowest counts.
    """
    n = k = 4096
    form = replace(form, scales=torch.bfloat16)  # kernels quantise with these only
    weights = [kernels.pack(torch.full((n, k), 2**-7, dtype=torch.bfloat16), form) for _ in range(3)]
    one, many = (torch.ones(rows, k, dtype=kernels.act_dtype) for rows in (1, 256))
    read_s = min(_seconds(lambda: [kernels.linear(one, w) for w in weights]) for _ in range(5))
    gemm_s = min(_seconds(lambda: kernels.linear(many, weights[0])) for _ in range(3))
    return sum(w.nbytes for w in weights) / read_s / 1e9, 2 * len(many) * n * k / gemm_s / 1e12


def emulated(kernels: Any, rates: Rates) -> Any:
    """The same Kernels at `rates`."""
    return _Paced(kernels, rates)


class _Paced:
    """See distinf.kernels.Kernels: what is not here goes straight to the kernels inside."""

    def __init__(self, inner: Any, rates: Rates) -> None:
        self._inner = inner
        self._rates = rates
        self._clock = _Clock()
        self._phase_s = 0.0  # GEMMs of this phase so far
        self._begun = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def record(self, forward: Callable[[], torch.Tensor]) -> Any:
        def step() -> torch.Tensor:  # of kernels that replay by calling it, too
            self._next_phase()
            return forward()

        return self._inner.record(step)

    def embedding(self, ids: torch.Tensor, table: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        self._next_phase()
        return cast(torch.Tensor, self._inner.embedding(ids, table, scale))

    def linear(
        self,
        x: torch.Tensor,
        weight: Any,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        act: str | None = None,
    ) -> torch.Tensor:
        self._count(x, self._rates.gemm_s(len(x), weight))
        y = self._inner.linear(x, weight, bias, out_dtype, act)
        if out_dtype == torch.float32:
            self._wait(y, x.nbytes + y.nbytes)
        return cast(torch.Tensor, y)

    def head_linear(self, x: torch.Tensor, weight: Any, tail: torch.Tensor | None = None) -> torch.Tensor:
        self._count(x, self._rates.gemm_s(len(x), weight))
        return cast(torch.Tensor, self._inner.head_linear(x, weight, tail))

    def expert_linear(
        self,
        x: torch.Tensor,
        weights: Sequence[Any],
        routes: Routes,
        n: int,
        out_dtype: torch.dtype | None = None,
        act: str | None = None,
    ) -> torch.Tensor:
        rows = len(x) * len(routes.experts) // (len(routes.starts) - 1)  # of those experts, if all are chosen alike
        self._count(x, self._rates.experts_s(rows, weights))
        return cast(torch.Tensor, self._inner.expert_linear(x, weights, routes, n, out_dtype, act))

    def partial_linear(
        self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None, ranks: Ranks, plus: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The sum is formed here, not by who reads it: this rank's part must not be seen before its time."""
        self._count(x, self._rates.gemm_s(len(x), weight))
        y = self._inner.linear(x, weight, bias, torch.float32)
        if plus is not None:
            self._inner.add_(y, plus)
        return self.all_reduce_(y, ranks)

    def all_reduce_(self, y: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        self._wait(y, (self._inner.act_dtype.itemsize + torch.float32.itemsize) * y.numel())
        self._next_phase()
        return cast(torch.Tensor, self._inner.all_reduce_(y, ranks))

    def _next_phase(self) -> None:
        self._phase_s, self._begun = 0.0, False

    def _count(self, x: torch.Tensor, gemm_s: float) -> None:
        if not self._begun:
            self._inner.host_call(self._clock.start, x)
            self._begun = True
        self._phase_s += gemm_s

    def _wait(self, y: torch.Tensor, nbytes: int) -> None:
        """In the step: until the phase so far has taken its time, with `nbytes` over the link."""
        phase_s = self._phase_s + self._rates.crossing_s(nbytes) if self._phase_s else 0.0
        self._inner.host_call(lambda _: self._clock.wait(phase_s), y)


class _Clock:
    """Time since a phase began."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()

    def start(self, _: torch.Tensor) -> None:
        self._start_s = time.perf_counter()

    def wait(self, phase_s: float) -> None:
        """Returns when the phase has lasted `phase_s`; at once when it has."""
        while (left_s := self._start_s + phase_s - time.perf_counter()) > 0:
            if left_s > 2 * _SLEEP_SLACK_S:
                time.sleep(left_s - _SLEEP_SLACK_S)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
