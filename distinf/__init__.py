"""Distributed CPU inference for large language models: tensor-parallel ranks under MPI, native kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distinf.comm import Group, InputError
    from distinf.llm import LLM, Completion, load_model
    from distinf.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "Group", "InputError", "SamplingParams", "load_model"]

_HOMES = {"Group": "comm", "InputError": "comm", "SamplingParams": "sampling"}  # of the others: llm


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for: torch takes seconds, and the command line has to be ready
    for Ctrl-C before.
    """
    if name not in __all__:
        raise AttributeError(f"module 'distinf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"distinf.{_HOMES.get(name, 'llm')}"), name)
