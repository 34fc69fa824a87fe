"""Collectives, on every rank of the job."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from distinf import comm
from distinf.comm import Group, InputError, agreed, segment
from distinf.comm.shm import ShmCclGroup, ShmGroup
from distinf.kernels import Placement, extension, load
from distinf.kernels.formats import FORMATS
from distinf.kernels.native import PartialSum
from tests.conftest import need

needs_extension = pytest.mark.skipif(not extension.AVAILABLE, reason="the native extension is not built")


class PairsAreNodes:
    """Ranks 0 and 1 on one node, the next two on another: two levels, on whatever machine this is."""

    _comm: Any
    rank: int

    def _node(self) -> Any:
        return self._comm.Split(self.rank // 2, self.rank)


class Pairs(PairsAreNodes, ShmGroup):
    pass


class PairsOverCcl(PairsAreNodes, ShmCclGroup):
    pass


PAIRS: dict[str, type[ShmGroup]] = {"pairs": Pairs, "pairs+ccl": PairsOverCcl}


@pytest.fixture(scope="module")
def group() -> Group:
    return comm.init()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            (kind, wire), marks=[] if kind == "mpi" and wire == "fp32" else needs_extension, id=f"{kind}-{wire}"
        )
        for kind in ("mpi", "shm", "pairs", "ccl", "pairs+ccl", "torch-ccl")
        for wire in ("fp32", "bf16")
    ],
)
def wired(request: pytest.FixtureRequest) -> tuple[Group, str]:
    """A group that sums in one of the ways, and what its partial sums are rounded to."""
    kind, wire = request.param
    need(kind.removeprefix("pairs+"))
    return (PAIRS[kind](wire == "bf16") if kind in PAIRS else comm.init(kind, wire)), wire


def parts_of(group: Group, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    """What each rank has to add."""
    return [torch.randn(shape, generator=torch.Generator().manual_seed(97 * seed + r)) for r in range(group.world_size)]


def assert_sum(group: Group, x: torch.Tensor, parts: list[torch.Tensor], wire: str) -> None:
    """Each rounding, of a part or of a sum of some, errs by half a unit of the parts' magnitudes together; bf16
    parts are rounded when they leave a rank, when a node's are added, and when the nodes' are.
    """
    magnitude = torch.stack(parts).double().abs().sum(0)
    unit = 3 * 2.0**-8 if wire == "bf16" else len(parts) * 2.0**-24
    error = (x.double() - torch.stack(parts).double().sum(0)).abs()
    assert (error <= 1.01 * unit * magnitude).all(), (error.max(), group.name)
    assert all(torch.equal(other, x) for other in group.all_gather(x))


# The last ones are longer than a slot, and no multiple of one.
@pytest.mark.parametrize("shape", [(1,), (3, 5), (4, 2048), (40, 2048), (300, 2047)])
def test_all_reduce_sums_and_every_rank_has_the_same_bits(wired: tuple[Group, str], shape: tuple[int, ...]) -> None:
    group, wire = wired
    parts = parts_of(group, *shape)
    x = parts[group.rank].clone()
    group.all_reduce_(x)
    assert_sum(group, x, parts, wire)


@needs_extension
@pytest.mark.parametrize("rows", [1, 2, 5, 700])
@pytest.mark.parametrize("threads", [1, 3])
def test_partial_linear_is_summed_by_settle_and_by_the_norms(wired: tuple[Group, str], rows: int, threads: int) -> None:
    """Eagerly and replayed, with changed input: the same bits. One of the norms gets another part to add."""
    group, wire = wired
    k, n = 32, 416
    kernels = load("native", "auto", "bf16", Placement((-1,) * threads, oversubscribed=True))
    inputs = [x.bfloat16() for x in parts_of(group, rows, k, seed=1)]
    weights = [w.bfloat16() for w in parts_of(group, n, k, seed=2)]
    weight, x = kernels.pack(weights[group.rank], FORMATS["bf16"]), inputs[group.rank].clone()
    ones, plus, plus_sum = torch.ones(n), torch.full((rows, n), group.rank + 1.0), sum(range(group.world_size + 1))
    streams, norms = (torch.zeros(rows, n), torch.zeros(rows, n)), []

    def forward() -> torch.Tensor:
        norms.append(kernels.rms_norm(streams[0], ones, 1e-5, kernels.partial_linear(x, weight, None, group)))
        more = kernels.partial_linear(x, weight, None, group, plus)
        norms.append(kernels.layer_norm(streams[1], ones, ones, 1e-5, more))
        return kernels.settle(kernels.partial_linear(x, weight, None, group))

    def replayed() -> list[torch.Tensor]:
        for stream in streams:
            stream.zero_()
        return [y.clone() for y in (step.replay(), *streams, *norms)]

    step = kernels.record(forward)
    eager = [y.clone() for y in (step.result, *streams, *norms)]
    x.zero_()
    settled, *sums = replayed()[:3]
    assert not settled.any() and not sums[0].any() and (sums[1] == plus_sum).all()
    x.copy_(inputs[group.rank])
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(replayed(), eager, strict=True))
    y, summed, with_plus, *normed = eager
    assert torch.equal(summed, y)
    assert torch.equal(normed[0], kernels.rms_norm(summed, ones, 1e-5))
    assert torch.equal(normed[1], kernels.layer_norm(with_plus, ones, ones, 1e-5))
    # fp32 products of bf16 numbers: half a unit for each of k additions, far below a wire in bf16.
    exact = sum(x.double() @ w.double().T for x, w in zip(inputs, weights, strict=True))
    magnitude = sum(x.double().abs() @ w.double().abs().T for x, w in zip(inputs, weights, strict=True)) + plus_sum
    unit = (k + 3 + group.world_size) * 2.0**-24 + (3 * 2.0**-8 if wire == "bf16" else 0)
    assert ((y.double() - exact).abs() <= 1.01 * unit * magnitude).all()
    assert ((with_plus.double() - exact - plus_sum).abs() <= 1.01 * unit * magnitude).all()
    assert all(torch.equal(other, y) for other in group.all_gather(y))


@needs_extension
@pytest.mark.parametrize("wire", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["shm", "pairs"])
def test_with_room_a_long_sum_is_not_copied(kind: str, wire: str) -> None:
    """The same bits as in pieces. 2 MiB for each thread: results of that length are stored past the caches."""
    group = PAIRS.get(kind, ShmGroup)(wire == "bf16")
    rows, k, n = 2510, 32, 418
    kernels = load("native", "auto", "bf16", Placement((-1, -1), oversubscribed=True))
    weight = kernels.pack(parts_of(group, n, k, seed=1)[group.rank].bfloat16(), FORMATS["bf16"])
    x = parts_of(group, rows, k, seed=2)[group.rank].bfloat16()
    short = kernels.record(lambda: kernels.settle(kernels.partial_linear(x[:3], weight, None, group)))
    few, before = short.result.clone(), kernels.partial_linear(x, weight, None, group)
    assert isinstance(before, torch.Tensor)
    least, count = extension.AllReduce.LEAST_CAPACITY, group.native.count
    for numbers, capacity, anew in [(1, least, True), (rows * n, 1049600, True), (rows * n, 1049600, False)]:
        memory = group._memory
        assert group.make_room(numbers) == "" and group.native.capacity == capacity  # whole pages
        assert (group._memory is not memory) == anew  # the first time because the rank has its cores now
    assert group.native.count == count
    whole = kernels.partial_linear(x, weight, None, group)
    assert isinstance(whole, PartialSum)
    sums = kernels.settle(whole)
    assert all(torch.equal(other, sums) for other in group.all_gather(sums))
    # The last piece is short: every rank reads all of it, with one rounding to bf16 less.
    same = rows * n if wire == "fp32" else rows * n // least * least
    assert torch.equal(sums.flatten()[:same], before.flatten()[:same])
    assert torch.equal(short.replay(), few)
    parts = parts_of(group, rows * n)
    unaligned = parts[group.rank][3:-5]
    group.all_reduce_(unaligned)
    assert_sum(group, unaligned, [part[3:-5] for part in parts_of(group, rows * n)], wire)


@needs_extension
def test_without_room_long_sums_go_in_pieces(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    last, least = group.rank == group.world_size - 1, extension.AllReduce.LEAST_CAPACITY
    take = os.posix_fallocate

    def nearly_full(fd: int, begin: int, size: int) -> None:
        if last and size > extension.AllReduce.part_bytes(least):
            raise OSError(errno.ENOSPC, "No space left on device")
        take(fd, begin, size)

    monkeypatch.setattr(os, "posix_fallocate", nearly_full)
    other = comm.init("shm")
    first = other._memory
    problem = other.make_room(3 * least)
    assert problem.endswith(f"(rank {group.world_size - 1})") and len(set(group.all_gather_object(problem))) == 1
    assert f"{extension.AllReduce.memory_bytes(group.world_size, 3 * least) / 1e6:.1f} MB are needed" in problem
    assert other.native.capacity == least and other._memory is not first
    parts = parts_of(group, 3 * least)
    other.all_reduce_(parts[group.rank])
    assert_sum(other, parts[group.rank], parts_of(group, 3 * least), "fp32")


@needs_extension
def test_a_rank_without_a_part_adds_nothing(wired: tuple[Group, str]) -> None:
    group, _ = wired
    kernels = load("native", "auto", "bf16", Placement((-1,), oversubscribed=True))
    mine = group.rank == group.world_size - 1
    x, w = torch.ones(2, 8 if mine else 0).bfloat16(), torch.ones(32, 8 if mine else 0).bfloat16()
    for height, plus in ((0, None), (3, None), (3, torch.ones(2, 32))):
        bias = torch.full((32,), float(height)) if height and group.rank == 0 else None
        y = kernels.settle(kernels.partial_linear(x, kernels.pack(w, FORMATS["bf16"]), bias, group, plus))
        assert torch.equal(y, torch.full((2, 32), 8.0 + height + (group.world_size if plus is not None else 0)))


@pytest.mark.parametrize("name", ["mpi", "shm", "ccl"])
def test_several_groups_at_once(name: str) -> None:
    need(name)
    first, second = comm.init(name), comm.init(name)
    for each in (first, second, first):
        x = torch.ones(5)
        each.all_reduce_(x)
        assert torch.equal(x, torch.full((5,), float(each.world_size)))


@needs_extension
@pytest.mark.parametrize("what", ["no directory", "no room", "another process"])
def test_without_shared_memory_mpi_is_used_and_says_what_was_needed(
    group: Group, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    last = group.rank == group.world_size - 1

    def full(fd: int, begin: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if what == "no directory":
        monkeypatch.setattr(segment, "DIRECTORY", "/nowhere")
    elif what == "no room" and last:
        monkeypatch.setattr(os, "posix_fallocate", full)
    elif what == "another process":
        if group.world_size == 1:
            pytest.skip("one rank opens nobody's memory")
        monkeypatch.setattr(segment, "_identity", lambda fd: (0, group.rank))
    other = comm.init("shm")
    assert other.name == "mpi"
    x = torch.ones(5)
    other.all_reduce_(x)
    assert torch.equal(x, torch.full((5,), float(group.world_size)))
    if group.rank == 0:
        (message,) = caplog.messages
        needed = extension.AllReduce.memory_bytes(group.world_size, extension.AllReduce.LEAST_CAPACITY) / 1e6
        expected = {
            "no directory": "/nowhere",
            "no room": f"{needed:.1f} MB are needed",
            "another process": "do not see each other",
        }[what]
        assert "--comm mpi is used" in message and expected in message


@needs_extension
def test_shared_memory_has_no_name_that_could_stay(group: Group) -> None:
    kept = comm.init("shm")
    start = f"{kept._memory.data_ptr():x}-"
    (line,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.startswith(start)]
    assert kept.name == "shm" and segment.DIRECTORY in line and line.endswith("(deleted)")


def test_all_gather_is_in_rank_order(group: Group) -> None:
    x = torch.full((2, 3), float(group.rank), dtype=torch.float64)
    assert torch.equal(group.all_gather(x)[:, 0, 0], torch.arange(group.world_size, dtype=torch.float64))
    assert group.all_gather_object({"rank": group.rank}) == [{"rank": r} for r in range(group.world_size)]


def test_broadcast_is_rank_0s(group: Group) -> None:
    assert group.broadcast_object(("from", group.rank)) == ("from", 0)


def test_node_mates_are_all_here(group: Group) -> None:
    assert group.node_mates() == list(range(group.world_size))


def test_agreed_gives_each_rank_its_own_result(group: Group) -> None:
    assert agreed(group, lambda: group.rank * 2) == group.rank * 2


def test_agreed_raises_on_all_what_one_raised(group: Group) -> None:
    last = group.world_size - 1

    def fail_on_last() -> None:
        if group.rank == last:
            raise ValueError("bad input")

    suffix = "" if group.world_size == 1 else f" (rank {last})"
    with pytest.raises(InputError) as error:
        agreed(group, fail_on_last)
    assert str(error.value) == "bad input" + suffix
