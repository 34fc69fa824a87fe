"""All ranks of an MPI job through oneCCL: its all-reduce; the rest, which no token waits for, stays with MPI."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from distinf.comm.mpi import MPIGroup
from distinf.kernels import extension
from distinf.stdio import stdout_to_stderr

LIBRARY = "libccl.so.1"


class CclGroup(MPIGroup):
    """See distinf.comm.Group."""

    name = "ccl"

    def _all_reduce(self, wire_bf16: bool) -> Any:
        """Raises ValueError, on every rank, where one finds no library."""
        self._communicator, calls = connect(self, self.rank, self.world_size)
        return self._alone(wire_bf16, calls)


def connect(group: MPIGroup, rank: int | None, ranks: int) -> tuple[Any, Any]:
    """oneCCL's communicator of `ranks` ranks of the group and its calls for native code, which hold as long as it does.

    `rank` is this one's number among them, 0 on the group's first; None: not one of them, and gets (None, None).
    Collective over the group. Raises ValueError, on every rank, where one finds no library.
    """
    from distinf.comm import agreed  # which imports this file

    transport = "ofi" if group.over_open_mpi else "mpi"
    folder = Path(sys.prefix, "lib")
    for name, value in settings(os.environ.get("CCL_ATL_TRANSPORT", transport), folder).items():
        os.environ.setdefault(name, value)
    library = agreed(group, lambda: load(folder))
    with stdout_to_stderr():  # it prints its warnings
        store = library.Store() if group.rank == 0 else None
        address = group.broadcast_object(store.address if store else None)
        if rank is None:
            return None, None
        communicator = library.Communicator(store or library.Store(address), rank, ranks)
    return communicator, extension.ReduceCalls(library.ALL_REDUCE_FP32, library.ALL_REDUCE_BF16, communicator.context)


def settings(transport: str, folder: Path) -> dict[str, str]:
    """Environment that oneCCL needs, by CCL_ATL_TRANSPORT ("mpi" or "ofi"). `folder` is where pip puts libraries.

    What the user has set goes before.
    """
    chosen = {
        "CCL_ATL_TRANSPORT": transport,
        # No thread of its own, which would sit on the rank's last core, where one of ours computes. The rank that waits
        # makes the progress. 16 KiB, 2 ranks of one core each on a busy machine: 10 us, and 38 ms with such a thread.
        "CCL_WORKER_OFFLOAD": "0",
        # It warns of every variable that is set. One line about this one remains.
        "CCL_LOG_LEVEL": "error",
    }
    if transport == "mpi":
        # Over the MPI that runs already (Intel MPI, MPICH), with its shared memory: 16 KiB between two ranks of a host
        # take a quarter of the time that libfabric's tcp takes. Ranks then find each other through MPI as well, not
        # through sockets: on a host without a network the latter crash.
        return {**chosen, "CCL_KVS_MODE": "mpi"}
    if (folder / "libfabric.so.1").exists():
        # The wheel's libfabric is not on the loader's path and does not look for its providers beside itself.
        return {**chosen, "CCL_OFI_LIBRARY_PATH": str(folder / "libfabric.so.1"), "FI_PROVIDER_PATH": str(folder)}
    return chosen


def load(folder: Path) -> ModuleType:
    """The module _ccl with oneCCL behind it: the library in `folder`, else where the system looks for libraries.

    Raises ValueError without a library, and without the module.
    """
    path = folder / LIBRARY
    try:
        ctypes.CDLL(str(path) if path.exists() else LIBRARY, ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ValueError(f'--comm ccl: oneCCL not found ({error}); pip install "distinf[ccl]"') from None
    try:
        from distinf.comm import _ccl
    except ImportError as error:
        raise ValueError(f"--comm ccl: the extension does not load ({error}); run `pip install .`") from None
    return _ccl
