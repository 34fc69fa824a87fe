"""Distributed CPU inference for large language models: tensor-parallel ranks under MPI, native kernels."""

__version__ = "0.1.0"

from distinf.comm import Group, InputError
from distinf.llm import LLM, Completion, load_model
from distinf.sampling import SamplingParams

__all__ = ["LLM", "Completion", "Group", "InputError", "SamplingParams", "load_model"]
