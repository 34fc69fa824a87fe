"""compressed-tensors, as LLM Compressor saves it: int8 ("int-quantized") and 4-bit numbers in words ("pack-quantized").

Of a linear [n, k] with groups of g input features (g = k: one scale for an output feature):
  weight        int8  [n, k]         or weight_packed int32 [n, k / 8]: number + 8, lowest bits first
  weight_scale  bf16, fp16 or fp32 [n, k / g]
A weight is scale * number. With 8-bit activations, whose scales are taken from each token, this is w8a8.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distinf.kernels.formats import FORMATS, Format
from distinf.weights.quantised import Grid, QuantisedCheckpoint, expect, finite, nibbles, whole_words

_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_BITS = {"int-quantized": 8, "naive-quantized": 8, "pack-quantized": 4}


class CompressedTensorsCheckpoint(QuantisedCheckpoint):
    """See distinf.weights.Checkpoint."""

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        """Raises ValueError naming a file that is damaged, or a setting that is not supported."""
        super().__init__(directory, config)
        self._form = _format(directory, config["quantization_config"])

    def find_grid(self, stem: str) -> Grid | None:
        if not self.has(f"{stem}.weight_scale"):
            return None
        for part in ("weight_zero_point", "weight_g_idx"):
            if self.has(f"{stem}.{part}"):
                raise self.tensor(f"{stem}.{part}").fail(
                    "is not supported; expected symmetric numbers, groups in order"
                )
        packed = self.tensor(f"{stem}.weight" if self._form.bits == 8 else f"{stem}.weight_packed")
        if len(packed.shape) != 2:
            raise packed.fail(f"has shape {list(packed.shape)}; expected two dimensions")
        n, k = packed.shape[0], packed.shape[1] * (1 if self._form.bits == 8 else 8)
        group = self._form.group or k
        if k % group:
            raise packed.fail(f"is of {n} x {k} weights; expected a multiple of the group size {group}")
        expect(packed, (torch.int8 if self._form.bits == 8 else torch.int32,), packed.shape)
        scale = expect(self.tensor(f"{stem}.weight_scale"), _SCALES, (n, k // group))
        return Grid(n, k, replace(self._form, group=0 if group == k else group, scales=scale.dtype))

    def integers(self, name: str, rows: range, columns: range) -> torch.Tensor:
        stem = name.removesuffix(".weight")
        if self._form.bits == 8:  # signed to unsigned
            return self.tensor(f"{stem}.weight").read(rows, columns).view(torch.uint8) ^ 128
        words, inside = whole_words(columns)
        return nibbles(self.tensor(f"{stem}.weight_packed").read(rows, words))[:, inside].contiguous()

    def scales(self, name: str, rows: range, groups: range) -> tuple[torch.Tensor, torch.Tensor | None]:
        tensor = self.tensor(f"{name.removesuffix('.weight')}.weight_scale")
        return finite(tensor, tensor.read(rows, groups)), None


def the_group(directory: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What its only group says of weights, and of input activations ({}: nothing).

    Raises ValueError naming a setting that is of another kind, or that changes what a linear computes.
    """

    def part(of: dict[str, Any], key: str) -> dict[str, Any]:
        value = of.get(key) or {}
        if not isinstance(value, dict):
            raise ValueError(f"{directory}: compressed-tensors {key} is {value!r}; expected an object")
        return value

    groups = part(settings, "config_groups")
    _check(directory, len(groups) == 1, "config_groups", "one group")
    _check(directory, not settings.get("transform_config"), "transform_config", "none")
    _check(directory, part(settings, "sparsity_config").get("format", "dense") == "dense", "sparsity_config", "dense")
    group = part(groups, next(iter(groups)))
    return part(group, "weights"), part(group, "input_activations")


def _check(directory: Path, ok: bool, what: str, expected: str) -> None:
    if not ok:
        raise ValueError(f"{directory}: compressed-tensors {what} is not supported; expected {expected}")


def _format(directory: Path, settings: dict[str, Any]) -> Format:
    """The format of every quantised linear. Raises ValueError naming the first setting that is not supported."""
    check, packing = partial(_check, directory), settings.get("format")
    check(isinstance(packing, str) and packing in _BITS, f"format {packing!r}", " or ".join(_BITS))
    bits = _BITS[str(packing)]
    weights, inputs = the_group(directory, settings)
    found = weights.get("num_bits"), weights.get("type"), weights.get("symmetric")
    check(found == (bits, "int", True), f"{packing} of {found}", f"({bits}, 'int', symmetric)")
    strategy, size = weights.get("strategy"), weights.get("group_size")
    check(strategy in ("channel", "group"), f"strategy {strategy!r}", "channel or group")
    check(strategy == "channel" or (type(size) is int and size > 0), f"group_size {size!r}", "a positive number")
    if inputs:
        found = bits, inputs.get("num_bits"), inputs.get("dynamic")
        check(found == (8, 8, True), f"activations of {found}", "8-bit weights with 8 bits, dynamic")
    name = "int4" if bits == 4 else "w8a8" if inputs else "int8"
    return replace(FORMATS[name], group=0 if strategy == "channel" else int(size or 0))
