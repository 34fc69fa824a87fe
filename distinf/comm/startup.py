"""Starting MPI: with a deadline, with an eye on ranks that never get there, and with nothing left in /dev/shm."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from distinf.comm.watchdog import LOADING_TIMEOUT_S

_LOOK_S = 1.0


def start_mpi() -> Any:
    """mpi4py's MPI module, after MPI_Init unless someone has called it. Raises ImportError or RuntimeError without MPI.

    mpi4py starts MPI while holding the interpreter's lock, and no other thread could see that a rank is missing;
    ctypes lets go of it.
    """
    import mpi4py

    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    from mpi4py import MPI  # loads the MPI library, which a lone process must not need

    if not MPI.Is_initialized():
        with _watched(), _shm_files_that_go_with_this_process():
            library = ctypes.CDLL(MPI.__file__)
            if library.MPI_Init_thread(None, None, MPI.THREAD_MULTIPLE, ctypes.byref(ctypes.c_int())):
                raise RuntimeError("MPI_Init_thread failed")
        MPI.COMM_WORLD.Set_errhandler(MPI.ERRORS_RETURN)  # mpi4py makes exceptions of them
    return MPI


@contextmanager
def _watched() -> Iterator[None]:
    """While the body waits for all ranks to start: end this process when one cannot come any more."""
    started = threading.Event()
    threading.Thread(target=_watch, args=(started,), daemon=True).start()
    try:
        yield
    finally:
        started.set()


def _watch(started: threading.Event) -> None:
    end, dead_before = time.monotonic() + LOADING_TIMEOUT_S, ""
    reason = ""
    while not reason and not started.wait(_LOOK_S):
        dead = _dead_neighbour()
        if dead and dead == dead_before:  # twice, as the launcher may have been about to start it
            reason = f"{dead} ended before MPI had started"
        elif time.monotonic() > end:
            reason = f"a rank did not start within {LOADING_TIMEOUT_S:g} s"
        dead_before = dead
    if reason:
        mine = f"rank {os.environ.get('PMI_RANK', '?')} on {socket.gethostname()}"
        os.write(2, f"distinf: {reason}; {mine} waited\n".encode())
        os._exit(1)  # which the launcher does notice: this rank has come to MPI_Init


def _dead_neighbour() -> str:
    """A rank of this host that is no more, or "".

    hydra, the launcher of Intel MPI and MPICH, does not mind the end of a rank that has not come to MPI_Init, and
    the others would wait in theirs. Its proxy has one child for each rank of the host.
    """
    try:
        proxy = psutil.Process(os.getppid())
        if proxy.name() != "hydra_pmi_proxy":
            return ""
        alive = [child for child in proxy.children() if child.status() != psutil.STATUS_ZOMBIE]
        ranks = {int(child.environ().get("PMI_RANK", -1)) for child in alive}
    except psutil.Error:
        return ""
    here, everywhere = int(os.environ["MPI_LOCALNRANKS"]), int(os.environ["PMI_SIZE"])
    if len(alive) >= here:
        return ""
    gone = sorted(set(range(everywhere)) - ranks)
    names = f"rank {' and '.join(map(str, gone))}" if here == everywhere else "a rank"
    return f"{names} on {socket.gethostname()}"


@contextmanager
def _shm_files_that_go_with_this_process() -> Iterator[None]:
    """Intel MPI's files in /dev/shm have names until every rank has opened them: a job killed before would leave them.

    They go into a directory of this process, which a shell removes when the body is over or the process dead.
    """
    name = "I_MPI_SHM_FILE_PREFIX_4K"
    if name in os.environ:
        yield
        return
    script = """trap '' HUP INT TERM
        directory=$(mktemp -d /dev/shm/distinf-XXXXXX) && echo "$directory" && read -r _; rm -rf -- "$directory" """
    cleaner = subprocess.Popen(
        ["/bin/sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert cleaner.stdin and cleaner.stdout
    directory = cleaner.stdout.readline().strip()  # empty where there is no /dev/shm to write to
    if directory:
        os.environ[name] = directory
    try:
        yield
    finally:
        cleaner.stdin.close()
        cleaner.wait()
