"""The rows of a split table: which checkpoint tensors make a weight, and which ranges cut them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from distinf.layers import LinearWeight

# A range of Shard; head ranges are counted in head_dim elements.
Cut = Literal["q_heads", "kv_heads", "ffn", "vocab"]


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint: its Hugging Face name, its whole shape, and the range that cuts its rows."""

    name: str
    shape: tuple[int, ...]
    rows: Cut | None = None


@dataclass(frozen=True)
class Param:
    """One weight of the model.

    A `linear` stacks the rows (output features) of its sources and is packed. It is column-parallel when
    its sources' rows are cut, row-parallel when `columns` cuts its input. A `vector` is kept whole in fp32,
    a `table` (embedding) whole in act_dtype. `bias`: every source NAME.weight has a NAME.bias beside it.
    """

    name: str
    kind: Literal["linear", "vector", "table"]
    sources: tuple[Source, ...]
    columns: Cut | None = None
    bias: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and whole shape of every checkpoint tensor behind this weight, biases included."""
        shapes = {s.name: s.shape for s in self.sources}
        if self.bias:
            shapes |= {bias_name(s.name): s.shape[:1] for s in self.sources}
        return shapes


def bias_name(weight_name: str) -> str:
    """x.weight -> x.bias"""
    return weight_name.removesuffix("weight") + "bias"


@dataclass
class Weights:
    """This rank's loaded weights by Param.name."""

    linears: dict[str, LinearWeight] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one decode step reads: every linear once."""
        return sum(int(w.weight.nbytes) for w in self.linears.values())

    def gemm_flops(self, rows: int, last_rows: int) -> int:
        """Floating-point operations of a forward pass of `rows` tokens whose head sees `last_rows` of them."""
        per_row = {name: 2 * int(w.weight.n) * int(w.weight.k) for name, w in self.linears.items()}
        return rows * (sum(per_row.values()) - per_row["head"]) + last_rows * per_row["head"]
