"""What a process is bound to, read back: on faked trees, and once from this kernel."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from distinf.binding import Binding, allowed_cores, bind_memory, memory_policy, read_back, remote_bytes
from distinf.cgroup import cpu_quota, cpuset
from distinf.comm.single import SingleGroup
from distinf.placement import Bound, describe, remote_memory, warnings
from distinf.topology import Machine
from tests.fake_machines import ALTERNATING, HBM, SNC4, TWO_SOCKETS, TWO_SOCKETS_HBM, FakeMachine, FakeProcess, put

PREFERRED, PREFERRED_MANY = 1, 5  # linux/mempolicy.h


def bound(root: Path, fake: FakeMachine, process: FakeProcess, threads: int = 0) -> Binding:
    machine = fake.write(root)
    process.write(root)
    return read_back(list(process.threads), threads or len(process.threads), 0, machine, root, process.affinity)


@pytest.mark.parametrize(
    "fake, process, nodes, cores, remote",
    [
        (TWO_SOCKETS, FakeProcess({7: "4", 8: "5"}), [1], [4, 5], []),
        (TWO_SOCKETS, FakeProcess({7: "12", 8: "13"}, "prefer:1"), [1], [4, 5], []),  # second threads of cores 4, 5
        (TWO_SOCKETS, FakeProcess({7: "4"}, "bind:0"), [1], [4], [0]),
        (TWO_SOCKETS, FakeProcess({7: "4"}, "interleave:0-1"), [1], [4], [0]),
        (TWO_SOCKETS, FakeProcess({7: "3-4"}, "prefer:1"), [0, 1], [3, 4], []),
        (TWO_SOCKETS, FakeProcess({7: "4"}, mems="0"), [1], [4], [0]),  # a cpuset with cores here and memory there
        (SNC4, FakeProcess({7: "6", 8: "7"}, "prefer:3"), [3], [6, 7], []),
        (SNC4, FakeProcess({7: "6", 8: "7"}, "prefer:2"), [3], [6, 7], [2]),
        (HBM, FakeProcess({7: "0"}, "prefer:1"), [0], [0], []),
        (HBM, FakeProcess({7: "0"}, "prefer (many):0-1"), [0], [0], []),
        (ALTERNATING, FakeProcess({7: "3", 8: "5"}, "local"), [1], [3, 5], []),
    ],
)
def test_read_back(
    tmp_path: Path, fake: FakeMachine, process: FakeProcess, nodes: list[int], cores: list[int], remote: list[int]
) -> None:
    binding = bound(tmp_path, fake, process)
    assert (binding.nodes, binding.cores, binding.remote_nodes) == (nodes, cores, remote)
    assert binding.policy == process.policy and binding.threads == len(process.threads)


def test_threads_that_are_not_ours_may_run_where_the_first_one_may(tmp_path: Path) -> None:
    binding = bound(tmp_path, TWO_SOCKETS, FakeProcess({7: "0-1"}), threads=3)
    assert binding.thread_cpus == [[0, 1]] * 3 and binding.cores == [0, 1]


def test_a_kernel_without_numa_has_no_policy(tmp_path: Path) -> None:
    assert memory_policy(tmp_path) == "unknown"
    assert bound(tmp_path, SNC4, FakeProcess({7: "6"}, policy="unknown")).remote_nodes == []


def test_memory_that_came_from_elsewhere_is_counted(tmp_path: Path) -> None:
    """Pages of our own, of either size; the program's text, a mapped file, is not ours."""
    mappings = [
        "7f0000000000 default anon=3 dirty=3 N0=2 N1=1 kernelpagesize_kB=4",
        "7f1000000000 prefer:1 anon=2 dirty=2 N0=2 kernelpagesize_kB=2048",
        "7f2000000000 default file=/model.gguf mapped=9 N0=9 kernelpagesize_kB=4",
    ]
    FakeProcess({7: "4"}, mappings=mappings).write(tmp_path)
    machine = TWO_SOCKETS.write(tmp_path)
    assert remote_bytes([4], machine, tmp_path) == 2 * 4096 + 2 * (2 << 20)
    assert remote_bytes([0], machine, tmp_path) == 4096


