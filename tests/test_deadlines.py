"""Ranks that do not come, real ones under a real launcher: the job ends in time, names them, and leaves nothing."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator

import psutil
import pytest

from distinf.comm.watchdog import Place, absent
from distinf.config import RunConfig
from tests.conftest import REPO, ranks, run
from tests.support.starts import starts

TIMEOUT_S = 2
AFTER_S = 10  # in which a job has to end after a deadline: 5 s, and as much for a busy machine

WAITS = Place(7, "all-reduce", "decode step 3")


@pytest.mark.parametrize(
    "answers, expected",
    [
        ([WAITS, Place(6, "", "decode step 3")], [(1, "")]),
        ([WAITS, Place(6, "", "prefill"), WAITS], [(1, "is at prefill")]),
        ([WAITS, None], [(1, "does not answer")]),
        ([WAITS, Place(5, "broadcast", "loading")], [(1, "is at broadcast (collective 5, loading)")]),
        # A rank that waits elsewhere is not to blame when another computes.
        ([WAITS, Place(6, "broadcast", "loading"), Place(5, "", "loading")], [(2, "is at loading")]),
        ([WAITS, Place(7, "barrier", "exit")], [(1, "is at barrier (collective 7, exit)")]),
        # Passed this collective already, as a broadcast's root does; ahead of it; everyone here.
        ([WAITS, Place(7, "", "decode step 3"), Place(8, "barrier", "exit")], []),
        ([WAITS, WAITS], []),
    ],
)
def test_who_is_missing(answers: list[Place | None], expected: list[tuple[int, str]]) -> None:
    assert absent(WAITS, answers) == expected


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_a_timeout_is_a_positive_number(value: float) -> None:
    with pytest.raises(ValueError, match=f"--timeout {value}: expected a positive number"):
        RunConfig(timeout_s=value)


def test_a_wait_in_native_code_has_the_same_end() -> None:
    """No launcher, and an `abort` that hangs."""
    script = (
        "import time; from types import SimpleNamespace; from distinf.comm.watchdog import Place, Progress, Watchdog\n"
        "progress = Progress(); progress.timeout_s = 1.0; progress.begin('decode step 4')\n"
        "progress.native = SimpleNamespace(count=5, waiting=lambda: (0.1, []))\n"
        "answers = [progress.place(), Place(4, '', 'decode step 4')]\n"
        "watchdog = Watchdog(0, ['here', 'there'], progress, lambda timeout_s: answers, lambda: time.sleep(60))\n"
        "time.sleep(60)"
    )
    done = run([sys.executable, "-c", script], timeout_s=50)
    assert done.status == 1
    where = "all-reduce (collective 5, decode step 4)"
    assert done.stderr == f"distinf: rank 1 on there did not arrive at {where} within 1 s; rank 0 on here waited\n"


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No file in /dev/shm that was not there before, once the shells that clean up have had their turn."""
    before = set(os.listdir("/dev/shm"))
    yield
    end = time.monotonic() + 5
    while (left := ours(set(os.listdir("/dev/shm")) - before)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left


def ours(files: Iterable[str]) -> list[str]:
    """Those that a start of ranks makes; other programs use /dev/shm meanwhile."""
    return [name for name in files if name.startswith(("Intel_MPI_", "distinf-"))]


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize(
    "n, where, victim, how, said",
    [
        (2, "all_reduce", 1, "sleep", r"rank 1 on \S+ did not arrive at all-reduce \(collective \d+, decode step 12\)"),
        (3, "all_gather_object", 1, "stop", r"rank 1 on \S+, which does not answer, did not arrive at all-gather"),
        (3, "broadcast_object", 0, "sleep", r"rank 0 on \S+ did not arrive at broadcast \(collective \d+"),
        (2, "loading", 0, "stop", r"rank 0 on \S+, which does not answer, did not arrive at all-gather \(collective \d+, loading\)"),
    ],
)  # fmt: skip
def test_a_rank_that_does_not_come_is_named(n: int, where: str, victim: int, how: str, said: str) -> None:
    with started(n, where, victim, how) as job:
        begin, processes = time.monotonic(), psutil.Process(job.pid).children(recursive=True)
        _, errors = job.communicate(timeout=60)
        assert time.monotonic() - begin < TIMEOUT_S + AFTER_S
        assert job.returncode not in (0, None)
        lines = [line for line in errors.splitlines() if line.startswith("distinf:")]
        waiting = min(set(range(n)) - {victim})
        assert len(lines) == 1 and re.fullmatch(
            rf"distinf: {said}.* within {TIMEOUT_S} s; rank {waiting} on \S+ waited", lines[0]
        ), errors
        assert not psutil.wait_procs(processes, timeout=1)[1]


@pytest.mark.mpi
@pytest.mark.slow
def test_a_script_that_fails_on_one_rank_ends_all() -> None:
    """At once, not after the deadline."""
    with started(2, "all_reduce", 1, "raise", timeout_s=600) as job:
        begin = time.monotonic()
        _, errors = job.communicate(timeout=60)
        assert time.monotonic() - begin < AFTER_S
        assert job.returncode != 0 and re.search(r"distinf: rank 1 on \S+ failed: RuntimeError: cosmic ray", errors)


@pytest.mark.mpi
@pytest.mark.slow
def test_a_rank_that_dies_before_mpi_has_started_ends_all() -> None:
    """The launcher does not mind it; rank 0, in MPI_Init, does."""
    script = (
        "import os, time\n"
        "if os.environ['PMI_RANK'] == '1': os.kill(os.getpid(), 9)\n"
        "from distinf import comm; comm.init()"
    )
    done = run(ranks(2, "python", "-c", script), timeout_s=60)
    assert done.status != 0 and re.search(r"rank 1 on \S+ ended before MPI had started", done.stderr)


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_all(number: int) -> None:
    with started(2, "all_reduce", 1, "sleep", timeout_s=600) as job:
        processes = psutil.Process(job.pid).children(recursive=True)
        job.send_signal(number)
        job.communicate(timeout=AFTER_S)
        assert job.returncode != 0
        assert not psutil.wait_procs(processes, timeout=1)[1]


@pytest.mark.mpi
@pytest.mark.slow
def test_starts_that_are_killed_leave_nothing() -> None:
    """A few; `python tests/support/starts.py` does 200."""
    for outcome in starts(6, seed=0):
        assert outcome.status not in (None, 0), outcome
        assert not outcome.processes, outcome
        assert not ours(outcome.files), outcome


class started(subprocess.Popen[str]):
    """tests/support/late_rank.py, after every rank has said that it is ready; killed at the end of the context."""

    def __init__(self, n: int, where: str, victim: int, how: str, timeout_s: float = TIMEOUT_S) -> None:
        command = ranks(n, "python", "tests/support/late_rank.py", where, victim, how, timeout_s)
        super().__init__(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.stdout is not None
        ready = "ready\n" * n
        assert sorted(self.stdout.read(len(ready))) == sorted(ready), self.communicate()

    def __exit__(self, *error: object) -> None:
        self.kill()
        super().__exit__(None, None, None)
