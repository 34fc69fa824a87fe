"""A job in which one rank does not come: `late_rank.py WHERE RANK HOW TIMEOUT_S`, on any number of ranks.

WHERE: all_reduce, all_gather_object, broadcast_object, or loading. HOW: sleep (its watchdog answers), stop (nothing of
it does) or raise. Every rank says `ready` on stdout before.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import torch

from distinf import comm


def main(where: str, rank: int, how: str, timeout_s: float) -> None:
    group = comm.init()
    group.timeout_s = timeout_s
    group.begin("loading" if where == "loading" else "decode step 12")
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: group.all_reduce_(torch.zeros(4096)),
        "all_gather_object": lambda: group.all_gather_object("x"),
        "broadcast_object": lambda: group.broadcast_object("x"),
        "loading": lambda: comm.agreed(group, lambda: None),
    }
    group.barrier()
    print("ready", flush=True)
    if group.rank == rank:
        if how == "raise":
            raise RuntimeError("cosmic ray")
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(100)
    calls[where]()
    group.barrier()  # the root of a broadcast has not waited


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