@pytest.mark.parametrize(
    "cgroup, files, quota, cpus",
    [
        ("0::/", {}, None, set()),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "cpu.max": "max 100000"}, None, set()),
        ("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5, set()),
        ("0::/a/b", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "200000 100000"}, 0.5, set()),
        ("0::/host/path", {"cpu.max": "300000 100000", "cpuset.cpus.effective": "1,3,5"}, 3.0, {1, 3, 5}),
        ("0::/a", {"cpuset.cpus.effective": "0-7", "a/cpuset.cpus.effective": "2-3"}, None, {2, 3}),
        ("4:cpuset:/\n2:cpu,cpuacct:/j\n0::/",
         {"cpu/j/cpu.cfs_quota_us": "250000", "cpu/j/cpu.cfs_period_us": "100000", "cpuset/cpuset.effective_cpus": "0-3"},
         2.5, {0, 1, 2, 3}),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, set()),
        ("1:name=systemd:/\n0::/x", {"unified/x/cpu.max": "100000 100000"}, 1.0, set()),
    ],
)  # fmt: skip
def test_cgroups_of_both_versions(
    tmp_path: Path, cgroup: str, files: dict[str, str], quota: float | None, cpus: set[int]
) -> None:
    FakeProcess({}, cgroup=cgroup).write(tmp_path)
    for name, text in files.items():
        put(tmp_path / "sys/fs/cgroup" / name, text)
    assert cpu_quota(tmp_path) == quota
    assert cpuset(tmp_path) == cpus


def test_a_cpuset_hides_cores_unless_a_batch_job_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "sys/fs/cgroup/cpuset.cpus.effective", "1,3,5,7,9")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert bound(tmp_path, ALTERNATING, FakeProcess({7: "1"})).hidden_cores == 7
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert bound(tmp_path, ALTERNATING, FakeProcess({7: "1"})).hidden_cores == 0


RANK = Binding("hostA", 0, [0], [[0], [1]], [0, 1], "prefer:0", [], None, 0)
OTHER = replace(RANK, nodes=[1], thread_cpus=[[2], [3]], cores=[2, 3], policy="prefer:1")


@pytest.mark.parametrize(
    "bindings, expected",
    [
        ({0: RANK, 1: OTHER}, []),
        ({0: RANK, 1: replace(RANK, host="hostB", leader=1)}, []),  # the same cores of another machine
        ({0: RANK, 1: OTHER, 2: RANK}, ["ranks 0,2 on hostA share cores 0-1: they wait for each other"]),
        ({0: RANK, 1: replace(OTHER, cores=[1, 2])}, ["ranks 0-1 on hostA share core 1: they wait for each other"]),
        ({0: RANK, 1: replace(OTHER, remote_nodes=[0])}, ["rank 1 on hostA: memory from node 0, cores on node 1"]),
        ({0: replace(RANK, thread_cpus=[[0]] * 3, cores=[0])}, ["rank 0 on hostA: 3 threads on core 0"]),
        ({0: replace(RANK, quota_cores=2.0)}, []),
        ({0: replace(RANK, quota_cores=1.5)}, ["hostA: the cgroup allows 2 threads the time of 1.5 cores"]),
        ({0: replace(RANK, quota_cores=2.0), 1: OTHER}, ["hostA: the cgroup allows 4 threads the time of 2 cores"]),
        ({0: replace(RANK, hidden_cores=7)}, ["hostA: the cgroup's cpuset hides 7 cores of the machine"]),
        (
            {r: replace(RANK, host=f"host{r}", leader=r, remote_nodes=[1]) for r in range(4)},
            ["ranks 0-3 on 4 hosts: memory from node 1, cores on node 0"],
        ),
    ],
)
def test_warnings(bindings: dict[int, Binding], expected: list[str]) -> None:
    assert warnings(bindings) == expected


def test_a_line_for_each_rank() -> None:
    unpinned = replace(OTHER, thread_cpus=[[2, 3], [2, 3]])
    assert describe({0: RANK, 1: unpinned}) == [
        "rank 0  hostA  node 0  cores 0-1  memory prefer:0  2 threads",
        "rank 1  hostA  node 1  cores 2-3  memory prefer:1  2 threads, not pinned",
    ]


