"""The rows of a split table: which checkpoint tensors make a weight, and which ranges cut them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from distinf.layers import LinearWeight

# A range of Shard.
Cut = Literal["q_heads", "kv_heads", "ffn", "vocab", "expert_ffn", "shared_ffn"]


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint, or a part of its rows: its Hugging Face name, whole shape, and the cut of its rows.

    Fused tensors keep several parts: the rows are `blocks` equal blocks, and `part` of each block is meant
    (query, key and value of each head behind one another are three parts of n_heads blocks).
    """

    name: str
    shape: tuple[int, ...]
    rows: Cut | None = None
    blocks: int = 1
    part: range | None = None  # None: the whole block
    transposed: bool = False  # kept as [in, out]
    across: bool = False  # the part of each block is used transposed: [blocks * in, len(part)]
    pairs: int = 0  # first elements of each head that rotate as (0, 1), (2, 3), ...: split into halves on loading
    head_dim: int = 0  # rows of a head, where `pairs` is given
    unit_rows: bool = False  # rows are divided by their length

    @property
    def features(self) -> tuple[int, int]:
        """Output and input features of the part."""
        out, into = self.shape[::-1] if self.transposed else self.shape
        if self.part is None:
            return out, into
        return (self.blocks * into, len(self.part)) if self.across else (self.blocks * len(self.part), into)

    def tensor_rows(self, rows: range) -> list[range]:
        """Where rows of the part lie in the tensor, in order."""
        if self.part is None or not rows:
            return [rows]
        out = self.shape[1] if self.transposed else self.shape[0]
        block, size, found = out // self.blocks, len(self.part), []
        row = rows.start
        while row < rows.stop:
            stop = min(rows.stop, (row // size + 1) * size)
            first = row // size * block + self.part.start + row % size
            found.append(range(first, first + stop - row))
            row = stop
        return found


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
    shift: float = 0.0  # added to a vector
    exact: bool = False  # a linear that is not quantised
    use: float = 1.0  # part of the tokens that pass through a linear
    gated: bool = False  # of a linear's two sources the first is the gate of the other: see Kernels.linear
    expert: int | None = None  # which of the layer's experts it belongs to; None: to none

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and whole shape of every checkpoint tensor behind this weight, biases included."""
        shapes = {s.name: s.shape for s in self.sources}
        if self.bias:
            shapes |= {bias_name(s.name): s.shape[1:] if s.transposed else s.shape[:1] for s in self.sources}
        return shapes


def by_layer(linears: Sequence[Param]) -> list[list[Param]]:
    """The linears of each layer, in the layers' order, then those outside of layers: the head."""
    layers: dict[float, list[Param]] = {}
    for p in linears:
        where, _, rest = p.name.partition(".")
        layers.setdefault(int(rest.split(".")[0]) if where == "layers" else math.inf, []).append(p)
    return [layers[i] for i in sorted(layers)]


def vector(name: str, source: str, size: int, shift: float = 0.0) -> Param:
    """A vector of `size` elements, such as a norm's weight."""
    return Param(name, "vector", (Source(source, (size,)),), shift=shift)


def layer_norm(name: str, source: str, size: int) -> list[Param]:
    """Weight and bias of a LayerNorm, whose names in the checkpoint begin with `source`."""
    return [vector(name, source + ".weight", size), vector(name + ".bias", source + ".bias", size)]


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
        """Bytes of weights that a decode step of one sequence reads: every linear once, of the experts those chosen."""
        return round(sum(int(w.weight.nbytes) * w.use for w in self.linears.values()))

    def gemm_flops(self, rows: int, last_rows: int) -> int:
        """Floating-point operations of a forward pass of `rows` tokens whose head sees `last_rows` of them."""
        per_row = {name: 2 * int(w.weight.n) * int(w.weight.k) * w.use for name, w in self.linears.items()}
        return round(rows * (sum(per_row.values()) - per_row["head"]) + last_rows * per_row["head"])
