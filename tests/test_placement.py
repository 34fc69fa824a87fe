"""Placements by a real launcher: told at every start, refused where two ranks were tied to one core by mistake."""

from __future__ import annotations

import json
import re

import pytest

from distinf.binding import allowed_cores
from tests.conftest import ranks, run

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

CORES = len(allowed_cores())
TWO_UNITS = ("--load-format", "dummy", "--config", "tests/support/two_units.json", "--token-ids", "1")


@pytest.mark.parametrize("command", [["generate", "--max-new-tokens", 1], ["python", "perf/latency.py", "--runs", 1]])
def test_every_start_tells_where_its_ranks_are(command: list[object]) -> None:
    flags = TWO_UNITS if command[0] == "generate" else TWO_UNITS[:4]
    done = run(ranks(2, *command, *flags))
    assert done.status == 0, done.stderr
    found = re.findall(
        r"^distinf: rank (\d)  \S+  node [\d,-]+  cores? [\d,-]+  memory \S+  \d+ threads?$", done.stderr, re.M
    )
    assert found == ["0", "1"], done.stderr


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
def test_two_ranks_tied_to_one_core_are_a_mistake() -> None:
    core = allowed_cores()[0]
    tied = ["env", f"I_MPI_PIN_PROCESSOR_LIST={core},{core}", *ranks(2, "info")]
    done = run(tied, timeout_s=60)
    errors = [line for line in done.stderr.splitlines() if line.startswith("distinf: ")]
    assert done.status == 2 and done.stdout == "" and len(errors) == 1
    assert re.search(
        rf"ranks 0, 1 on \S+ are all tied to core {core}, but there are {CORES} cores for 2 ranks", errors[0]
    )


@pytest.mark.parametrize("limit", [[], ["taskset", "-c", str(allowed_cores()[0])]], ids=["all cores", "one core"])
def test_more_ranks_than_cores_run_with_a_warning(limit: list[str]) -> None:
    n = 2 if limit else CORES + 1
    done = run([*limit, *ranks(n, "info", "--json")])
    (warning,) = done.result["warnings"]
    assert re.fullmatch(r"ranks [\d,-]+ on \S+ share cores? [\d,-]+: they wait for each other", warning)
    assert f"distinf: warning: {warning}\n" in done.stderr
    cores = [rank["cores"] for rank in json.loads(done.stdout)["ranks"]]
    assert len(cores) == n and len(set(cores)) == (1 if limit else CORES)