def test_many_ranks_share_lines() -> None:
    bindings = {
        2 * r + i: replace(b, host=f"host{r}", leader=2 * r) for r in range(8) for i, b in enumerate((RANK, OTHER))
    }
    assert describe(bindings) == [
        "ranks 0,2,4,6,8,10,12,14  8 hosts  node 0  cores 0-1  memory prefer:0  2 threads",
        "ranks 1,3,5,7,9,11,13,15  8 hosts  node 1  cores 2-3  memory prefer:1  2 threads",
    ]
    assert warnings(bindings) == []


@pytest.mark.parametrize(
    "membind, fake, cpus, policy, expected",
    [
        ("auto", TWO_SOCKETS, [4, 5], "default", (PREFERRED, [1])),
        ("auto", TWO_SOCKETS, [3, 4], "default", None),  # each thread's own node, as by default
        ("auto", TWO_SOCKETS, [4, 5], "interleave:0-1", None),  # numactl's
        ("off", TWO_SOCKETS, [4, 5], "default", None),
        ("auto", HBM, [0, 1], "default", (PREFERRED, [0])),
        ("hbm", HBM, [0, 1], "default", (PREFERRED, [1])),
        ("hbm", HBM, [0, 1], "prefer:0", (PREFERRED, [1])),
        ("hbm", TWO_SOCKETS_HBM, [3, 4], "default", (PREFERRED_MANY, [2, 3])),
        ("hbm", TWO_SOCKETS_HBM, [4], "default", (PREFERRED, [3])),
    ],
)
def test_where_memory_is_asked_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, membind: str, fake: FakeMachine, cpus: list[int], policy: str,
    expected: tuple[int, list[int]] | None,
) -> None:  # fmt: skip
    asked: list[tuple[int, list[int]]] = []
    monkeypatch.setattr("distinf.binding._set_policy", lambda mode, nodes: asked.append((mode, nodes)) or "")
    FakeProcess({}, policy).write(tmp_path)
    assert bind_memory(membind, cpus, fake.write(tmp_path), tmp_path) == ""
    assert asked == ([expected] if expected else [])


def test_memory_that_spilled_while_loading_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = Bound(None, Machine({}, {}, {}, {}), {0: RANK}, [])  # type: ignore[arg-type]
    for there, expected in ((3_140_000_000, ["rank 0 on hostA: 3.1 GB of memory on a remote node"]), (10**8, [])):
        monkeypatch.setattr("distinf.placement.remote_bytes", lambda cpus, machine, there=there: there)
        assert remote_memory(SingleGroup(), bound) == expected


def test_hbm_must_be_there(tmp_path: Path) -> None:
    FakeProcess({}).write(tmp_path)
    with pytest.raises(ValueError, match="--membind hbm: no NUMA node of this machine is memory alone"):
        bind_memory("hbm", [0], TWO_SOCKETS.write(tmp_path), tmp_path)


def test_a_policy_that_is_forbidden_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container; here the system call does not exist."""
    if not Machine.read().nodes:
        pytest.skip("this kernel shows no NUMA nodes")
    monkeypatch.setattr("distinf.binding._SET_MEMPOLICY", {platform.machine(): 100_000})
    problem = bind_memory("auto", allowed_cores(), Machine.read())
    assert problem.startswith("the memory policy could not be set (Function not implemented)")


def test_this_process_is_read_back() -> None:
    """A process of its own: binding memory is for good. Its thread is pinned to one core; both show in /proc."""
    if memory_policy() == "unknown":
        pytest.skip("this kernel has no NUMA policies")
    script = (
        "import os, threading\n"
        "from distinf.binding import *\n"
        "machine, cores = Machine.read(), allowed_cores()\n"
        "os.sched_setaffinity(0, cores[-1:])\n"
        "assert memory_policy() == 'default', memory_policy()\n"
        "for how, policy in (('off', 'default'), ('auto', f'prefer:{machine.node[cores[-1]]}')):\n"
        "    problem = bind_memory(how, cores[-1:], machine)\n"
        "    found = read_back([threading.get_native_id()], 1, 0, machine)\n"
        "    assert problem or found.policy == policy, found\n"
        "    assert found.thread_cpus == [cores[-1:]] and found.cores == cores[-1:] and not found.remote_nodes, found\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_this_process_was_left_is_asked_once() -> None:
    before = allowed_cores()
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, before[:1])
        assert allowed_cores() == before
        assert read_back([threading.get_native_id()], 1, 0, Machine.read()).cores == before[:1]
    finally:
        os.sched_setaffinity(0, mine)
