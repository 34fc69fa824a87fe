"""What directories of quantised safetensors share: integers on a grid, read as they are or dequantised."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distinf.kernels.formats import GROUP_SIZES, Format, Numbers
from distinf.weights.safetensors import SafetensorsCheckpoint, StoredTensor
from distinf.weights.strips import Strips


@dataclass(frozen=True)
class Grid:
    """How one linear [n, k] is quantised."""

    n: int
    k: int
    form: Format
    order: torch.Tensor | None = None  # int64 [k]: the group of each input feature, where groups are not in order

    @property
    def group(self) -> int:
        """Input features that share a scale."""
        return self.form.group or self.k

    @property
    def groups(self) -> int:
        """Scales of an output feature."""
        return self.k // self.group


class QuantisedCheckpoint(SafetensorsCheckpoint):
    """See distinf.weights.Checkpoint. A format says what its tensors are called, and how integers are packed."""

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        """Raises ValueError naming a file that is damaged."""
        super().__init__(directory, config)
        self._grids: dict[str, Grid | None] = {}
        self._strips = Strips()

    def grid(self, name: str) -> Grid | None:
        """Of the linear NAME.weight; None where it is not quantised. Raises ValueError for tensors that do not fit."""
        if name not in self._grids:
            self._grids[name] = self.find_grid(name.removesuffix(".weight"))
        return self._grids[name]

    @abstractmethod
    def find_grid(self, stem: str) -> Grid | None:
        """See `grid`; `stem` is NAME."""

    @abstractmethod
    def integers(self, name: str, rows: range, columns: range) -> torch.Tensor:
        """Numbers from 0 up: uint8 [rows, columns]."""

    @abstractmethod
    def scales(self, name: str, rows: range, groups: range) -> tuple[torch.Tensor, torch.Tensor | None]:
        """fp32 [rows, groups]: scales, and offsets where the format has them."""

    def announce(self, name: str, rows: range) -> None:
        self._strips.announce(name.removesuffix(".weight"), rows)

    def across(self, stem: str, part: str, lines: range, rows: range, per: int = 1) -> torch.Tensor:
        """Of the tensor STEM.part, which has `per` output features in a column: [lines, columns that hold `rows`]."""
        return self._strips.read(stem, self.tensor(f"{stem}.{part}"), lines, rows, per)

    def shape(self, name: str) -> tuple[int, ...]:
        grid = self.grid(name)
        return (grid.n, grid.k) if grid else super().shape(name)

    def stored(self, name: str) -> Format | None:
        grid = self.grid(name)
        return grid.form if grid and grid.form.group in GROUP_SIZES and grid.order is None else None

    def numbers(self, name: str, rows: range, columns: range) -> Numbers:
        grid = self.grid(name)
        assert grid is not None
        groups = range(columns.start // grid.group, columns.stop // grid.group)
        # The one group of a channel may be cut: every part of it has its scale.
        whole = groups if grid.form.group else range(1)
        return Numbers(self.integers(name, rows, columns), *self.scales(name, rows, whole))

    def read(
        self, name: str, dtype: torch.dtype, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        grid = self.grid(name)
        if grid is None:
            return super().read(name, dtype, rows, columns)
        rows, columns = rows if rows is not None else range(grid.n), columns if columns is not None else range(grid.k)
        if not len(rows) or not len(columns):
            return torch.empty(len(rows), len(columns), dtype=dtype)
        if grid.order is None:
            groups = range(columns.start // grid.group, (columns.stop - 1) // grid.group + 1)
            index = torch.arange(columns.start, columns.stop) // grid.group - groups.start
        else:
            groups, index = range(grid.groups), grid.order[columns.start : columns.stop]
        scale, offset = self.scales(name, rows, groups)
        numbers = self.integers(name, rows, columns).float()
        if offset is None:
            return ((numbers - grid.form.middle) * scale[:, index]).to(dtype)
        return (numbers * scale[:, index] + offset[:, index]).to(dtype)

    def table(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self.read(name, dtype) if self.grid(name) else super().table(name, dtype)


def group_size(directory: Path, settings: dict[str, Any]) -> int:
    """`group_size` of a quantization_config; 0: one group. Raises ValueError when it is no number of features."""
    group = settings.get("group_size")
    if type(group) is not int or group < -1 or group == 0:
        raise ValueError(f"{directory}: group_size {group!r}; expected a number of input features, or -1 for all")
    return max(group, 0)


def expect(tensor: StoredTensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> StoredTensor:
    """The tensor itself. Raises ValueError naming file and tensor when its dtype or shape is another."""
    if tensor.dtype not in dtypes:
        raise tensor.fail(f"has dtype {tensor.dtype}; expected {' or '.join(map(str, dtypes))}")
    if tensor.shape != shape:
        raise tensor.fail(f"has shape {list(tensor.shape)}; expected {list(shape)}")
    return tensor


def finite(tensor: StoredTensor, values: torch.Tensor) -> torch.Tensor:
    """`values` in fp32. Raises ValueError naming file and tensor when one of them is not finite."""
    if not values.isfinite().all():
        raise tensor.fail("has values that are not finite")
    return values.float()


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [a, b] -> the eight 4-bit numbers of each, lowest bits first: uint8 [a, 8 b]."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)


def whole_words(elements: range) -> tuple[range, slice]:
    """The words of eight that hold `elements`, and where those are in them."""
    words = range(elements.start // 8, -(-elements.stop // 8))
    first = elements.start - 8 * words.start
    return words, slice(first, first + len(elements))
