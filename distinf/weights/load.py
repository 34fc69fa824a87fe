"""Each rank's slices of a checkpoint into packed weights: nobody reads or holds the whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from distinf.config import ModelConfig, RunConfig
from distinf.kernels import Kernels
from distinf.kernels.formats import FORMATS, Format, parse_format
from distinf.layers import LinearWeight
from distinf.models.params import Cut, Param, Source, Weights
from distinf.shard import Shard
from distinf.weights import Checkpoint
from distinf.weights.sources import read_bias, read_rows, stack


def load_weights(
    checkpoint: Checkpoint,
    params: Sequence[Param],
    cuts: Cuts,
    rank: int,
    kernels: Kernels,
    formats: Formats,
    progress: bool,
) -> Weights:
    """Read and pack this rank's part of every weight. Biases of row-parallel linears go to rank 0 alone.

    Raises ValueError naming the tensor when it is missing or its shape is not the config's. `progress` shows
    a bar on stderr.
    """
    _check_shapes(checkpoint, params)
    weights = Weights()
    for param in tqdm(params, desc="loading", unit="weight", leave=False, disable=not progress):
        if param.kind == "linear":
            weights.linears[param.name] = _linear(checkpoint, param, cuts, rank, kernels, formats.for_param(param))
        elif param.kind == "table":
            source = param.sources[0]
            rows, columns = (range(n) for n in source.features)
            table = read_rows(checkpoint, source, kernels.act_dtype, rows, columns)
            weights.tensors[param.name] = table.contiguous()
        else:
            vector = checkpoint.read(param.sources[0].name, torch.float32).contiguous()
            weights.tensors[param.name] = vector + param.shift if param.shift else vector
    return weights


def check_groups(params: Sequence[Param], cuts: Cuts, formats: Formats) -> None:
    """Raises ValueError when the input features of a linear on this rank are not whole groups of its format."""
    for param in params:
        if param.kind == "linear":
            formats.for_param(param).check_k(param.sources[0].name, cuts.columns(param))


def weight_bytes(params: Sequence[Param], cuts: Cuts, formats: Formats, act_dtype: torch.dtype) -> int:
    """Bytes that this rank's weights take in memory, scales left out."""
    total = 0
    for param in params:
        if param.kind == "linear":
            rows = sum(len(cuts.rows(source)) for source in param.sources)
            total += rows * len(cuts.columns(param)) * formats.for_param(param).bits // 8
        else:
            total += math.prod(param.sources[0].shape) * act_dtype.itemsize
    return total


@dataclass(frozen=True)
class Formats:
    """Weight formats of a run: most linears', and the head's."""

    body: Format
    head: Format

    @staticmethod
    def of(run: RunConfig) -> Formats:
        """From the flags. Raises ValueError naming one that is wrong."""
        group, zeros = run.group_size, run.zero_points
        return Formats(parse_format(run.dtype, group, zeros), parse_format(run.head, group, zeros))

    def for_param(self, param: Param) -> Format:
        """The format of a linear."""
        if param.exact and self.body.bits < 16:
            return FORMATS["bf16"]
        return self.head if param.name == "head" else self.body


def _check_shapes(checkpoint: Checkpoint, params: Sequence[Param]) -> None:
    for param in params:
        for name, expected in param.shapes().items():
            if checkpoint.shape(name) != expected:
                raise ValueError(
                    f"tensor {name!r} has shape {list(checkpoint.shape(name))} but the config asks for {list(expected)}"
                )


@dataclass(frozen=True)
class Cuts:
    """This rank's ranges of a checkpoint tensor's rows and columns."""

    config: ModelConfig
    shard: Shard

    def rows(self, source: Source) -> range:
        """Output features, counted in the source's part of its tensor."""
        return self._range(source.rows, source.features[0])

    def columns(self, param: Param) -> range:
        """Input features."""
        return self._range(param.columns, param.sources[0].features[1])

    def _range(self, cut: Cut | None, size: int) -> range:
        """This rank's part of `size` features, which are as many for each head, column or token of the cut."""
        if cut is None:
            return range(size)
        config = self.config
        whole = {"q_heads": config.n_heads, "kv_heads": config.n_kv_heads, "ffn": config.ffn, "vocab": config.vocab}
        if config.moe:
            whole |= {"expert_ffn": config.moe.ffn, "shared_ffn": config.moe.shared_ffn}
        unit, mine = size // whole[cut], getattr(self.shard, cut)
        return range(mine.start * unit, mine.stop * unit)


def _linear(
    checkpoint: Checkpoint, param: Param, cuts: Cuts, rank: int, kernels: Kernels, form: Format
) -> LinearWeight:
    columns = cuts.columns(param)
    parts = [read_rows(checkpoint, s, kernels.act_dtype, cuts.rows(s), columns) for s in param.sources]
    weight = kernels.pack(stack(parts), form)
    has_bias = param.bias and (param.columns is None or rank == 0)
    biases = [read_bias(checkpoint, s, cuts.rows(s)) for s in param.sources] if has_bias else []
    return LinearWeight(weight, stack(biases).contiguous() if has_bias else None, param.use)
