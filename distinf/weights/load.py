"""Each rank's slices of a checkpoint into packed weights: nobody reads or holds the whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm

from distinf.config import ModelConfig
from distinf.kernels import Kernels
from distinf.layers import LinearWeight
from distinf.models.params import Cut, Param, Source, Weights, bias_name
from distinf.shard import Shard
from distinf.weights import Checkpoint


def load_weights(
    checkpoint: Checkpoint, params: Sequence[Param], config: ModelConfig, shard: Shard, rank: int, kernels: Kernels,
    progress: bool,
) -> Weights:  # fmt: skip
    """Read and pack this rank's part of every weight. Biases of row-parallel linears go to rank 0 alone.

    Raises ValueError naming the tensor when it is missing or its shape is not the config's. `progress`
    shows a bar on stderr.
    """
    _check_shapes(checkpoint, params)
    weights = Weights()
    for param in tqdm(params, desc="loading", unit="weight", leave=False, disable=not progress):
        if param.kind == "linear":
            weights.linears[param.name] = _linear(checkpoint, param, config, shard, rank, kernels)
        else:
            dtype = torch.float32 if param.kind == "vector" else kernels.act_dtype
            weights.tensors[param.name] = checkpoint.read(param.sources[0].name, dtype).contiguous()
    return weights


def _check_shapes(checkpoint: Checkpoint, params: Sequence[Param]) -> None:
    for param in params:
        for name, expected in param.shapes().items():
            if checkpoint.shape(name) != expected:
                raise ValueError(
                    f"tensor {name!r} has shape {list(checkpoint.shape(name))} but the config asks for {list(expected)}"
                )


def _linear(
    checkpoint: Checkpoint, param: Param, config: ModelConfig, shard: Shard, rank: int, kernels: Kernels
) -> LinearWeight:
    def cut(which: Cut | None) -> range | None:
        if which is None:
            return None
        unit = config.head_dim if which in ("q_heads", "kv_heads") else 1
        whole: range = getattr(shard, which)
        return range(whole.start * unit, whole.stop * unit)

    def part(source: Source) -> torch.Tensor:
        return checkpoint.read(source.name, kernels.act_dtype, cut(source.rows), cut(param.columns))

    def bias(source: Source) -> torch.Tensor:
        rows = cut(source.rows)
        whole = checkpoint.read(bias_name(source.name), torch.float32)
        return whole if rows is None else whole[rows.start : rows.stop]

    weight = kernels.pack(_stack([part(s) for s in param.sources]))
    has_bias = param.bias and (param.columns is None or rank == 0)
    return LinearWeight(weight, _stack([bias(s) for s in param.sources]).contiguous() if has_bias else None)


def _stack(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
