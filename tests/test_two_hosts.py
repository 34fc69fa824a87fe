"""Two hosts with a network between them (tests/support/two_hosts.py): the same tokens, and a cable that is pulled."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO, distinf, run
from tests.support.two_hosts import Host, missing, two_hosts

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

MPIRUN = str(REPO / "launch/mpirun.sh")
PROMPT = ["--chat", "--prompt", "What is the capital of France?"]
TIMEOUT_S = 5
AFTER_S = 10  # in which a job has to end after a deadline: 5 s, and as much for a busy machine


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    if reason := missing():
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


@pytest.fixture(autouse=True)
def nothing_is_left(hosts: tuple[Host, Host]) -> Iterator[None]:
    """Neither processes nor files in /dev/shm, on either side."""
    yield
    end = time.monotonic() + 5
    while any(host.processes() for host in hosts) and time.monotonic() < end:
        time.sleep(0.1)
    for host in hosts:
        assert not host.processes() and not host.shm_files(), host.name


def test_each_host_has_its_own_ranks(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Node mates are those of one host, whichever way the hosts are given."""
    script = tmp_path / "mates.py"
    script.write_text(
        "import json, socket; from distinf import comm\n"
        "group = comm.init()\n"
        "found = group.all_gather_object((socket.gethostname(), group.node_mates()))\n"
        "if group.rank == 0: print(json.dumps(found))\n"
    )
    (tmp_path / "hosts").write_text("hosta\nhostb\n")
    expected = [["hosta", [0, 1]], ["hosta", [0, 1]], ["hostb", [2, 3]], ["hostb", [2, 3]]]
    for where in (["-f", tmp_path / "hosts"], ["-hosts", "hosta,hostb", "-ppn", "2"]):
        done = run(hosts[0].command(MPIRUN, "-n", 4, *where, "--", "python", script))
        assert done.status == 0 and json.loads(done.stdout) == expected, done.stderr


def test_tokens_equal_those_of_one_rank(hosts: tuple[Host, Host]) -> None:
    flags = ["generate", *PROMPT, "--dtype", "fp32", "--max-new-tokens", "8", "--json"]
    alone = run(distinf(*flags)).result["token_ids"]
    for n in (2, 4):
        where = ["-n", n, "-hosts", "hosta,hostb", "-ppn", n // 2]
        result = run(hosts[0].command(MPIRUN, *where, "--", "python", "-m", "distinf", *flags)).result
        assert result["world_size"] == n and result["token_ids"] == alone


@pytest.mark.parametrize("n, missing_ranks", [(2, [1]), (4, [2, 3])])
def test_a_pulled_cable_ends_the_job(hosts: tuple[Host, Host], n: int, missing_ranks: list[int]) -> None:
    """Within the deadline, the launcher too; the ranks on the other side are named, and none is left there."""
    flags = ["--token-ids", "1,2,3", "--max-new-tokens", "4000", "--ignore-eos", "--timeout", TIMEOUT_S]
    where = ["-n", n, "-hosts", "hosta,hostb", "-ppn", n // 2]
    command = hosts[0].command(MPIRUN, *where, "--", "python", "-m", "distinf", "generate", *flags)
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        try:
            assert job.stdout is not None and job.stdout.read(40), "no text came"  # generating
            hosts[1].link("down")
            begin = time.monotonic()
            _, errors = job.communicate(timeout=60)
            ended_s = time.monotonic() - begin
        finally:
            job.kill()
            hosts[1].link("up")
    who = " and ".join(rf"rank {rank} on hostb, which does not answer," for rank in missing_ranks)
    lines = [line for line in errors.decode().splitlines() if "did not arrive" in line]
    assert len(lines) == 1, errors
    assert re.fullmatch(rf"distinf: {who} did not arrive at .* within {TIMEOUT_S} s; rank 0 on hosta waited", lines[0])
    assert job.returncode != 0
    assert ended_s < TIMEOUT_S + AFTER_S
