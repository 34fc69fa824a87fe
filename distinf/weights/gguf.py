"""GGUF files: tensors under Hugging Face's names and in its order, blocks dequantised or kept as they are."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from distinf.kernels.formats import FORMATS, Format, Numbers
from distinf.models import family
from distinf.weights.gguf_config import architecture_of, hf_config
from distinf.weights.gguf_fields import GGUFFields
from distinf.weights.gguf_header import GGUFTensor, read_header
from distinf.weights.gguf_tensors import Place, Places, TwoPlaces
from distinf.weights.raw import RawFile

_Q = GGMLQuantizationType
# Block types whose numbers our kernels multiply as they are: blocks of 32 with scales (and offsets) in fp16.
_KEPT = {
    _Q.Q8_0: replace(FORMATS["int8"], group=32, scales=torch.float16),
    _Q.Q4_0: replace(FORMATS["int4"], group=32, scales=torch.float16),
    _Q.Q4_1: replace(FORMATS["int4"], group=32, scales=torch.float16, zero_points=True),
}


class GGUFCheckpoint:
    """See distinf.weights.Checkpoint."""

    def __init__(self, path: Path) -> None:
        """Reads the header. Raises ValueError naming the file when it is damaged, or of a model that is not known."""
        self._path = path
        self._file = RawFile(path)
        fields, self._tensors = read_header(self._file)
        file = GGUFFields(path, fields, self._tensors)
        architecture = architecture_of(file)
        self.config = hf_config(file, architecture, self._vector)
        known = family(architecture.model_type)
        config = known.config_from_hf(self.config)
        self._places = Places(path, file.architecture, architecture, config, self._tensors)
        self._find = lru_cache(None)(self._places.find)
        names = (name for param in known.params(config) for name in param.shapes())
        self._places.refuse_rest({tensor.name for name in names for tensor in self._find(name).tensors})

    @property
    def identity(self) -> str:
        return f"{self._file.identity} {hashlib.sha256(repr((self.config, self._tensors)).encode()).hexdigest()}"

    def announce(self, name: str, rows: range) -> None:
        pass

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def read(
        self, name: str, dtype: torch.dtype, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        place = self._find(name)
        *leading, width = place.shape
        rows = rows if rows is not None else range(math.prod(leading))
        columns = columns if columns is not None else range(width)
        shape = (len(rows), len(columns)) if leading else (len(columns),)
        if not len(rows) or not len(columns):
            return torch.empty(shape, dtype=dtype)
        if isinstance(place, TwoPlaces):
            return self._keys_and_values(place, rows, columns).to(dtype)
        values = self._placed(place, rows, columns).reshape(shape)
        return (values - place.shift if place.shift else values).to(dtype)

    def _placed(self, place: Place, rows: range, columns: range) -> torch.Tensor:
        """fp32 [rows, columns] of Hugging Face's tensor; a vector is one row."""
        if place.transposed:
            return self._values(place.tensor, columns, rows).T
        if len(place.shape) == 1 and place.order:
            whole = self._values(place.tensor, rows, range(place.shape[0]))
            return whole[:, place.order(np.asarray(columns))]
        return self._values(place.tensor, self._file_rows(place, rows), columns)

    def _file_rows(self, place: Place, rows: range) -> Sequence[int]:
        if place.order is None:
            return rows
        order: list[int] = place.order(np.asarray(rows)).tolist()
        return order

    def _keys_and_values(self, place: TwoPlaces, rows: range, columns: range) -> torch.Tensor:
        """fp32 [rows, columns]: of each head its keys, which are kept transposed, and its values."""
        nope, size = place.keys.shape[2], place.shape[0] // place.keys.shape[0]
        parts = []
        for head in range(rows.start // size, -(-rows.stop // size)):
            mine = range(max(rows.start - head * size, 0), min(rows.stop - head * size, size))
            if mine.start < nope:
                keys = range(mine.start, min(mine.stop, nope))
                parts.append(self._values(self._places.part(place.keys, head), columns, keys).T)
            if mine.stop > nope:
                values = range(max(mine.start - nope, 0), mine.stop - nope)
                parts.append(self._values(self._places.part(place.values, head), values, columns))
        return torch.cat(parts)

    def _vector(self, tensor: GGUFTensor) -> torch.Tensor:
        """fp32 [elements] of a tensor of one dimension."""
        return self._values(tensor, range(1), range(tensor.shape[0]))[0]

    def _values(self, tensor: GGUFTensor, rows: Sequence[int], columns: range) -> torch.Tensor:
        """fp32 [rows, columns]"""
        blocks, skipped = self._blocks(tensor, rows, columns)
        try:
            with np.errstate(invalid="ignore", over="ignore"):  # found below
                values = torch.from_numpy(dequantize(blocks.numpy(), tensor.kind))
        except NotImplementedError:
            raise self._wrong(tensor, f"has the type {tensor.kind.name}, which cannot be read") from None
        if not values.isfinite().all():
            raise self._wrong(tensor, "has values that are not finite")
        return values[:, skipped : skipped + len(columns)]

    def table(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        height, width = self.shape(name)
        out = torch.empty(height, width, dtype=dtype)
        step = max(1, (8 << 20) // (4 * width))  # rows of 8 MB in fp32, so that no second copy of all is needed
        for start in range(0, height, step):
            out[start : start + step] = self.read(name, dtype, range(start, min(start + step, height)))
        return out

    def stored(self, name: str) -> Format | None:
        place = self._find(name)
        return _KEPT.get(place.tensor.kind) if isinstance(place, Place) and not place.transposed else None

    def numbers(self, name: str, rows: range, columns: range) -> Numbers:
        place = self._find(name)
        assert isinstance(place, Place) and not place.transposed
        tensor = place.tensor
        form = _KEPT[tensor.kind]
        blocks, skipped = self._blocks(tensor, self._file_rows(place, rows), columns)
        assert not skipped and len(columns) % form.group == 0, columns
        header = 4 if form.zero_points else 2
        blocks = blocks.reshape(len(rows), len(columns) // form.group, header + form.group * form.bits // 8)
        scales = blocks[..., :header].contiguous().view(torch.float16).float()
        if not scales.isfinite().all():
            raise self._wrong(tensor, "has scales that are not finite")
        data = blocks[..., header:]
        # Signed to unsigned; of 4-bit numbers the first half of a block is in the low nibbles.
        number = data ^ 128 if form.bits == 8 else torch.cat((data & 15, data >> 4), -1)
        offset = scales[..., 1] if form.zero_points else None
        return Numbers(number.reshape(len(rows), len(columns)), scales[..., 0], offset)

    def _blocks(self, tensor: GGUFTensor, rows: Sequence[int], columns: range) -> tuple[torch.Tensor, int]:
        """Whole blocks around `columns` of each row, uint8, and how many elements too many are in front."""
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        first, last = columns.start // block, -(-columns.stop // block)
        n = (last - first) * block_bytes
        data = self._file.read(tensor.offset, tensor.row_bytes, rows, first * block_bytes, n)
        return data, columns.start - first * block

    def _wrong(self, tensor: GGUFTensor, problem: str) -> ValueError:
        return ValueError(f"{self._path}: tensor {tensor.name!r} {problem}")
