"""Weight formats: a dtype on the command line, and how its numbers are stored and multiplied."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Format:
    """How a linear's weight is kept. A quantised weight is scale * (number - zero), rounded to nearest."""

    name: str
    bits: int  # of a number: 32, 16, 8 or 4
    digits: int = 0  # int8 digits of an activation: 1 is 8 bits, 2 are 15, finer than the bf16 it came from
    group: int = 0  # input features that share a scale; 0: all
    zero_points: bool = False  # a zero of its own for each scale; else the middle of the grid

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


def quantised(weight: torch.Tensor, form: Format) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[n, k] -> numbers [n, groups, group size], scales and zeros [n, groups, 1], all fp32, none of them signed
    except scales: what csrc/pack.cpp packs, step by step.
    """
    groups = weight.float().unflatten(1, (-1, form.group)) if form.group else weight.float()[:, None]
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    last = 2**form.bits - 1
    if form.zero_points:
        scale = ((high - low) / last).bfloat16().float()
        zero = torch.where(scale > 0, half_away(-low / scale), 0).clamp(0, last)
    else:
        if form.bits == 8:
            scale = (torch.maximum(high, -low) / 127).bfloat16().float()
        else:  # the larger side gets the extra step, by the sign of the scale
            scale = (torch.where(high > -low, high, low) / -8).bfloat16().float()
        zero = torch.full_like(scale, 2.0 ** (form.bits - 1))
    inverse = torch.where(scale != 0, 1 / scale, 0)
    first = 1 if form.bits == 8 and not form.zero_points else 0
    return (zero + (groups * inverse).round()).clamp(first, last), scale, zero


def quantise(weight: torch.Tensor, form: Format) -> torch.Tensor:
    """[n, k] -> the fp32 weight that the stored numbers stand for."""
    number, scale, zero = quantised(weight, form)
    return (scale * (number - zero)).flatten(1)


def half_away(x: torch.Tensor) -> torch.Tensor:
    """C's lround: halves away from zero."""
    return (x.abs() + 0.5).floor() * x.sign()


def quantise_activations(x: torch.Tensor, digits: int) -> torch.Tensor:
    """[T, k] -> what its digits stand for, fp32: a scale a row, 127 steps each way, or 16256 with two digits."""
    steps = 127 if digits == 1 else 16256
    most = x.float().abs().amax(-1, keepdim=True)
    return (x.float() * torch.where(most > 0, steps / most, 0)).round() * (most / steps)
