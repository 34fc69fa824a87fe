"""Loading as many small jobs on a rank's own threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from tqdm import tqdm


@dataclass(frozen=True)
class Job:
    """Work for one thread, and the bytes of packed weight that it makes."""

    work: Callable[[], None]
    nbytes: int


def run_jobs(jobs: Sequence[Job], threads: int, cores: Sequence[int], progress: bool) -> None:
    """All jobs, on threads of their own on `cores` ((): where the caller is). The first error ends them and is raised.

    `progress` shows a bar with GB/s on stderr.
    """

    def on_cores() -> None:
        if cores:  # the caller is pinned to one core, and these threads with it
            os.sched_setaffinity(0, cores)

    total = sum(job.nbytes for job in jobs)
    bar = tqdm(total=total, desc="loading", unit="B", unit_scale=True, leave=False, disable=not progress)
    with bar, ThreadPoolExecutor(threads, initializer=on_cores) as pool:
        sizes: dict[Future[None], int] = {pool.submit(job.work): job.nbytes for job in jobs}
        try:
            for done in as_completed(sizes):
                done.result()
                bar.update(sizes[done])
        finally:
            pool.shutdown(cancel_futures=True)
