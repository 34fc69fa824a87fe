"""Collectives, on every rank of the job."""

from __future__ import annotations

import pytest
import torch

from distinf import comm
from distinf.comm import Group, InputError, agreed
from tests.conftest import need


@pytest.fixture(scope="module", params=["auto", "ccl", "torch-ccl"])
def group(request: pytest.FixtureRequest) -> Group:
    """The group of each backend in turn."""
    need(request.param)
    return comm.init(request.param)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (4, 2048), (300, 576)])
def test_all_reduce_sums_and_every_rank_has_the_same_bits(group: Group, shape: tuple[int, ...]) -> None:
    parts = [torch.randn(shape, generator=torch.Generator().manual_seed(r)) for r in range(group.world_size)]
    x = parts[group.rank].clone()
    group.all_reduce_(x)
    exact = torch.stack(parts).double().sum(0)
    torch.testing.assert_close(x.double(), exact, rtol=0, atol=group.world_size * 2**-22)
    everyone = group.all_gather(x)
    assert all(torch.equal(other, x) for other in everyone)


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
