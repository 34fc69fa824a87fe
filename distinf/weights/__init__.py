"""Checkpoints on disk into packed weights. A format is one reader class and one row in `open_checkpoint`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch


class Checkpoint(Protocol):
    """A checkpoint seen as named tensors, whatever the file format; names are Hugging Face's."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The fields of config.json."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises ValueError naming the file when it is missing."""

    def read(
        self, name: str, dtype: torch.dtype, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        """A slice of a tensor in `dtype`; only the bytes of the slice are read. May be a view of the mapped file."""


def open_checkpoint(model: Path, load_format: str, config_json: Path | None, num_layers: int | None) -> Checkpoint:
    """The checkpoint at `model`: a Hugging Face directory or a GGUF file; with `dummy`, `config_json` and no weights.

    Raises ValueError naming the path when it is neither, or when config.json cannot be read.
    """
    from distinf.weights.dummy import DummyCheckpoint
    from distinf.weights.gguf import GGUFCheckpoint
    from distinf.weights.safetensors import SafetensorsCheckpoint

    if load_format == "dummy":
        return DummyCheckpoint(config_json or model / "config.json", num_layers)
    if model.is_dir():
        return SafetensorsCheckpoint(model)
    if model.suffix == ".gguf" and model.is_file():
        return GGUFCheckpoint(model)
    raise ValueError(f"--model {model}: no such checkpoint; expected a Hugging Face directory or a .gguf file")
