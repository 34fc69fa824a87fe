"""What a machine is, on faked /sys trees, and which cores its ranks take."""

from __future__ import annotations

from pathlib import Path

import pytest

from distinf.topology import Machine, Offer, format_cpu_list, parse_cpu_list, place
from tests.fake_machines import ALTERNATING, HBM, SNC4, TWO_SOCKETS, FakeMachine, FakeNode

ODD_CORES = [1, 3, 5, 7, 9]


@pytest.mark.parametrize(
    "text, cpus", [("0", {0}), ("0-2,8", {0, 1, 2, 8}), ("", set()), ("1,3\n", {1, 3}), ("4-4", {4})]
)
def test_cpu_lists(text: str, cpus: set[int]) -> None:
    assert parse_cpu_list(text) == cpus
    assert parse_cpu_list(format_cpu_list(cpus)) == cpus


def test_cpu_lists_are_written_as_the_kernel_does() -> None:
    assert format_cpu_list([8, 0, 2, 1]) == "0-2,8"


def test_a_machine_is_read(tmp_path: Path) -> None:
    machine = TWO_SOCKETS.write(tmp_path)
    assert machine.one_cpu_of_each_core(set(range(16))) == list(range(8))
    assert machine.one_cpu_of_each_core({9, 10, 2}) == [2, 9]  # a core whose first thread was taken away
    assert [machine.socket[cpu] for cpu in (3, 4, 11, 12)] == [0, 1, 0, 1]
    assert machine.nodes_of([3, 15]) == [0, 1]
    assert machine.nodes[1].memory_bytes == 128 << 30


def test_a_machine_that_shows_nothing_is_one_node(tmp_path: Path) -> None:
    machine = Machine.read(tmp_path)
    assert machine.nodes == {} and machine.nodes_of([0]) == [0]
    assert machine.memory_near([0], {0}) == [] and machine.one_cpu_of_each_core({0, 5}) == [0, 5]


def test_this_machine_has_cores_and_memory() -> None:
    machine = Machine.read()
    assert machine.core and all(machine.core[core] == core for core in machine.core.values())
    assert sum(node.memory_bytes for node in machine.nodes.values()) > 1 << 30 or not machine.nodes


@pytest.mark.parametrize(
    "fake, cpus, allowed, near, memory_only",
    [
        (TWO_SOCKETS, [0, 1], {0, 1}, [0], []),
        (TWO_SOCKETS, [3, 4], {0, 1}, [0, 1], []),
        (TWO_SOCKETS, [0, 1], {1}, [1], []),  # the cpuset has no memory here
        (SNC4, [6, 7], set(range(8)), [3], []),
        (SNC4, [6, 7], {0, 4, 5}, [0], []),  # the nearest that is left: on the same socket
        (HBM, [0, 1], {0, 1}, [0], [1]),
        (HBM, [0, 1], {0}, [0], []),
    ],
)
def test_nearest_memory(
    tmp_path: Path, fake: FakeMachine, cpus: list[int], allowed: set[int], near: list[int], memory_only: list[int]
) -> None:
    machine = fake.write(tmp_path)
    assert machine.memory_near(cpus, allowed) == near
    assert machine.memory_near(cpus, allowed, memory_only=True) == memory_only


def test_a_socket_without_memory_uses_its_neighbours(tmp_path: Path) -> None:
    nodes = [FakeNode(range(2), [10, 21, 12], gb=0), FakeNode([2], [21, 10, 30]), FakeNode([3], [12, 30, 10])]
    assert FakeMachine(nodes).write(tmp_path).memory_near([0, 1], {0, 1, 2}) == [2]


@pytest.mark.parametrize("read_mb_s, near", [(800_000, [2]), (40_000, []), (0, [2])])
def test_slow_memory_is_not_taken_for_hbm(tmp_path: Path, read_mb_s: int, near: list[int]) -> None:
    """CXL memory is a node without cores too; where the firmware tells bandwidths, it is known."""
    nodes = [
        FakeNode(range(2), [10, 21, 14], read_mb_s=250_000), FakeNode(range(2, 4), [21, 10, 24], 1, 128, 250_000),
        FakeNode([], [14, 24, 10], gb=64, read_mb_s=read_mb_s),
    ]  # fmt: skip
    assert FakeMachine(nodes).write(tmp_path).memory_near([0], {0, 1, 2}, memory_only=True) == near


def placed(machine: Machine, n: int, cores: list[int]) -> list[tuple[int, ...]]:
    """Cores of n ranks that were all left with the same ones."""
    offers = [Offer(rank, cores, len(cores)) for rank in range(n)]
    placements = [place(offers, i, 0, machine.levels) for i in range(n)]
    assert not any(crowded for _, crowded in placements)
    return [cpus for cpus, _ in placements]


MACHINES = {"2 sockets": TWO_SOCKETS, "SNC4": SNC4, "alternating": ALTERNATING}


@pytest.mark.parametrize(
    "fake, n",
    [*((fake, n) for fake in MACHINES.values() for n in (1, 2, 3, 4, 5, 8)), (HBM, 2), (HBM, 4)],
    ids=[*(f"{name}, {n} ranks" for name in MACHINES for n in (1, 2, 3, 4, 5, 8)), "HBM, 2 ranks", "HBM, 4 ranks"],
)
def test_every_core_has_one_rank_and_ranks_stay_in_their_node(tmp_path: Path, fake: FakeMachine, n: int) -> None:
    machine = fake.write(tmp_path)
    cores = machine.one_cpu_of_each_core(set(machine.core))
    ranks = placed(machine, n, cores)
    assert sorted(core for rank in ranks for core in rank) == cores
    spans = [len(machine.nodes_of(rank)) for rank in ranks]
    with_cores = sum(1 for node in machine.nodes.values() if node.cpus)
    if n >= with_cores:
        assert spans == [1] * n
    else:  # whole nodes, of one socket where there are ranks enough
        assert sum(spans) == with_cores
        if n >= len(set(machine.socket.values())):
            assert all(len({machine.socket[core] for core in rank}) == 1 for rank in ranks)


