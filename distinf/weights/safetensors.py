"""Hugging Face directories: config.json and safetensors files, one or many with an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from distinf.weights.hf_config import read_config_json

_INDEX = "model.safetensors.index.json"


class SafetensorsCheckpoint:
    """See distinf.weights.Checkpoint. Files are memory-mapped; a slice reads its own bytes."""

    def __init__(self, directory: Path) -> None:
        """Opens every file's header. Raises ValueError naming a file that is missing or damaged."""
        self._directory = directory
        self.config = read_config_json(directory / "config.json")
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for name in self._file_names():
            self._files[name] = _open(directory / name)
            self._file_of.update(dict.fromkeys(self._files[name].keys(), name))

    def _file_names(self) -> list[str]:
        index = self._directory / _INDEX
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{index}: expected a JSON object with 'weight_map'") from None
            outside = [n for n in names if not isinstance(n, str) or Path(n).name != n]
            if outside:
                raise ValueError(f"{index}: {outside[0]!r} is not the name of a file in this directory")
            return names
        names = sorted(p.name for p in self._directory.glob("*.safetensors"))
        if not names:
            raise ValueError(
                f"{self._directory}: no .safetensors file; pickled weights (.bin) are not read, they can run code"
            )
        return names

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(
        self, name: str, dtype: torch.dtype, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        shape = self.shape(name)
        rows = None if rows == range(shape[0]) else rows
        columns = None if len(shape) > 1 and columns == range(shape[1]) else columns
        if rows is None and columns is None:
            data = self._files[self._file_of[self._known(name)]].get_tensor(name)  # a view of the mapped file
        else:
            r = slice(rows.start, rows.stop) if rows is not None else slice(None)
            data = self._slice(name)[r] if columns is None else self._slice(name)[r, columns.start : columns.stop]
        converted: torch.Tensor = data.to(dtype)
        return converted

    def _slice(self, name: str) -> Any:
        return self._files[self._file_of[self._known(name)]].get_slice(name)

    def _known(self, name: str) -> str:
        if name not in self._file_of:
            bare = name.partition(".")[2]  # saved from the model without its head, as GPT-2's own files are
            if bare in self._file_of:
                return bare
            raise ValueError(f"{self._directory}: tensor {name!r} is missing from {', '.join(self._files)}")
        return name


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: the file is missing")
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged or truncated safetensors file ({error})") from None
