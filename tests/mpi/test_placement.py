"""Where the ranks of the job are, against what the kernel says of each thread."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from distinf import LLM, comm, kernels
from distinf.binding import allowed_cores, allowed_cpus, memory_policy
from distinf.comm import Group
from distinf.engine import PREFILL_ROWS
from distinf.kernels import extension
from distinf.placement import Bound, bind


@pytest.fixture(scope="module")
def group() -> Group:
    return comm.init()


@pytest.fixture(scope="module")
def bound(group: Group) -> Bound:
    return bind(group, 0, "auto", lambda placement: kernels.load("auto", "auto", "bf16", placement))


def test_every_thread_is_on_its_own_core(group: Group, bound: Bound) -> None:
    mine = bound.bindings[group.rank]
    assert sorted(bound.bindings) == list(range(group.world_size))
    assert len(mine.thread_cpus) == bound.kernels.threads == len(set(bound.kernels.thread_ids()))
    for thread, cpus in zip(bound.kernels.thread_ids(), mine.thread_cpus, strict=True):
        assert os.sched_getaffinity(thread) == set(cpus)
    if bound.kernels.name == "native":
        assert all(len(cpus) == 1 for cpus in mine.thread_cpus) and len(mine.cores) == mine.threads


def test_ranks_share_no_core_or_say_so(group: Group, bound: Bound) -> None:
    ours = [core for binding in bound.bindings.values() for core in binding.cores]
    everyones = set().union(*group.all_gather_object(allowed_cores()))
    assert set(ours) <= everyones
    shared = [line for line in bound.warnings if " share core" in line]
    if group.world_size <= len(everyones):
        assert sorted(ours) == sorted(everyones) and not shared
    else:
        assert len(shared) == 1


def test_memory_is_on_the_rank_s_node(group: Group, bound: Bound) -> None:
    mine = bound.bindings[group.rank]
    assert mine.policy == memory_policy() and mine.remote_nodes == []
    if mine.policy != "unknown" and len(mine.nodes) == 1:
        assert mine.policy in (f"prefer:{mine.nodes[0]}", "default"), "prefer, unless the kernel forbids it"
        assert (mine.policy == "default") == any("memory policy could not be set" in w for w in bound.warnings)


@pytest.mark.skipif(not extension.AVAILABLE, reason="the native extension is not built")
def test_slots_are_taken_when_a_rank_has_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page lies near the core that took it: all of what a model's sums go through is taken by the bound rank."""
    taken: list[tuple[int, set[int], str]] = []
    take = os.posix_fallocate

    def watched(fd: int, begin: int, size: int) -> None:
        taken.append((size, os.sched_getaffinity(0), memory_policy()))
        take(fd, begin, size)

    monkeypatch.setattr(os, "posix_fallocate", watched)
    two_units = json.loads(Path("tests/support/two_units.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(two_units | {"hidden_size": 512, "intermediate_size": 512}))
    group = comm.init("shm")
    os.sched_setaffinity(0, allowed_cpus())  # as the launcher left it
    taken.clear()
    LLM(load_format="dummy", config=str(tmp_path / "config.json"), group=group)
    capacity, rank, ranks = PREFILL_ROWS * 512, group.rank, group.world_size
    common = [4 * capacity * r // ranks for r in (rank, rank + 1)]
    assert [size for size, _, _ in taken] == [extension.AllReduce.part_bytes(capacity), common[1] - common[0]]
    assert all(where == [os.sched_getaffinity(0), memory_policy()] for _, *where in taken)


def test_the_same_is_known_on_every_rank(group: Group, bound: Bound) -> None:
    everyone = group.all_gather_object((bound.bindings, bound.warnings))
    assert all(other == everyone[0] for other in everyone)


def test_kernels_that_are_torch_s_stay_on_the_rank_s_cores(group: Group) -> None:
    reference = bind(group, 0, "auto", lambda placement: kernels.load("reference", "auto", "bf16", placement))
    torch.ones(1 << 20).exp_()
    cores = set(reference.bindings[group.rank].cores)
    assert len(cores) == reference.kernels.threads and os.sched_getaffinity(0) == cores
