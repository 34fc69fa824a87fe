"""What a rank computes on: `--device` into one Device for each rank."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from math import isfinite
from typing import Any

KINDS = ("cpu", "cuda", "emulated")
PHASES = ("attention", "ffn", "vocab")


@dataclass(frozen=True)
class Device:
    """Of one rank. The numbers after `index` are those of an emulated one: see distinf.kernels.emulated."""

    kind: str = "cpu"
    index: int = 0  # of a cuda device on its host
    speed: float = 1.0  # GEMM speed, in ranks of `kind` cpu
    latency_us: float = 0.0  # added to every phase in which the rank has work
    link_gb_s: float = 0.0  # of what crosses to the device and back; 0: nothing has to cross
    read_gb_s: float = 0.0  # of the fastest rank of the emulated world; 0: measured while loading
    tflops: float = 0.0  # likewise

    def __str__(self) -> str:
        """As on the command line."""
        if self.kind != "emulated":
            return f"cuda:{self.index}" if self.kind == "cuda" else "cpu"
        return f"{self.kind}:" + ",".join(f"{key}={getattr(self, key):g}" for key in _EMULATED)


_EMULATED = ("speed", "latency_us", "link_gb_s", "read_gb_s", "tflops")


def parse_devices(texts: Sequence[str], world_size: int) -> tuple[Device, ...]:
    """`["1=emulated:speed=4,latency_us=25"]` -> one Device a rank; those that are not named are cpu.

    Each text is `[RANK=]cpu|cuda[:INDEX]|emulated[:KEY=NUMBER,...]`; without RANK the last rank is meant. Raises
    ValueError naming `--device` for anything else.
    """
    devices = [Device()] * world_size
    named: set[int] = set()
    for text in texts:
        rank, device = _parse(text, world_size)
        if rank in named:
            raise ValueError(f"--device {text!r}: rank {rank} has a device already")
        named.add(rank)
        devices[rank] = device
    if {"cuda", "emulated"} <= {device.kind for device in devices}:
        raise ValueError("--device cuda and --device emulated in one job: expected one or the other")
    return tuple(devices)


def check_gpus(devices: Sequence[Device], mates: Sequence[int]) -> None:
    """Raises ValueError when two of the ranks `mates`, which are on one host, have the same GPU."""
    owners: dict[int, int] = {}
    for rank in mates:
        device = devices[rank]
        if device.kind == "cuda" and owners.setdefault(device.index, rank) != rank:
            raise ValueError(
                f"--device: ranks {owners[device.index]} and {rank} of {os.uname().nodename} are both on {device}; "
                f"expected another one, such as {rank}=cuda:{device.index + 1}"
            )


def _parse(text: str, world_size: int) -> tuple[int, Device]:
    place, equals, rest = text.partition("=")
    if equals and place.strip().isdigit():
        rank = int(place)
    else:
        rank, rest = world_size - 1, text
    if rank >= world_size:
        raise ValueError(f"--device {text!r}: there are {world_size} ranks, 0 to {world_size - 1}")
    kind, colon, numbers = rest.partition(":")
    if kind not in KINDS:
        raise ValueError(f"--device {text!r}: expected [RANK=]{'|'.join(KINDS)}, such as 1=cuda:0 or emulated:speed=4")
    if kind == "cuda":
        if colon and not numbers.isdecimal():
            raise ValueError(f"--device {text!r}: {numbers!r} is no index of a GPU; expected a number, such as cuda:0")
        return rank, Device(kind, int(numbers or 0))
    known = _EMULATED if kind == "emulated" else ()
    return rank, Device(kind, **dict(_number(text, part, known) for part in filter(None, numbers.split(","))))


def _number(text: str, part: str, known: tuple[str, ...]) -> tuple[str, Any]:
    key, _, value = part.partition("=")
    if key not in known:
        raise ValueError(f"--device {text!r}: {key!r} is unknown; expected one of {', '.join(known) or 'none'}")
    try:
        number = float(value)
    except ValueError:
        number = -1
    if not isfinite(number) or number < 0 or (key == "speed" and number == 0):
        raise ValueError(
            f"--device {text!r}: {key} is {value!r}, expected a number {'above' if key == 'speed' else 'from'} 0"
        )
    return key, number


def device_rank(devices: Sequence[Device]) -> int:
    """The rank that `--gpu-fraction` is about: the only one that is no cpu. Raises ValueError naming the flag."""
    found = [rank for rank, device in enumerate(devices) if device.kind != "cpu"]
    if len(found) != 1:
        raise ValueError(f"--gpu-fraction is about one rank with a --device of its own; there are {len(found)}")
    return found[0]


def parse_fractions(text: str) -> tuple[Fraction, Fraction, Fraction]:
    """`"0.3"` or `"0.2,0.5,0"` -> of attention, ffn and vocab. Raises ValueError naming `--gpu-fraction`."""
    try:
        parts = [Fraction(part.strip()) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        parts = []
    if len(parts) not in (1, len(PHASES)) or not all(0 <= part <= 1 for part in parts):
        raise ValueError(
            f"--gpu-fraction {text!r}: expected a number from 0 to 1, or three for {', '.join(PHASES)}, or auto"
        )
    attention, ffn, vocab = parts * (3 // len(parts))
    return attention, ffn, vocab


def with_rates(devices: Sequence[Device], read_gb_s: float, tflops: float) -> tuple[Device, ...]:
    """The same with an emulated world's rates filled in where they were left open."""
    return tuple(
        replace(d, read_gb_s=d.read_gb_s or read_gb_s, tflops=d.tflops or tflops) if d.kind == "emulated" else d
        for d in devices
    )


assert set(_EMULATED) <= {field.name for field in fields(Device)}
