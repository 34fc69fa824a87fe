"""Rotary angles (Su et al., arXiv 2104.09864), with the frequency scalings that checkpoints ask for."""

from __future__ import annotations

import math
from typing import Any

import torch

from distinf.config import RopeConfig

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def scaling_kind(rope: RopeConfig) -> str:
    """The scaling's name; "default" without one. Raises ValueError when it is not known."""
    scaling = rope.scaling or {}
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    kind = "longrope" if kind == "su" else kind  # its first name
    if kind not in SCALINGS:
        raise ValueError(f"config: rope_scaling {kind!r} is not supported; expected {', '.join(SCALINGS)}")
    return kind


class Rotary:
    """Rotations of one rope. Of some scalings the frequencies depend on how long a sequence is."""

    def __init__(self, rope: RopeConfig) -> None:
        """Raises ValueError for a scaling that is not known or lacks an entry, and where no rotation comes out."""
        self._rope = rope
        self._kind = scaling_kind(rope)
        self._scaling: dict[str, Any] = rope.scaling or {}
        try:
            self._factor = self._attention_factor()
            self._check_lists()
            found = self.frequencies(torch.ones(1, dtype=torch.int32))
        except KeyError as error:
            raise ValueError(f"config: rope_scaling {self._kind!r} lacks {error.args[0]!r}") from None
        if not (found.isfinite() & (found > 0)).all():
            raise ValueError(
                f"config: rope_theta {rope.theta:g} with rope_scaling {self._scaling} gives no frequencies above 0"
            )

    def __call__(self, positions: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 [T], and int32 [T] tokens of each row's sequence -> cos, sin fp32 [T, dim / 2]."""
        angles = positions[:, None].float() * self.frequencies(lengths)
        return angles.cos() * self._factor, angles.sin() * self._factor

    def frequencies(self, lengths: torch.Tensor) -> torch.Tensor:
        """fp32 [T, dim / 2], or [1, dim / 2] for all: rotation per position of each pair of elements.

        theta^(-2 i / dim), scaled if asked.
        """
        scaling = self._scaling
        if self._kind == "dynamic":
            return 1.0 / self._dynamic_theta(lengths)[:, None] ** self._exponent()
        frequencies = 1.0 / self._rope.theta ** self._exponent()[None]
        if self._kind == "linear":
            return frequencies / float(scaling["factor"])
        if self._kind == "llama3":
            return _llama3(frequencies, scaling)
        if self._kind == "yarn":
            return self._yarn(frequencies)
        if self._kind == "longrope":
            long, short = (torch.tensor(scaling[name]) for name in ("long_factor", "short_factor"))
            return frequencies / torch.where(lengths[:, None] > self._original_positions(), long, short)
        return frequencies

    def _check_lists(self) -> None:
        for name in ("long_factor", "short_factor") if self._kind == "longrope" else ():
            entries, pairs = len(self._scaling[name]), self._rope.dim // 2
            if entries != pairs:
                raise ValueError(f"config: rope_scaling {name!r} has {entries} entries, expected {pairs}")

    def _exponent(self) -> torch.Tensor:
        return torch.arange(0, self._rope.dim, 2, dtype=torch.float32) / self._rope.dim

    def _original_positions(self) -> int:
        """Context length that the model was trained with before it was stretched."""
        return int(self._scaling.get("original_max_position_embeddings") or self._rope.max_positions)

    def _stretch(self) -> float:
        """How many times longer the context is made."""
        factor = self._scaling.get("factor")
        return float(factor) if factor else self._rope.max_positions / self._original_positions()

    def _dynamic_theta(self, lengths: torch.Tensor) -> torch.Tensor:
        """Base that grows with the sequence, so that its slowest pair turns as far as it did in training."""
        factor, dim, trained = float(self._scaling["factor"]), self._rope.dim, self._rope.max_positions
        stretch = factor * lengths.clamp(min=trained) / trained - (factor - 1)
        return self._rope.theta * stretch.float() ** (dim / (dim - 2))

    def _yarn(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Peng et al., arXiv 2309.00071: pairs that turn more than beta_fast times in the trained context are kept,
        those below beta_slow turns are stretched, with a ramp over the pairs between.
        """
        scaling, dim = self._scaling, self._rope.dim

        def pair_that_turns(turns: float) -> float:
            wavelength = self._original_positions() / (turns * 2 * math.pi)
            return dim * math.log(wavelength) / (2 * math.log(self._rope.theta))

        low = pair_that_turns(float(scaling.get("beta_fast") or 32))
        high = pair_that_turns(float(scaling.get("beta_slow") or 1))
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 * (low == high)  # a step is a steep ramp
        stretched = ((torch.arange(dim // 2) - low) / (high - low)).clamp(0, 1)
        return frequencies / self._stretch() * stretched + frequencies * (1 - stretched)

    def _attention_factor(self) -> float:
        """What cos and sin are multiplied by, so that scores keep their spread in a longer context."""
        scaling = self._scaling
        if self._kind not in ("yarn", "longrope"):
            return 1.0
        if scaling.get("attention_factor") is not None:
            return float(scaling["attention_factor"])
        stretch = self._stretch()
        if self._kind == "longrope":
            return math.sqrt(1 + math.log(stretch) / math.log(self._original_positions())) if stretch > 1 else 1.0
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            return yarn_mscale(stretch, scaling["mscale"]) / yarn_mscale(stretch, scaling["mscale_all_dim"])
        return yarn_mscale(stretch, 1.0)


def yarn_mscale(stretch: float, mscale: float) -> float:
    """The attention temperature of arXiv 2309.00071, eq. 22, as checkpoints weigh it."""
    return 0.1 * mscale * math.log(stretch) + 1.0 if stretch > 1 else 1.0


def _llama3(frequencies: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1: long wavelengths stretched by `factor`, short ones kept, a linear ramp between."""
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = float(scaling["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / float(scaling["factor"]))
