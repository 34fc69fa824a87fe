"""The native extension: whether it is there, and which instruction sets this CPU has for it."""

from __future__ import annotations

import hashlib
from pathlib import Path

try:
    from distinf.kernels import _native
    from distinf.kernels._native import AllReduce as AllReduce
    from distinf.kernels._native import MpiCalls as MpiCalls
    from distinf.kernels._native import ReduceCalls as ReduceCalls

    _MISSING = ""
except ImportError as error:  # a source tree that was never built
    _MISSING = str(error)

# Largest first; "avx512" on the command line means the better of its two forms.
_LEVELS = ("amx", "avx512_bf16", "avx512", "avx2")


def available_isas() -> list[str]:
    """Instruction sets that this process may use, best first; empty without the extension or AVX2."""
    if _MISSING:
        return []
    return [name for name in _LEVELS if _native.isa_available(getattr(_native.Isa, name))]


AVAILABLE = bool(available_isas())


def best_isa() -> str | None:
    """The best of available_isas, or None."""
    return next(iter(available_isas()), None)


def cpu_name() -> str:
    """The CPU's own name; virtual machines report what they like."""
    return "unknown" if _MISSING else _native.cpu_name()


def build_id() -> str:
    """Differs for builds of the extension that may pack in different ways."""
    return hashlib.sha256(Path(_native.__file__).read_bytes()).hexdigest()


def resolve_isa(isa: str) -> str:
    """`--isa` to a level of this CPU. Raises ValueError when the CPU or the operating system lacks it."""
    if _MISSING:
        raise ValueError(f"--kernels native: the extension is not built ({_MISSING}); run `pip install .`")
    available = available_isas()
    wanted = {"auto": _LEVELS, "avx512": ("avx512_bf16", "avx512")}.get(isa, (isa,))
    for level in wanted:
        if level in available:
            return level
    raise ValueError(f"--isa {isa}: this CPU ({cpu_name()}) has {', '.join(available) or 'none of them'}")
