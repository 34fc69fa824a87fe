"""Where the ranks of the job are, against what the kernel says of each thread."""

from __future__ import annotations

import os

import pytest
import torch

from distinf import comm, kernels
from distinf.binding import allowed_cores, memory_policy
from distinf.comm import Group
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


def test_the_same_is_known_on_every_rank(group: Group, bound: Bound) -> None:
    everyone = group.all_gather_object((bound.bindings, bound.warnings))
    assert all(other == everyone[0] for other in everyone)


def test_kernels_that_are_torch_s_stay_on_the_rank_s_cores(group: Group) -> None:
    reference = bind(group, 0, "auto", lambda placement: kernels.load("reference", "auto", "bf16", placement))
    torch.ones(1 << 20).exp_()
    cores = set(reference.bindings[group.rank].cores)
    assert len(cores) == reference.kernels.threads and os.sched_getaffinity(0) == cores
