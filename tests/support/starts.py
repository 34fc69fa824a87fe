"""Starts and stops in a row: jobs of two ranks, each ended by a random signal to a random process at a random moment.

    python tests/support/starts.py --starts 200 --seed 1

Prints each start, then one JSON line: how many hung, and what was left of processes and files in /dev/shm. Run it where
no other MPI job starts or ends meanwhile, or as `python tests/support/two_hosts.py python tests/support/starts.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parent.parent.parent
JOB = [
    str(REPO / "launch/mpirun.sh"), "-n", "2", "--", "python", "-m", "distinf", "generate", "--load-format", "dummy",
    "--config", "tests/support/long_context.json", "--token-ids", "1,2", "--max-new-tokens", "16", "--ignore-eos",
]  # fmt: skip
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
END_S = 20.0  # from the signal to the end of all processes, on a machine that may be busy; a hang lasts minutes
# Intel's mpiexec.hydra loses a SIGINT in the first 15 ms or so of its life, when it can catch it but has started nobody
# whom to hand it on: whoever pressed Ctrl-C then presses it again.
AGAIN_S = 6.0
MARK = "DISTINF_TEST_START"  # in the environment of all processes of a start


@dataclass
class Outcome:
    """What became of one start."""

    told: str  # who got which signal when
    status: int | None  # of the launcher; None: it hung
    end_s: float  # from the signal to the launcher's end
    processes: list[str] = field(default_factory=list)  # that were left
    files: list[str] = field(default_factory=list)  # in /dev/shm
    errors: str = ""
    again: bool = False  # the launcher needed a second SIGINT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    outcomes = starts(args.starts, args.seed)
    bad = [o for o in outcomes if o.status in (None, 0) or o.processes or o.files]
    for outcome in bad:
        print(outcome.told, outcome.status, outcome.processes, outcome.files, outcome.errors, sep="\n  ")
    ends = sorted(o.end_s for o in outcomes)
    result = {
        "starts": len(outcomes),
        "seed": args.seed,
        "hung": sum(o.status is None for o in outcomes),
        "second_sigint": sum(o.again for o in outcomes),
        "status_0": sum(o.status == 0 for o in outcomes),
        "left_processes": sum(len(o.processes) for o in outcomes),
        "left_files": sum(len(o.files) for o in outcomes),
        "end_s": {"p50": round(ends[len(ends) // 2], 2), "max": round(ends[-1], 2)},
        "statuses": dict(Counter(str(o.status) for o in outcomes)),
    }
    print(json.dumps(result))
    sys.exit(bool(bad))


def starts(count: int, seed: int) -> list[Outcome]:
    """That many jobs, each stopped before its end. The first one is only timed."""
    rng = random.Random(seed)
    begin = time.monotonic()
    subprocess.run(JOB, cwd=REPO, check=True, capture_output=True, timeout=300)
    whole_s = time.monotonic() - begin
    return [stopped_start(rng, whole_s, f"{os.getpid()}.{i}") for i in range(count)]


def stopped_start(rng: random.Random, whole_s: float, mark: str) -> Outcome:
    """Start a job that takes about `whole_s` and send it a signal on the way."""
    victim, number, moment_s = rng.choice(("launcher", "rank 0", "rank 1")), rng.choice(SIGNALS), rng.random() * whole_s
    files = set(os.listdir("/dev/shm"))
    with subprocess.Popen(
        [*JOB, "--max-new-tokens", "500000"], cwd=REPO, env=os.environ | {MARK: mark}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as job:  # fmt: skip
        time.sleep(moment_s)
        process = job.pid if victim == "launcher" else rank_process(mark, int(victim[-1]))
        os.kill(process, number)
        sent = time.monotonic()
        again = process == job.pid and number == signal.SIGINT and not ended(job, AGAIN_S)
        if again:
            job.send_signal(signal.SIGINT)
        try:
            _, errors = job.communicate(timeout=END_S)
            status = job.returncode
        except subprocess.TimeoutExpired:
            status, errors = None, ""
            for left_over in processes(mark):
                left_over.kill()
    told = f"{victim} {number.name} after {moment_s:.2f} s"
    outcome = Outcome(told, status, time.monotonic() - sent, errors=errors, again=again)
    end = time.monotonic() + END_S
    while ((left := processes(mark)) or set(os.listdir("/dev/shm")) - files) and time.monotonic() < end:
        time.sleep(0.1)
    outcome.processes = [" ".join(p.cmdline()) for p in left]
    outcome.files = sorted(set(os.listdir("/dev/shm")) - files)
    for process in left:
        process.kill()
    twice = ", a second time" if again else ""
    print(f"{outcome.told}{twice}: status {outcome.status} after {outcome.end_s:.2f} s", flush=True)
    return outcome


def ended(job: subprocess.Popen[str], limit_s: float) -> bool:
    """Whether it ends in time."""
    try:
        job.wait(limit_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def rank_process(mark: str, rank: int) -> int:
    """The process of a rank, as soon as there is one; a shell that it starts inherits its environment."""
    while True:
        for process in processes(mark):
            try:
                if "python" in process.name() and process.environ().get("PMI_RANK") == str(rank):
                    return process.pid
            except psutil.Error:
                continue
        time.sleep(0.01)


def processes(mark: str) -> list[psutil.Process]:
    """Living ones of a start."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


if __name__ == "__main__":
    main()
