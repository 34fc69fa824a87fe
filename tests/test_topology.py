"""Which cores a rank takes."""

from __future__ import annotations

import pytest

from distinf.topology import allowed_cores, parse_cpu_list, place


@pytest.mark.parametrize(
    "text, cpus", [("0", {0}), ("0-2,8", {0, 1, 2, 8}), ("", set()), ("1,3\n", {1, 3}), ("4-4", {4})]
)
def test_cpu_lists(text: str, cpus: set[int]) -> None:
    assert parse_cpu_list(text) == cpus


def test_a_lone_rank_takes_all_its_cores() -> None:
    assert place([[0, 1, 2, 3]], 0, threads=0) == ((0, 1, 2, 3), False)
    assert place([[0, 1, 2, 3]], 0, threads=2) == ((0, 1), False)


def test_ranks_that_a_launcher_bound_keep_their_cores() -> None:
    assert place([[0, 1], [2, 3]], 1, threads=0) == ((2, 3), False)


def test_ranks_left_on_the_same_cores_divide_them() -> None:
    cores = [[0, 2, 4, 6, 8]] * 2
    assert place(cores, 0, threads=0) == ((0, 2), False)
    assert place(cores, 1, threads=0) == ((4, 6, 8), False)


def test_more_ranks_than_cores_share_and_know_it() -> None:
    placements = [place([[0, 1]] * 4, i, threads=0) for i in range(4)]
    assert placements == [((0,), True), ((1,), True), ((0,), True), ((1,), True)]


def test_more_threads_than_cores_are_not_pinned() -> None:
    assert place([[0, 1]], 0, threads=4) == ((-1,) * 4, True)


def test_this_process_has_cores() -> None:
    assert allowed_cores()
