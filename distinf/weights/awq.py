"""AWQ in 4 bits, as AutoAWQ saves it ("gemm").

Of a linear [n, k] with groups of g input features:
  qweight int32 [k, n / 8]      eight output features in a word, in the order 0 2 4 6 1 3 5 7 from the lowest bits
  qzeros  int32 [k / g, n / 8]  zero points, in the same order
  scales  fp16  [k / g, n]
A weight is scale * (number - zero point). Lin et al., arXiv 2306.00978.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distinf.kernels.formats import FORMATS
from distinf.weights.quantised import Grid, QuantisedCheckpoint, expect, finite, group_size, nibbles, whole_words

_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_PLACE = [0, 4, 1, 5, 2, 6, 3, 7]  # of output features 0 to 7 in a word


class AWQCheckpoint(QuantisedCheckpoint):
    """See distinf.weights.Checkpoint."""

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        """Raises ValueError naming a file that is damaged, or a setting that is not supported."""
        super().__init__(directory, config)
        settings = config["quantization_config"]
        found = settings.get("bits"), settings.get("version", "gemm"), settings.get("zero_point", True)
        if found != (4, "gemm", True):
            raise ValueError(f"{directory}: AWQ of {found} is not supported; expected (4, 'gemm', True)")
        self._group = group_size(directory, settings)

    def find_grid(self, stem: str) -> Grid | None:
        if not self.has(f"{stem}.qweight"):
            return None
        packed = self.tensor(f"{stem}.qweight")
        if len(packed.shape) != 2:
            raise packed.fail(f"has shape {list(packed.shape)}; expected two dimensions")
        n, k = 8 * packed.shape[1], packed.shape[0]
        group = self._group or k
        if k % group:
            raise packed.fail(f"is of {n} x {k} weights; expected a multiple of the group size {group}")
        expect(packed, (torch.int32,), packed.shape)
        expect(self.tensor(f"{stem}.qzeros"), (torch.int32,), (k // group, n // 8))
        expect(self.tensor(f"{stem}.scales"), _SCALES, (k // group, n))
        # The product of a scale and a zero point needs more bits than a half has.
        form = replace(FORMATS["int4"], group=0 if group == k else group, zero_points=True, scales=torch.float32)
        return Grid(n, k, form)

    def integers(self, name: str, rows: range, columns: range) -> torch.Tensor:
        return self._unpacked(name.removesuffix(".weight"), "qweight", rows, columns).contiguous()

    def scales(self, name: str, rows: range, groups: range) -> tuple[torch.Tensor, torch.Tensor | None]:
        stem = name.removesuffix(".weight")
        tensor = self.tensor(f"{stem}.scales")
        scale = finite(tensor, self.across(stem, "scales", groups, rows)).T
        return scale, -scale * self._unpacked(stem, "qzeros", rows, groups).float()

    def _unpacked(self, stem: str, part: str, rows: range, columns: range) -> torch.Tensor:
        """uint8 [rows, columns] of a tensor [columns, rows / 8]."""
        _, inside = whole_words(rows)
        numbers = nibbles(self.across(stem, part, columns, rows, per=8)).unflatten(1, (-1, 8))[..., _PLACE]
        in_order: torch.Tensor = numbers.flatten(1)[:, inside].T
        return in_order
