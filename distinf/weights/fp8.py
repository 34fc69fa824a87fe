"""8-bit floats with scales, as DeepSeek and Qwen publish them ("fp8"), and compressed-tensors' "float-quantized".

Of a linear [n, k] with one scale for each block of b x c weights, cut at the edges (b = 1, c = k: one for an output
feature; b = n, c = k: one in all):
  weight                             fp8 [n, k], e4m3: 4 bits of exponent, 3 of mantissa, no infinity
  weight_scale_inv or weight_scale   fp32, bf16 or fp16 [ceil(n / b), ceil(k / c)]
A weight is scale * number. Scales of activations, which some files have too, are not used: ours keep their 16 bits.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distinf.weights.compressed_tensors import the_group
from distinf.weights.quantised import expect, finite
from distinf.weights.safetensors import SafetensorsCheckpoint, StoredTensor

_SCALE_NAMES = ("weight_scale_inv", "weight_scale")
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


class FP8Checkpoint(SafetensorsCheckpoint):
    """See distinf.weights.Checkpoint. No kernel of ours takes 8-bit floats: they are dequantised while loading."""

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        """Raises ValueError naming a file that is damaged, or a setting that is not supported."""
        super().__init__(directory, config)
        settings = config["quantization_config"]
        block = _fp8_block if settings["quant_method"] == "fp8" else _compressed_block
        self._block = block(directory, settings)

    def read(
        self, name: str, dtype: torch.dtype, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        tensor = self.tensor(name)
        if tensor.dtype != torch.float8_e4m3fn:
            return super().read(name, dtype, rows, columns)
        if len(tensor.shape) != 2:
            raise tensor.fail(f"has shape {list(tensor.shape)}; expected two dimensions")
        n, k = tensor.shape
        rows, columns = rows if rows is not None else range(n), columns if columns is not None else range(k)
        if not len(rows) or not len(columns):
            return torch.empty(len(rows), len(columns), dtype=dtype)
        values = tensor.read(rows, columns).float() * self._scales(tensor, rows, columns)
        if not values.isfinite().all():
            raise tensor.fail("has values that are not finite")
        return values.to(dtype)

    def table(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self.read(name, dtype) if self.tensor(name).dtype == torch.float8_e4m3fn else super().table(name, dtype)

    def _scales(self, tensor: StoredTensor, rows: range, columns: range) -> torch.Tensor:
        """fp32 [rows, columns]"""
        names = [tensor.name.removesuffix("weight") + name for name in _SCALE_NAMES]
        found = next((name for name in names if self.has(name)), None)
        if found is None:
            raise tensor.fail(f"has 8-bit floats; expected their scales in {' or '.join(map(repr, names))}")
        scale, (n, k) = self.tensor(found), tensor.shape
        sizes = self._block[0] or n, self._block[1] or k
        shape = -(-n // sizes[0]), -(-k // sizes[1])
        if len(scale.shape) < 2 and shape[1] == 1 and math.prod(scale.shape) == shape[0]:  # [n] or [] for [n, 1]
            scale = replace(scale, shape=shape)
        expect(scale, _SCALES, shape)
        row_blocks, row = _blocks(rows, sizes[0])
        column_blocks, column = _blocks(columns, sizes[1])
        return finite(scale, scale.read(row_blocks, column_blocks))[row][:, column]


def _blocks(elements: range, size: int) -> tuple[range, torch.Tensor]:
    """The blocks of `size` that hold `elements`, and for each element which of these it is in."""
    blocks = range(elements.start // size, (elements.stop - 1) // size + 1)
    return blocks, torch.arange(elements.start, elements.stop) // size - blocks.start


def _fp8_block(directory: Path, settings: dict[str, Any]) -> tuple[int, int]:
    """Output and input features that share a scale; 0: all. Raises ValueError naming a setting that is wrong."""
    if settings.get("fmt", "e4m3") != "e4m3":
        raise ValueError(f"{directory}: fp8 fmt {settings['fmt']!r} is not supported; expected 'e4m3'")
    block = settings.get("weight_block_size")
    return _block_of(directory, "weight_block_size", block) if block is not None else (0, 0)


def _compressed_block(directory: Path, settings: dict[str, Any]) -> tuple[int, int]:
    """See _fp8_block."""
    weights, _ = the_group(directory, settings)
    found = weights.get("num_bits"), weights.get("type"), weights.get("symmetric")
    strategy = weights.get("strategy")
    if found != (8, "float", True) or strategy not in ("tensor", "channel", "block"):
        raise ValueError(
            f"{directory}: compressed-tensors float-quantized of {found} by {strategy!r} is not supported; "
            "expected (8, 'float', symmetric) by tensor, channel or block"
        )
    if strategy == "block":
        return _block_of(directory, "block_structure", weights.get("block_structure"))
    return (1, 0) if strategy == "channel" else (0, 0)


def _block_of(directory: Path, name: str, block: Any) -> tuple[int, int]:
    if not isinstance(block, list) or len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
        raise ValueError(f"{directory}: {name} {block!r}; expected two positive numbers of features")
    return block[0], block[1]
