"""One file per model_type: config mapping, PARAMS split table, forward. Adding a model is adding a file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch

from distinf.comm import Group
from distinf.config import ModelConfig
from distinf.kernels import Kernels
from distinf.kernels.batch import Batch
from distinf.kv_cache import KVCache
from distinf.models.params import Param, Weights
from distinf.shard import Shard

# What families are made of.
_NOT_FAMILIES = {"alibi", "blocks", "decoder", "fields", "moe", "params", "rope"}


class Model(Protocol):
    """A rank's part of a model."""

    config: ModelConfig
    shard: Shard

    def batch(
        self, positions: torch.Tensor, sequence: torch.Tensor, block_table: torch.Tensor, lengths: torch.Tensor
    ) -> Batch:
        """Describe a step: int32 [T], int32 [T], int32 [B, max_blocks]; adds the rotary angles.

        `lengths` int32 [T]: tokens of each row's sequence that are known so far, which some angles depend on.
        """

    def forward(self, ids: torch.Tensor, batch: Batch, cache: KVCache, last: torch.Tensor | None) -> torch.Tensor:
        """ids int32 [T] -> fp32 logits [len(last), vocab_local] of the rows `last` (int64), or of all (None)."""


class Family(Protocol):
    """What a file in this folder defines."""

    def config_from_hf(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Map config.json's fields. Raises ValueError naming a field that is missing or not supported."""

    def params(self, config: ModelConfig) -> Sequence[Param]:
        """Every weight, where it is in the checkpoint, and how ranks split it."""

    def build(self, config: ModelConfig, shard: Shard, weights: Weights, kernels: Kernels, group: Group) -> Model:
        """The model around its loaded weights."""


def families() -> list[str]:
    """Known model types, read from the files here."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_FAMILIES)


def family(model_type: str) -> Family:
    """The family of a `model_type`. Raises ValueError listing the known ones."""
    if model_type not in families():
        raise ValueError(f"config: model_type {model_type!r} is unknown; expected one of {', '.join(families())}")
    return cast(Family, importlib.import_module(f"distinf.models.{model_type}"))
