"""Random weights of any shape, for timing: no file but a config.json."""

from __future__ import annotations

import json
import zlib
from functools import cached_property
from pathlib import Path

import torch

from distinf.kernels.formats import Format, Numbers
from distinf.models import family
from distinf.weights.hf_config import read_config_json

# A prime: consecutive rows of any usual width start at different places of the bank.
_BANK = 4194301


class DummyCheckpoint:
    """See distinf.weights.Checkpoint.

    Element (row, column) of a matrix of width k is `bank[(hash(name) + row * k + column) % len(bank)] / sqrt(k)`
    with one bank of normal numbers: a slice is the same whatever else is read, and costs a copy. Vectors
    (norms, biases) are ones.
    """

    def __init__(self, config_json: Path, num_layers: int | None) -> None:
        """Raises ValueError naming the file when the config cannot be read or is of an unknown model type."""
        self.config = read_config_json(config_json)
        if num_layers is not None:
            if num_layers < 1:
                raise ValueError(f"--num-layers {num_layers}: expected 1 or more")
            self.config["num_hidden_layers"] = num_layers
        known = family(self.config["model_type"])
        self._shapes: dict[str, tuple[int, ...]] = {}
        for param in known.params(known.config_from_hf(self.config)):
            self._shapes |= param.shapes()

    @cached_property
    def _bank(self) -> torch.Tensor:
        return torch.randn(_BANK, generator=torch.Generator().manual_seed(0))

    @property
    def identity(self) -> str:
        return json.dumps(self.config, sort_keys=True)

    def announce(self, name: str, rows: range) -> None:
        pass

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(
        self, name: str, dtype: torch.dtype, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        width = shape[1]
        rows, columns = rows if rows is not None else range(shape[0]), columns if columns is not None else range(width)
        scale = width**-0.5
        out = torch.empty(len(rows), len(columns), dtype=dtype)
        for i, row in enumerate(rows):
            start = (zlib.crc32(name.encode()) + row * width + columns.start) % _BANK
            head = min(len(columns), _BANK - start)
            torch.mul(self._bank[start : start + head], scale, out=out[i, :head])
            torch.mul(self._bank[: len(columns) - head], scale, out=out[i, head:])
        return out

    def table(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self.read(name, dtype)

    def stored(self, name: str) -> Format | None:
        return None

    def numbers(self, name: str, rows: range, columns: range) -> Numbers:
        raise NotImplementedError("nothing here is quantised")
