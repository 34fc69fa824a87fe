"""All ranks of an MPI job through oneCCL: its all-reduce; the rest, which no token waits for, stays with MPI."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from distinf.comm.mpi import MPIGroup

LIBRARY = "libccl.so.1"


@dataclass(frozen=True)
class NativeAllReduce:
    """Addresses of C functions `int f(void* context, T* data, int64_t n)` that sum data over ranks, in place.

    One thread of each rank calls the same one of them. They return 0, or 1 when oneCCL failed.
    """

    context: int
    fp32: int
    bf16: int


class CclGroup(MPIGroup):
    """See distinf.comm.Group."""

    name = "ccl"

    def __init__(self) -> None:
        """Start MPI, then oneCCL on every rank. Raises ValueError, on all of them, where one finds no library."""
        super().__init__()
        from distinf.comm import agreed  # which imports this file

        transport = "ofi" if "Open MPI" in self._mpi.Get_library_version() else "mpi"
        folder = Path(sys.prefix, "lib")
        for name, value in settings(os.environ.get("CCL_ATL_TRANSPORT", transport), folder).items():
            os.environ.setdefault(name, value)
        self._library = agreed(self, lambda: load(folder))
        store = self._library.Store() if self.rank == 0 else None
        address = self.broadcast_object(store.address if store else None)
        self._communicator = self._library.Communicator(
            store or self._library.Store(address), self.rank, self.world_size
        )

    def all_reduce_(self, x: torch.Tensor) -> None:
        """As Group has it; x may also be bf16."""
        assert x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous()
        self._communicator.all_reduce(x.data_ptr(), x.numel(), x.dtype == torch.bfloat16)

    @property
    def native_all_reduce(self) -> NativeAllReduce:
        """The same for native code; valid as long as this group."""
        return NativeAllReduce(self._communicator.context, self._library.ALL_REDUCE_FP32, self._library.ALL_REDUCE_BF16)


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
