"""Hugging Face directories: config.json and safetensors files, one or many with an index.

A file is 8 bytes of header length (little-endian), a JSON object NAME -> {dtype, shape, data_offsets}, and the data.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distinf.kernels.formats import Format, Numbers
from distinf.weights.raw import RawFile

_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    file: RawFile
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    def read(self, rows: Sequence[int] | None = None, columns: range | None = None) -> torch.Tensor:
        """A slice in the file's dtype; a tensor of one dimension is one row, one of none a row of one column."""
        *leading, width = self.shape or (1,)
        rows = rows if rows is not None else range(math.prod(leading))
        columns = columns if columns is not None else range(width)
        size = self.dtype.itemsize
        data = self.file.read(self.offset, width * size, rows, columns.start * size, len(columns) * size)
        shape = (*leading, width) if len(leading) != 1 else (len(rows), len(columns))
        return data.view(self.dtype).reshape(shape) if data.numel() else torch.empty(shape, dtype=self.dtype)

    def mapped(self) -> torch.Tensor:
        """All of it as a view of the mapped file, or a copy where the file has it at an odd address."""
        n = math.prod(self.shape) * self.dtype.itemsize
        if self.offset % self.dtype.itemsize:
            return self.read()
        return self.file.mapped(self.offset, n).view(self.dtype).reshape(self.shape)

    def fail(self, problem: str) -> ValueError:
        """An error that names file and tensor."""
        return ValueError(f"{self.file.path}: tensor {self.name!r} {problem}")


class SafetensorsCheckpoint:
    """See distinf.weights.Checkpoint."""

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        """Reads every file's header. Raises ValueError naming a file, and tensor, that is missing or damaged."""
        self.config = config
        self._directory = directory
        self._tensors, self._files = read_directory(directory)

    @property
    def identity(self) -> str:
        return "\n".join([json.dumps(self.config, sort_keys=True), *(file.identity for file in self._files)])

    def tensor(self, name: str) -> StoredTensor:
        """Raises ValueError naming the directory when there is none of this name."""
        bare = name.partition(".")[2]  # saved from the model without its head, as GPT-2's own files are
        if name not in self._tensors and bare in self._tensors:
            name = bare
        if name not in self._tensors:
            files = ", ".join(file.path.name for file in self._files)
            raise ValueError(f"{self._directory}: tensor {name!r} is missing from {files}")
        return self._tensors[name]

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._tensors

    def announce(self, name: str, rows: range) -> None:
        pass

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensor(name).shape

    def read(
        self, name: str, dtype: torch.dtype, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        return self._plain(name).read(rows, columns).to(dtype)

    def table(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self._plain(name).mapped().to(dtype)

    def _plain(self, name: str) -> StoredTensor:
        tensor = self.tensor(name)
        if tensor.dtype not in _PLAIN:
            raise tensor.fail(f"has dtype {tensor.dtype}; expected float64, float32, float16 or bfloat16")
        return tensor

    def stored(self, name: str) -> Format | None:
        return None

    def numbers(self, name: str, rows: range, columns: range) -> Numbers:
        raise NotImplementedError("nothing here is quantised")


def read_directory(directory: Path) -> tuple[dict[str, StoredTensor], list[RawFile]]:
    """Every tensor of a directory's safetensors files, and the files. Raises ValueError naming what is wrong."""
    index = directory / _INDEX
    files = _indexed_files(index) if index.is_file() else _found_files(directory)
    tensors: dict[str, StoredTensor] = {}
    opened = []
    for file_name, wanted in files.items():
        file = RawFile(directory / file_name)
        found = read_header(file)
        for name in wanted if wanted is not None else found:
            if name not in found:
                raise ValueError(f"{index}: tensor {name!r} is not in {file_name}")
            if name in tensors:
                raise found[name].fail(f"is also in {tensors[name].file.path.name}")
            tensors[name] = found[name]
        opened.append(file)
    return tensors, opened


def _found_files(directory: Path) -> dict[str, list[str] | None]:
    names = sorted(p.name for p in directory.glob("*.safetensors"))
    if not names:
        raise ValueError(f"{directory}: no .safetensors file; pickled weights (.bin) are not read, they can run code")
    return dict.fromkeys(names)


def _indexed_files(index: Path) -> dict[str, list[str] | None]:
    """File name -> its tensors. A name with a directory in it is refused: an index points beside itself."""
    content = load_json(index, index.read_bytes())
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: expected a JSON object with 'weight_map'")
    files: dict[str, list[str]] = {}
    for tensor, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or "\0" in file:
            raise ValueError(f"{index}: {file!r} is not the name of a file in this directory (tensor {tensor!r})")
        files.setdefault(file, []).append(tensor)
    return dict(files)


def read_header(file: RawFile) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises ValueError naming the file, and the tensor where it is one's fault."""
    start = file.head(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if length < 0 or length > min(file.size - 8, _MAX_HEADER_BYTES):
        what = f"{length} bytes" if length >= 0 else "none"
        raise ValueError(
            f"{file.path}: damaged or truncated safetensors file (header length: {what}, file: {file.size} bytes)"
        )
    content = load_json(file.path, file.head(8 + length)[8:])
    if not isinstance(content, dict):
        raise ValueError(f"{file.path}: damaged safetensors file (the header is no JSON object)")
    content.pop("__metadata__", None)
    return {name: _tensor(file, name, entry, 8 + length) for name, entry in content.items()}


def _tensor(file: RawFile, name: str, entry: Any, data_start: int) -> StoredTensor:
    def wrong(problem: str) -> ValueError:
        return ValueError(f"{file.path}: damaged or truncated safetensors file (tensor {name!r}: {problem})")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise wrong(f"dtype {dtype!r}, expected one of {', '.join(_DTYPES)}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise wrong("shape and data_offsets are no lists of whole numbers")
    nbytes, (begin, end) = math.prod(shape) * _DTYPES[dtype].itemsize, offsets
    if end - begin != nbytes or data_start + end > file.size:
        raise wrong(f"bytes {begin} to {end} of {file.size - data_start}, expected {nbytes} for {dtype} {shape}")
    return StoredTensor(file, name, _DTYPES[dtype], tuple(shape), data_start + begin)


def _whole_numbers(x: Any) -> bool:
    return isinstance(x, list) and all(type(i) is int and i >= 0 for i in x)


def load_json(path: Path, text: bytes) -> Any:
    """Raises ValueError naming the file when it is no JSON, or an object in it has a name twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]!r} is there twice")
        return content

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged or truncated JSON ({error})") from None
