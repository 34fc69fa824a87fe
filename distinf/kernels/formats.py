"""Weight formats: a dtype on the command line, and how its numbers are stored and multiplied."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Format:
    """How a linear's weight is kept. A quantised weight is scale * number + offset, rounded to nearest."""

    name: str
    bits: int  # of a number: 32, 16, 8 or 4
    digits: int = 0  # int8 digits of an activation: 1 is 8 bits, 2 are 15, finer than the bf16 it came from
    group: int = 0  # input features that share a scale; 0: all
    zero_points: bool = False  # an offset of its own for each scale; else zero is the middle of the grid
    scales: torch.dtype = torch.bfloat16  # of scales and offsets; another one only where a checkpoint brings its own

    @property
    def middle(self) -> int:
        """The number that stands for zero where there are no offsets."""
        return 1 << (self.bits - 1)

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of an [n, k] weight with its scales and offsets, the padding of the last panel left out."""
        if self.bits >= 16:
            return n * k * self.bits // 8
        groups = k // self.group if self.group else 1
        return n * (k * self.bits // 8 + groups * self.scales.itemsize * (1 + self.zero_points))

    def check_k(self, name: str, columns: range) -> None:
        """Raises ValueError when this rank's input features of a weight do not start and end on whole groups."""
        if self.group and (columns.start % self.group or len(columns) % self.group):
            raise ValueError(
                f"--group-size {self.group} does not divide the input features {columns.start} .. {columns.stop} "
                f"of {name!r} on this rank; expected a group size that does, or 0 for one scale a channel"
            )


FORMATS = {
    "fp32": Format("fp32", 32),
    "bf16": Format("bf16", 16),
    "int8": Format("int8", 8, digits=2),
    "w8a8": Format("w8a8", 8, digits=1),
    "int4": Format("int4", 4, digits=2, group=32),
}

GROUP_SIZES = (0, 32, 64, 128)


def parse_format(dtype: str, group_size: int | None, zero_points: bool) -> Format:
    """`--dtype`, `--group-size` (None: the format's own) and `--zero-points`. Raises ValueError naming the flag."""
    if dtype not in FORMATS:
        raise ValueError(f"--dtype {dtype!r} is unknown; expected one of {', '.join(FORMATS)}")
    known = FORMATS[dtype]
    if known.bits >= 16:
        return known
    if group_size is not None and group_size not in GROUP_SIZES:
        raise ValueError(f"--group-size {group_size}: expected one of {', '.join(map(str, GROUP_SIZES))}")
    return replace(known, group=known.group if group_size is None else group_size, zero_points=zero_points)


@dataclass(frozen=True)
class Numbers:
    """Rows of a weight [n, k] as a checkpoint has quantised them, for a Format with the same grid.

    A weight is scale * (number - middle), or with offsets scale * number + offset. The format's scale dtype holds
    scales and offsets without rounding.
    """

    number: torch.Tensor  # uint8 [n, k]
    scale: torch.Tensor  # fp32 [n, groups]
    offset: torch.Tensor | None = None  # fp32 [n, groups]

    def __len__(self) -> int:
        return len(self.number)

    def dequantised(self, form: Format) -> torch.Tensor:
        """fp32 [n, k]."""
        if not self.number.numel():
            return self.number.float()
        groups = self.number.float().unflatten(1, (self.scale.shape[1], -1))
        scale = self.scale[..., None]
        values = (groups - form.middle) * scale if self.offset is None else groups * scale + self.offset[..., None]
        flat: torch.Tensor = values.flatten(1)
        return flat


def stacked(parts: list[Numbers]) -> Numbers:
    """The rows of several, one below the other; all with offsets or none."""
    if len(parts) == 1:
        return parts[0]
    offsets = [p.offset for p in parts if p.offset is not None]
    return Numbers(
        torch.cat([p.number for p in parts]),
        torch.cat([p.scale for p in parts]),
        torch.cat(offsets) if offsets else None,
    )


def quantised(weight: torch.Tensor, form: Format) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[n, k] -> numbers [n, groups, group size] from 0 up, scales and offsets [n, groups, 1], all fp32.

    A weight is scale * number + offset: what csrc/pack.cpp packs, step by step.
    """
    groups = weight.float().unflatten(1, (-1, form.group)) if form.group else weight.float()[:, None]
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    last = 2**form.bits - 1
    if form.zero_points:
        scale, offset = ((high - low) / last).bfloat16().float(), low.bfloat16().float()
        steps = (groups - offset) * torch.where(scale != 0, 1 / scale, 0)
        return steps.round().clamp(0, last), scale, offset
    low, high = low.clamp(max=0), high.clamp(min=0)
    middle = form.middle
    if form.bits == 8:  # 255 of 256 steps, as many above zero as below
        scale, first = (torch.maximum(high, -low) / 127).bfloat16().float(), 1
    else:  # the larger side gets the extra step, by the sign of the scale
        scale, first = (torch.where(high > -low, high, low) / -8).bfloat16().float(), 0
    steps = groups * torch.where(scale != 0, 1 / scale, 0)
    return (middle + steps.round()).clamp(first, last), scale, -scale * middle


def quantise(weight: torch.Tensor, form: Format) -> torch.Tensor:
    """[n, k] -> the fp32 weight that the stored numbers stand for."""
    number, scale, offset = quantised(weight, form)
    return (scale * number + offset).flatten(1)


def quantise_activations(x: torch.Tensor, digits: int) -> torch.Tensor:
    """[T, k] -> what its digits stand for, fp32: a scale a row, 127 steps each way, or 16256 with two digits."""
    steps = 127 if digits == 1 else 16256
    most = x.float().abs().amax(-1, keepdim=True)
    return (x.float() * torch.where(most > 0, steps / most, 0)).round() * (most / steps)
