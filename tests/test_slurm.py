"""Batch files and srun under a real Slurm, and what scancel leaves behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPO, Finished
from tests.slurm_cluster import PARTITION, missing, slurm_cluster

pytestmark = [pytest.mark.mpi, pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

SMALL = ("--load-format", "dummy", "--config", "tests/support/two_units.json", "--token-ids", "1,2")
LONG = ("--max-new-tokens", "4000", "--ignore-eos")


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment of a cluster that is this module's own."""
    with slurm_cluster() as env:
        yield env


def run(command: list[str], env: dict[str, str]) -> Finished:
    done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, timeout=240)
    return Finished(done.returncode, done.stdout, done.stderr)


def submit(name: str, output: Path, *words: str, env: dict[str, str]) -> str:
    """Queue a file of launch/slurm as it is, with words for the program; returns the job's number."""
    flags = ["--parsable", f"--partition={PARTITION}", f"--output={output}"]
    done = run(["sbatch", *flags, f"launch/slurm/{name}.sbatch", *words], env)
    assert done.status == 0, done.stderr
    return done.stdout.strip()


def finished(job: str, output: Path, env: dict[str, str]) -> str:
    """What a batch job wrote until its end, which must have been a good one."""
    wait_until(lambda: not run(["squeue", "--noheader", f"--jobs={job}"], env).stdout, 240, output)
    assert " ExitCode=0:0 " in run(["scontrol", "--oneliner", "show", "job", job], env).stdout, text_of(output)
    return text_of(output)


def srun(*words: str, flags: tuple[str, ...] = ("--mpi=pmi2",)) -> list[str]:
    """Two tasks of `distinf`."""
    return ["srun", f"--partition={PARTITION}", "--ntasks=2", *flags, sys.executable, "-m", "distinf", *words]


def test_generate_sbatch_answers(slurm: dict[str, str], tmp_path: Path) -> None:
    text = finished(submit("generate", tmp_path / "out", env=slurm), tmp_path / "out", slurm)
    assert "The capital of France is Paris." in text
    assert re.search(r"^\S+/mpiexec\S* .*-n 2 \S+/distinf generate --model smollm2-135m ", text.splitlines()[0])
    assert "distinf: rank 1 " in text and "| 2 ranks x " in text


def test_latency_sbatch_measures(slurm: dict[str, str], tmp_path: Path) -> None:
    words = ("--input-len", "8", "--output-len", "4", "--runs", "1")
    env = {**slurm, "CONFIG": "tests/support/two_units.json"}
    text = finished(submit("latency", tmp_path / "out", *words, env=env), tmp_path / "out", slurm)
    result = json.loads(text.splitlines()[-1])
    assert result["model"] == "two_units" and result["world_size"] == 2 and result["output_len"] == 4


def test_srun_starts_ranks_without_a_launcher(slurm: dict[str, str]) -> None:
    result = run(srun("generate", *SMALL, "--max-new-tokens", "4", "--json"), slurm).result
    assert result["world_size"] == 2 and result["new_tokens"] == 4


def test_srun_without_pmi_is_a_mistake(slurm: dict[str, str]) -> None:
    done = run(srun("info", flags=()), slurm)
    assert done.status == 2 and "use srun --mpi=pmi2" in done.stderr and "Traceback" not in done.stderr


def test_srun_overcommits_with_a_warning(slurm: dict[str, str]) -> None:
    """More tasks than the job's cores is what --overcommit asks for: no mistake, though the machine has more cores."""
    done = run(srun("info", "--json", flags=("--mpi=pmi2", "--overcommit")), slurm)
    (warning,) = done.result["warnings"]
    assert "ranks 0-1 on " in warning and " share core" in warning


@pytest.mark.parametrize("how", ["sbatch", "srun"])
def test_scancel_leaves_nothing_behind(slurm: dict[str, str], tmp_path: Path, how: str) -> None:
    before, output = shared_memory(), tmp_path / "out"
    with ExitStack() as stack:
        if how == "sbatch":
            submit("generate", output, *LONG, env=slurm)
        else:
            out = stack.enter_context(output.open("wb"))
            command = srun("generate", "--prompt", "Once upon a time", *LONG)
            stack.enter_context(subprocess.Popen(command, env=slurm, cwd=REPO, stdout=out, stderr=out))
        stack.callback(run, ["scancel", "--user=root"], slurm)  # before the wait for srun, whatever happens
        wait_until(lambda: re.search(r"rank 1 .*threads?\n[^|]{80}", text_of(output), re.S) is not None, 120, output)
        assert sorted(p.environ().get("PMI_RANK", "") for p in job_processes(slurm))[-2:] == ["0", "1"]
        assert run(["scancel", "--user=root"], slurm).status == 0
        wait_until(lambda: not job_processes(slurm), 10, output)
        assert shared_memory() == before


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def job_processes(slurm: dict[str, str]) -> list[psutil.Process]:
    """Processes of the cluster's jobs: those with a job id, and this cluster's configuration, in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            env = process.environ()
            if "SLURM_JOB_ID" in env and env.get("SLURM_CONF") == slurm["SLURM_CONF"]:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(done: Callable[[], bool], limit_s: float, output: Path) -> None:
    deadline = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline, text_of(output)
        time.sleep(0.05)


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""
