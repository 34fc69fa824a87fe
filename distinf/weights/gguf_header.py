"""The header of a GGUF file: its fields, and where its tensors lie.

Little-endian throughout: the magic, a version, counts, KEY -> typed value, NAME -> {dimensions, type, offset}, then
the data on a multiple of `general.alignment` (32).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from distinf.weights.raw import RawFile

_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: rows of whole blocks."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # outermost dimension first
    offset: int  # bytes from the start of the file

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // int(block) * int(block_bytes)


class _Cursor:
    """Reads forward in the mapped file; past its end is a ValueError."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, n: int) -> int:
        """Start of the next n bytes."""
        start, self.at = self.at, self.at + n
        if self.at > len(self.data):
            raise ValueError(f"{n} bytes at {start} of {len(self.data)}")
        return start

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))
        return value

    def string(self) -> str:
        n = self.scalar("<Q")
        start = self.take(n)
        return self.data[start : start + n].decode("utf-8")

    def value(self) -> Any:
        """A field's value; None for an array, which is passed over."""
        kind = self.scalar("<I")
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"field type {kind}")
        element, count = self.scalar("<I"), self.scalar("<Q")
        if element in _SCALARS:
            self.take(count * struct.calcsize(_SCALARS[element]))
        elif element == _STRING:
            for _ in range(count):
                self.take(self.scalar("<Q"))
        else:
            raise ValueError(f"array of type {element}")
        return None


def read_header(file: RawFile) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Fields (arrays as None) and tensors by name. Raises ValueError naming the file and what is wrong."""
    try:
        with open(file.path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(data), file.size)
    except (ValueError, struct.error) as error:  # also of an empty file, and of text that is not UTF-8
        raise ValueError(f"{file.path}: damaged or truncated GGUF file ({error})") from None


def _parse(cursor: _Cursor, size: int) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    if cursor.data[cursor.take(4) : cursor.at] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.scalar("<I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, expected 2 or 3, little-endian")
    n_tensors, n_fields = cursor.scalar("<Q"), cursor.scalar("<Q")
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
        key = cursor.string()
        if key in fields:
            raise ValueError(f"field {key!r} is there twice")
        fields[key] = cursor.value()
    entries = [_entry(cursor) for _ in range(n_tensors)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment {alignment!r}, expected a power of two")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, dimensions, kind, offset in entries:
        if name in tensors:
            raise ValueError(f"tensor {name!r} is there twice")
        tensors[name] = _tensor(name, dimensions, kind, start + offset, size)
    return fields, tensors


def _entry(cursor: _Cursor) -> tuple[str, list[int], int, int]:
    name, n = cursor.string(), cursor.scalar("<I")
    if not 1 <= n <= _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {n} dimensions")
    return name, [cursor.scalar("<Q") for _ in range(n)], cursor.scalar("<I"), cursor.scalar("<Q")


def _tensor(name: str, dimensions: list[int], kind: int, offset: int, size: int) -> GGUFTensor:
    try:
        known = GGMLQuantizationType(kind)
    except ValueError:
        raise ValueError(f"tensor {name!r} has the unknown type {kind}") from None
    if dimensions[0] % GGML_QUANT_SIZES[known][0]:
        raise ValueError(f"tensor {name!r} has rows of {dimensions[0]}, no whole blocks of {known.name}")
    tensor = GGUFTensor(name, known, tuple(reversed(dimensions)), offset)
    nbytes = math.prod(tensor.shape[:-1]) * tensor.row_bytes
    if offset + nbytes > size:
        raise ValueError(f"tensor {name!r} ends at byte {offset + nbytes} of {size}")
    return tensor
