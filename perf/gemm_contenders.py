"""The processes that perf/gemm.py times: each holds weights in the order of a forward pass and multiplies by them."""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from distinf.cli import load_llm
from distinf.comm import InputError
from distinf.comm.single import SingleGroup
from distinf.stats import measure_read_gb_s

MANY_ROWS = 128
TURN_S = 0.2  # a turn repeats short passes for this long


class Contender:
    """A process that holds an object of one of the classes below and answers for it."""

    def __init__(self, name: str, kind: Callable[[Any], object], argument: object, variables: dict[str, str]) -> None:
        """Start it with these environment variables and wait until it is ready."""
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        with environment(variables):
            self._process = context.Process(target=serve, args=(theirs, kind, argument), daemon=True)
            self._process.start()
        theirs.close()
        self._answer()

    def close(self) -> None:
        """Let the process end, and wait for it."""
        self._pipe.close()
        self._process.join()

    def ask(self, method: str, *arguments: object) -> Any:
        """Call a method there."""
        self._pipe.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            mistake, answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process that times {self.name} has ended") from None
        if mistake:
            raise InputError(answer)
        return answer


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """os.environ with these set."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def serve(pipe: Connection, kind: Callable[[Any], object], argument: object) -> None:
    """A contender's process: make the object, then answer until the pipe is closed."""
    try:
        held = kind(argument)
    except ValueError as error:
        pipe.send((True, str(error)))
        return
    pipe.send((False, None))
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send((False, getattr(held, method)(*arguments)))


@dataclass(frozen=True)
class Gemm:
    """One weight and how to multiply by it."""

    layer: str  # qkv, o, ...
    n: int
    k: int
    weight_bytes: int
    run: Callable[[torch.Tensor], object]


class Linears:
    """Weights in the order of a forward pass."""

    def __init__(self, gemms: list[Gemm], act_dtype: torch.dtype) -> None:
        self.gemms = gemms
        self._act_dtype = act_dtype
        self._busy: set[int] = set()

    def shapes(self) -> list[tuple[str, int, int]]:
        """Layer, n and k of every weight, in order."""
        return [(g.layer, g.n, g.k) for g in self.gemms]

    def layers(self) -> list[dict[str, Any]]:
        """What one weight of each layer is."""
        return [
            {"layer": g.layer, "n": g.n, "k": g.k, "weight_bytes": g.weight_bytes} for g in first_of_each(self.gemms, 1)
        ]

    def inputs(self, rows: int) -> dict[int, torch.Tensor]:
        """An input for each k."""
        return {k: torch.randn(rows, k).to(self._act_dtype) for k in {g.k for g in self.gemms}}

    def turn(self, rows: int) -> dict[str, list[float]]:
        """Passes over the weights for TURN_S, at least one: microseconds of each call by layer."""
        gemms = self.gemms if rows < MANY_ROWS else first_of_each(self.gemms, 2)
        x = self.inputs(rows)
        times: dict[str, list[float]] = defaultdict(list)
        start, before = time.perf_counter(), thread_seconds()
        while not times or time.perf_counter() - start < TURN_S:
            for gemm in gemms:
                began = time.perf_counter()
                gemm.run(x[gemm.k])
                times[gemm.layer].append(1e6 * (time.perf_counter() - began))
        quarter = (time.perf_counter() - start) / 4
        ran = {thread: s - before.get(thread, (0.0, 0))[0] for thread, (s, _) in thread_seconds().items()}
        self._busy |= {core for thread, (_, core) in thread_seconds().items() if ran.get(thread, 0.0) > quarter}
        return dict(times)

    def busy_cores(self) -> list[int]:
        """Cores where a thread ran for more than a quarter of a turn."""
        return sorted(self._busy)


def first_of_each(gemms: list[Gemm], count: int) -> list[Gemm]:
    """The first `count` weights of each layer, in order."""
    seen: Counter[str] = Counter()
    chosen = []
    for gemm in gemms:
        seen[gemm.layer] += 1
        if seen[gemm.layer] <= count:
            chosen.append(gemm)
    return chosen


def thread_seconds() -> dict[str, tuple[float, int]]:
    """CPU time of every thread of this process so far, and the core where it last ran."""
    found = {}
    for path in Path("/proc/self/task").glob("*/stat"):
        fields = path.read_text().rpartition(")")[2].split()  # from field 3 of proc(5), the state
        ticks, core = int(fields[11]) + int(fields[12]), int(fields[36])
        found[path.parent.name] = (ticks / os.sysconf("SC_CLK_TCK"), core)
    return found


class Ours(Linears):
    """Rank 0's weights of the model that the flags describe."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._llm = load_llm(args, OneOfMany(args.tp), kv_tokens=0)  # kept: it owns what the kernels read
        self._kernels = kernels = self._llm.loaded.kernels

        def gemm(name: str, weight: Any) -> Gemm:
            layer, act = name.rpartition(".")[2], "silu" if weight.gated else None
            return Gemm(layer, weight.n, weight.k, weight.nbytes, lambda x: kernels.linear(x, weight, act=act))

        weights = {name: linear.weight for name, linear in self._llm.loaded.weights.linears.items()}
        weights["head"] = weights.pop("head")  # to the end
        super().__init__([gemm(*item) for item in weights.items()], kernels.act_dtype)

    def isa(self) -> str:
        """What the kernels run."""
        return self._kernels.isa

    def ceilings(self) -> tuple[float, float, float]:
        """Read bandwidth, GB/s, and the bf16 and int8 peaks in 1e12 operations a second."""
        peak = self._kernels.measure_peak_tops
        return measure_read_gb_s(self._kernels, SingleGroup()), peak(int8=False), peak(int8=True)


class OneOfMany(SingleGroup):
    """Rank 0 of `world_size` ranks that all say what it says: for loading its shard, not for computing with it."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def all_gather_object(self, x: Any) -> list[Any]:
        return [x] * self.world_size


class Torch(Linears):
    """The same shapes as plain bf16 weights, for torch.nn.functional.linear."""

    def __init__(self, argument: tuple[list[tuple[str, int, int]], int]) -> None:
        shapes, threads = argument
        torch.set_num_threads(threads)
        super().__init__([self._gemm(*shape) for shape in shapes], torch.bfloat16)

    @staticmethod
    def _gemm(layer: str, n: int, k: int) -> Gemm:
        weight = torch.empty(n, k, dtype=torch.bfloat16).normal_(std=k**-0.5)
        return Gemm(layer, n, k, weight.nbytes, lambda x: torch.nn.functional.linear(x, weight))

    def implementations(self, rows: int) -> dict[str, str]:
        """oneDNN's name of what multiplied each layer, or "no oneDNN"."""
        x = self.inputs(rows)
        return {g.layer: onednn_implementation(g.run, x[g.k]) for g in first_of_each(self.gemms, 1)}


def onednn_implementation(run: Callable[[torch.Tensor], object], x: torch.Tensor) -> str:
    """What oneDNN says that it ran; it says so on the C library's stdout alone."""
    stdout, libc = os.dup(1), ctypes.CDLL(None)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            run(x)
        libc.fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        file.seek(0)
        calls = [line.split(",") for line in file.read().decode().splitlines() if ",exec,cpu," in line]
    # onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx512_core_amx,...; a reorder is none
    return next((c[c.index("cpu") + 2] for c in calls if c[c.index("cpu") + 1] != "reorder"), "no oneDNN")
