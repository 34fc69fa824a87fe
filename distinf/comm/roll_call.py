"""Asking every rank where it is, over a communicator of its own, while their main threads compute or wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from distinf.comm.watchdog import PERIOD_S, Place

_QUESTION, _ANSWER = 1, 2  # message tags
_POLL_S = 0.02  # while answers are expected


class RollCall:
    """A thread of each rank answers the others; another asks them when it has to.

    Needs MPI_THREAD_MULTIPLE. MPI may hold up either thread for ever, as when the network is cut, but not the one
    that calls `ask`.
    """

    def __init__(self, comm: Any, place: Callable[[], Place]) -> None:
        """`comm`: an mpi4py communicator that nothing else uses. `place`: of this rank, now."""
        self._comm, self._place = comm, place
        self._others = [rank for rank in range(comm.Get_size()) if rank != comm.Get_rank()]
        self._round = 0
        self._answers: list[Place | None] = []
        self._sent: list[Any] = []  # requests, whose buffers MPI may still read
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="roll call", daemon=True)
        self._thread.start()

    def ask(self, timeout_s: float) -> list[Place | None]:
        """The place of every rank, None for each that has not answered in time."""
        answers: list[Place | None] = [None] * self._comm.Get_size()
        answers[self._comm.Get_rank()] = self._place()
        self._round += 1
        self._answers = answers
        threading.Thread(target=self._question, args=(self._round,), daemon=True).start()
        end = time.monotonic() + timeout_s
        while None in answers and time.monotonic() < end:
            time.sleep(_POLL_S)
        return list(answers)

    def stop(self) -> None:
        """No question is answered from here on."""
        self._stopped.set()
        self._thread.join()

    def _question(self, number: int) -> None:
        for rank in self._others:
            self._sent.append(self._comm.isend(number, rank, _QUESTION))

    def _serve(self) -> None:
        while not self._stopped.wait(_POLL_S if None in self._answers else PERIOD_S):
            for rank in self._others:
                while self._comm.iprobe(rank, _QUESTION):
                    answer = self._comm.recv(source=rank, tag=_QUESTION), self._place()
                    self._sent.append(self._comm.isend(answer, rank, _ANSWER))
                while self._comm.iprobe(rank, _ANSWER):
                    number, place = self._comm.recv(source=rank, tag=_ANSWER)
                    if number == self._round:
                        self._answers[rank] = place