@pytest.mark.parametrize(
    "fake, n, cores, expected",
    [
        (TWO_SOCKETS, 2, list(range(8)), [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (TWO_SOCKETS, 3, list(range(8)), [(0, 1), (2, 3), (4, 5, 6, 7)]),
        (TWO_SOCKETS, 2, [0, 1, 2, 3, 4], [(0, 1, 2, 3), (4,)]),
        (SNC4, 2, list(range(16)), [tuple(range(8)), tuple(range(8, 16))]),
        (SNC4, 4, list(range(16)), [tuple(range(i, i + 4)) for i in (0, 4, 8, 12)]),
        (SNC4, 8, list(range(16)), [(i, i + 1) for i in range(0, 16, 2)]),
        (ALTERNATING, 2, list(range(12)), [(0, 2, 4, 6, 8, 10), (1, 3, 5, 7, 9, 11)]),
        (ALTERNATING, 3, ODD_CORES, [(1,), (3, 5), (7, 9)]),
        (ALTERNATING, 2, ODD_CORES, [(1, 3), (5, 7, 9)]),
    ],
)
def test_which_cores(tmp_path: Path, fake: FakeMachine, n: int, cores: list[int], expected: list[tuple[int]]) -> None:
    assert placed(fake.write(tmp_path), n, cores) == expected


def test_fewer_threads_than_cores_take_the_first_ones() -> None:
    assert place([Offer(0, [0, 1, 2, 3], 4)], 0, 2, ()) == ((0, 1), False)


def test_a_rank_with_a_gpu_leaves_the_cores_to_the_others() -> None:
    cores, levels = [0, 1, 2, 3, 4, 5, 6, 7], ({core: core // 4 for core in range(8)},)
    for on_gpu in ([False, True, False], [True, False, False]):
        offers = [Offer(rank, cores, 8, one_core) for rank, one_core in enumerate(on_gpu)]
        placed = [place(offers, rank, 0, levels) for rank in range(3)]
        assert [cpus for one_core, (cpus, _) in zip(on_gpu, placed, strict=True) if one_core] == [(7,)]
        assert [cpus for one_core, (cpus, _) in zip(on_gpu, placed, strict=True) if not one_core] == [
            (0, 1, 2, 3),
            (4, 5, 6),
        ]
    assert place(offers, 0, 4, levels) == ((7,), False) and place(offers, 1, 3, levels) == ((0, 1, 2), False)
    alone = [Offer(0, cores, 8, True)]
    assert place(alone, 0, 0, levels) == (tuple(cores), False)
    crowded = [Offer(rank, [5], 1, rank == 1) for rank in range(2)]
    assert [place(crowded, rank, 0, levels) for rank in range(2)] == [((5,), True)] * 2


def test_more_threads_than_cores_are_not_pinned() -> None:
    assert place([Offer(0, [0, 1], 2)], 0, 4, ()) == ((-1,) * 4, True)


def test_ranks_that_a_launcher_bound_keep_their_cores() -> None:
    offers = [Offer(0, [0, 1], 4), Offer(1, [2, 3], 4)]
    assert place(offers, 1, 0, ()) == ((2, 3), False)


@pytest.mark.parametrize("cores", [[[0, 1]] * 4, [[0], [1], [0], [1]]], ids=["left together", "tied in turn"])
def test_more_ranks_than_cores_share_and_know_it(cores: list[list[int]]) -> None:
    offers = [Offer(rank, own, 2) for rank, own in enumerate(cores)]
    assert [place(offers, i, 0, ()) for i in range(4)] == [((0,), True), ((1,), True), ((0,), True), ((1,), True)]


def test_cores_that_are_tied_to_several_ranks_in_part_are_shared() -> None:
    offers = [Offer(0, [0, 1], 2), Offer(1, [1], 2), Offer(2, [1], 2)]
    assert [place(offers, i, 0, ()) for i in range(3)] == [((0, 1), True), ((1,), True), ((1,), True)]


def test_two_ranks_on_the_only_core_run() -> None:
    assert place([Offer(0, [1], 1), Offer(1, [1], 1)], 1, 0, ()) == ((1,), True)


@pytest.mark.parametrize(
    "cores, message",
    [
        ([[0], [0]], r"ranks 4, 5 on \S+ are all tied to core 0, but there are 8 cores for 2 ranks; give each its own"),
        ([[0, 1], [2], [2], [3]], r"ranks 5, 6 on \S+ are all tied to core 2, but"),
        ([[0, 1], [1, 2]], r"ranks 4, 5 on \S+ are all tied to core 1, but"),
        ([[0, 1, 2, 3], [3]], r"ranks 4, 5 on \S+ are all tied to core 3, but"),
    ],
)
def test_ranks_tied_to_one_core_are_a_mistake_where_there_are_more(cores: list[list[int]], message: str) -> None:
    offers = [Offer(4 + i, own, 8) for i, own in enumerate(cores)]
    for index in range(len(offers)):  # whoever looks
        with pytest.raises(ValueError, match=message):
            place(offers, index, 0, ())
