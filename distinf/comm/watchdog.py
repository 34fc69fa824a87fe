"""No wait without a deadline: a thread that ends the job when ranks do not arrive, and says which."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DEFAULT_TIMEOUT_S = 60.0
LOADING_TIMEOUT_S = 600.0  # one rank's disk may be that much slower than another's

PERIOD_S = 0.25  # four looks a second cost nothing and make a deadline late by no more
# Together with PERIOD_S and the launcher's own second less than the 5 s in which a job has to end.
_ROLL_CALL_S = 2.0  # eight looks of a watchdog that is well
_LOWEST_FIRST_S = 0.5  # a head start for the lowest rank that waits: one line instead of one from each
_ABORT_S = 1.0


@dataclass(frozen=True)
class Place:
    """Where a rank is."""

    number: int  # collectives that it has begun
    wait: str  # the one that it waits in; "" when it computes
    step: str  # "loading", "prefill", "decode step 12"


class Progress:
    """What the watchdog sees of the main thread. `with progress("all-reduce"):` goes around each blocking call."""

    def __init__(self) -> None:
        self.step = ""
        self.timeout_s = DEFAULT_TIMEOUT_S  # `--timeout`
        self.deadline_s = LOADING_TIMEOUT_S  # of the present step
        self.native: Any = None  # distinf.kernels.extension.AllReduce, which counts and waits inside a replayed step
        self._number = 0
        self._wait = ""

    def begin(self, step: str, at_least_s: float = 0) -> None:
        """See distinf.comm.Group."""
        self.step = step
        self.deadline_s = max(self.timeout_s, at_least_s)

    def place(self) -> Place:
        """Of this rank, now."""
        if self.native is None:
            return Place(self._number, self._wait, self.step)
        wait = self._wait or ("all-reduce" if self.native.waiting()[0] else "")
        return Place(self._number + self.native.count, wait, self.step)

    def __call__(self, name: str) -> Progress:
        self._number += 1
        self._wait = name
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self._wait = ""


class Watchdog:
    """Looks at the waits of this rank and ends the whole job, with status 1, when one passes its deadline."""

    def __init__(
        self,
        rank: int,
        hosts: list[str],
        progress: Progress,
        roll_call: Callable[[float], list[Place | None]] | None,
        abort: Callable[[], object],
    ) -> None:
        """`hosts`: of every rank. `roll_call(seconds)`: the place of every rank, None where no answer came; None
        when the ranks cannot be asked. `abort` ends the others; it may hang.
        """
        self._rank, self._hosts, self._progress = rank, hosts, progress
        self._roll_call, self._abort = roll_call, abort
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No wait is looked at from here on."""
        self._stopped.set()
        self._thread.join()

    def end_job(self, line: str = "") -> None:
        """Say `line` on stderr and end every rank; does not return. Neither stderr nor MPI can hold it up."""

        def last_words() -> None:
            if line:
                os.write(2, f"distinf: {line}\n".encode())
            self._abort()

        thread = threading.Thread(target=last_words, daemon=True)
        thread.start()
        thread.join(_ABORT_S)
        os._exit(1)

    def _watch(self) -> None:
        waited_s, last, before = 0.0, time.monotonic(), self._progress.place()
        while not self._stopped.wait(PERIOD_S):
            now, place = time.monotonic(), self._progress.place()
            # Time in which this process was stopped itself is no time that it has waited.
            passed_s, last = min(now - last, 2 * PERIOD_S), now
            waited_s = waited_s + passed_s if place.wait and place == before else 0.0
            before = place
            if waited_s > self._progress.deadline_s:
                self._overdue(place)

    def _overdue(self, place: Place) -> None:
        answers = self._roll_call(_ROLL_CALL_S) if self._roll_call else None
        if self._progress.place() != place:
            return  # the last rank has arrived after all
        where = ", ".join(filter(None, (f"collective {place.number}", place.step)))
        self._report(None if answers is None else absent(place, answers), place.wait, where)

    def _report(self, missing: list[tuple[int, str]] | None, wait: str, where: str) -> None:
        """End the job; `missing` as `absent` gives it, None when nobody knows."""
        within = f"within {self._progress.deadline_s:g} s; {self._name(self._rank)} waited"
        if missing is None:
            who = "a rank (the MPI library has no MPI_THREAD_MULTIPLE to find out which)"
        else:
            who = " and ".join(self._name(rank) + (f", which {doing}," if doing else "") for rank, doing in missing)
        if self._rank != min(set(range(len(self._hosts))) - {rank for rank, _ in missing or []}):
            time.sleep(_LOWEST_FIRST_S)
        if who:
            self.end_job(f"{who} did not arrive at {wait} ({where}) {within}")
        self.end_job(f"{wait} ({where}) was not over {within}, and every rank has arrived at it")

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"


def absent(place: Place, answers: list[Place | None]) -> list[tuple[int, str]]:
    """Ranks that have not come to where this one waits, and what each of them does instead.

    A rank that waits elsewhere waits for someone itself: where others compute or do not answer, it is those.
    """
    late = {
        rank: answer
        for rank, answer in enumerate(answers)
        if answer is None
        or answer.number < place.number
        or (answer.number == place.number and answer.wait not in ("", place.wait))
    }
    guilty = {rank: answer for rank, answer in late.items() if answer is None or not answer.wait} or late
    return [(rank, _doing(place, answer)) for rank, answer in guilty.items()]


def _doing(place: Place, answer: Place | None) -> str:
    if answer is None:
        return "does not answer"
    if answer.wait:
        return f"is at {answer.wait} (collective {answer.number}, {answer.step})"
    return f"is at {answer.step}" if answer.step != place.step else ""
