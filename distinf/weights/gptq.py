"""GPTQ in 4 bits, as AutoGPTQ and GPTQModel save it.

Of a linear [n, k] with groups of g input features:
  qweight int32 [k / 8, n]      eight input features in a word, lowest bits first
  qzeros  int32 [k / g, n / 8]  eight output features in a word; one less than the zero point, but in gptq_v2
  scales  fp16  [k / g, n]
  g_idx   int32 [k]             the group of each input feature
A weight is scale * (number - zero point). Frantar et al., arXiv 2210.17323.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distinf.kernels.formats import FORMATS
from distinf.weights.quantised import Grid, QuantisedCheckpoint, expect, finite, group_size, nibbles, whole_words

_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_SYMMETRIC_ZERO = 8


class GPTQCheckpoint(QuantisedCheckpoint):
    """See distinf.weights.Checkpoint. Input features that were reordered (desc_act) are dequantised: no kernel of ours
    takes groups that are not in order.
    """

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        """Raises ValueError naming a file that is damaged, or a setting that is not supported."""
        super().__init__(directory, config)
        settings = config["quantization_config"]
        bits, packing = settings.get("bits"), settings.get("checkpoint_format", "gptq")
        if bits != 4 or packing not in ("gptq", "gptq_v2"):
            raise ValueError(f"{directory}: GPTQ of {bits} bits, {packing!r}, is not supported; expected 4 and 'gptq'")
        self._group = group_size(directory, settings)
        self._symmetric = settings.get("sym", True) is True
        self._first_zero = 1 if packing == "gptq" else 0

    def find_grid(self, stem: str) -> Grid | None:
        if not self.has(f"{stem}.qweight"):
            return None
        packed = self.tensor(f"{stem}.qweight")
        if len(packed.shape) != 2:
            raise packed.fail(f"has shape {list(packed.shape)}; expected two dimensions")
        n, k = packed.shape[1], 8 * packed.shape[0]
        group = self._group or k
        if n % 8 or k % group:
            raise packed.fail(f"is of {n} x {k} weights; expected multiples of 8 and of the group size {group}")
        expect(packed, (torch.int32,), packed.shape)
        expect(self.tensor(f"{stem}.qzeros"), (torch.int32,), (k // group, n // 8))
        scales = expect(self.tensor(f"{stem}.scales"), _SCALES, (k // group, n))
        form = replace(
            FORMATS["int4"],
            group=0 if group == k else group,
            zero_points=not self._symmetric,
            # The product of a scale and a zero point needs more bits than a half has.
            scales=scales.dtype if self._symmetric else torch.float32,
        )
        return Grid(n, k, form, self._order(stem, k, group))

    def _order(self, stem: str, k: int, group: int) -> torch.Tensor | None:
        """The group of each input feature, None where they follow one another."""
        if not self.has(f"{stem}.g_idx"):
            return None
        tensor = expect(self.tensor(f"{stem}.g_idx"), (torch.int32,), (k,))
        order = tensor.read().long()
        if torch.equal(order, torch.arange(k) // group):
            return None
        if order.min() < 0 or order.max() >= k // group:
            raise tensor.fail(f"has groups {order.min()} to {order.max()}; expected 0 to {k // group - 1}")
        return order

    def integers(self, name: str, rows: range, columns: range) -> torch.Tensor:
        words, inside = whole_words(columns)
        packed = self.across(name.removesuffix(".weight"), "qweight", words, rows)
        return nibbles(packed.T)[:, inside].contiguous()

    def scales(self, name: str, rows: range, groups: range) -> tuple[torch.Tensor, torch.Tensor | None]:
        stem = name.removesuffix(".weight")
        tensor, zeros = self.tensor(f"{stem}.scales"), self.tensor(f"{stem}.qzeros")
        scale = finite(tensor, self.across(stem, "scales", groups, rows)).T
        _, inside = whole_words(rows)
        zero = nibbles(self.across(stem, "qzeros", groups, rows, per=8))[:, inside].T.float() + self._first_zero
        if not self._symmetric:
            return scale, -scale * zero
        if (zero != _SYMMETRIC_ZERO).any():
            raise zeros.fail(f"has zero points other than {_SYMMETRIC_ZERO}; the config says 'sym'")
        return scale, None
