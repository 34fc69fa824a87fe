"""Weights as the native kernels have them."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from dataclasses import dataclass

import torch

from distinf.kernels.formats import Format, Numbers

with suppress(ImportError):  # extension.py says so
    from distinf.kernels import _native

_SCALES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class NativeWeight:
    """A packed [n, k] weight in the runtime's arena; csrc/weight.h has the layout."""

    n: int
    k: int
    packed: _native.Weight | None  # None: an empty shard
    gated: bool

    @property
    def columns(self) -> int:
        """Of the result."""
        return self.n // 2 if self.gated else self.n

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes if self.packed else 0

    def memory(self) -> memoryview:
        """The packed bytes themselves, writable; valid as long as the kernels live."""
        if self.packed is None:
            return memoryview(b"")
        return memoryview((ctypes.c_char * self.nbytes).from_address(self.packed.address)).cast("B")


class NativePacker:
    """See distinf.kernels.Packer."""

    def __init__(self, rt: _native.Runtime, n: int, k: int, form: Format, gated: bool) -> None:
        assert k % 2 == 0, f"k is {k}: pairs of bf16 are multiplied together"
        assert not gated or n % 2 == 0, n
        assert not form.group or k % form.group == 0, (k, form)
        self._form = form
        how = form.bits, form.digits, form.group, form.zero_points, getattr(_native.ScaleType, _SCALES[form.scales])
        self._weight = NativeWeight(n, k, rt.new_weight(n, k, *how, gated) if n and k else None, gated)

    def add(self, row: int, rows: torch.Tensor | Numbers, up: torch.Tensor | Numbers | None = None) -> None:
        assert (up is not None) == self._weight.gated
        self._add_half(row, rows, False)
        if up is not None:
            assert len(up) == len(rows)
            self._add_half(row, up, True)

    def _add_half(self, row: int, rows: torch.Tensor | Numbers, up: bool) -> None:
        to = self._weight
        assert row % 32 == 0 and row + len(rows) <= to.columns, (row, len(rows), to)
        if to.packed is None or not len(rows):
            return
        if isinstance(rows, Numbers):
            self._add_numbers(to.packed, row, rows, up)
            return
        assert rows.dtype in (torch.bfloat16, torch.float32), rows.dtype
        assert rows.stride(1) == 1 and rows.shape[1] == to.k, rows.shape
        assert self._form.scales == torch.bfloat16, "scales of another dtype are a checkpoint's own"
        to.packed.pack_rows(row, len(rows), rows.data_ptr(), rows.stride(0), rows.dtype == torch.float32, up)

    def _add_numbers(self, to: _native.Weight, row: int, rows: Numbers, up: bool) -> None:
        number, form = rows.number, self._form
        assert number.dtype == torch.uint8 and number.stride(1) == 1 and number.shape[1] == to.k, number.shape
        assert (rows.offset is not None) == form.zero_points, form
        scale = rows.scale.to(form.scales).contiguous()
        offset = rows.offset.to(form.scales).contiguous() if rows.offset is not None else None
        assert scale.shape == (len(rows), to.k // (form.group or to.k)), scale.shape
        addresses = scale.data_ptr(), offset.data_ptr() if offset is not None else 0
        to.pack_integers(row, len(rows), number.data_ptr(), number.stride(0), *addresses, up)

    def weight(self) -> NativeWeight:
        return self._weight
