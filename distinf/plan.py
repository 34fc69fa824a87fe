"""What each rank of a run will hold: known from config.json and the flags, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distinf.config import ModelConfig, RunConfig
from distinf.engine import PREFILL_ROWS
from distinf.kernels.formats import Format
from distinf.kv_cache import KVCache
from distinf.memory import MemoryNeed
from distinf.models import Family, family
from distinf.models.params import Param, by_layer
from distinf.shard import TILE, PhaseShares, Shard, ShardPlan
from distinf.weights import Checkpoint
from distinf.weights.load import Cuts, check_groups, formats_of, weight_bytes


@dataclass(frozen=True)
class Plan:
    """One model on the ranks of one run."""

    family: Family
    config: ModelConfig
    run: RunConfig
    params: Sequence[Param]
    formats: dict[str, Format]  # of each linear
    shards: tuple[Shard, ...]
    ffn_multiple: int  # of which ranges of FFN columns are

    @staticmethod
    def of(checkpoint: Checkpoint, run: RunConfig) -> Plan:
        """Raises ValueError for a model that is unknown, flags that are wrong, and ranks or groups that do not fit."""
        known, config = parse(checkpoint.config)
        params = known.params(config)
        formats = formats_of(run, params, checkpoint)
        # A group of a down projection's input features has to be on one rank.
        downs = [p.name for p in params if p.columns in ("ffn", "expert_ffn", "shared_ffn")]
        ffn_multiple = max([TILE, *(formats[name].group for name in downs)])
        shards = split_model(config, run.shares, ffn_multiple, run.expert_parallel)
        plan = Plan(known, config, run, params, formats, shards, ffn_multiple)
        for rank in range(len(shards)):
            check_groups(plan.params_of(rank), plan.cuts(rank), formats)
        return plan

    def params_of(self, rank: int) -> list[Param]:
        """The rows of the split table that a rank has a part of: all but other ranks' experts."""
        return [p for p in self.params if p.expert is None or p.expert in self.shards[rank].experts]

    def cuts(self, rank: int) -> Cuts:
        """A rank's ranges of the checkpoint's tensors."""
        return Cuts(self.config, self.shards[rank])

    def need(self, rank: int, kv_tokens: int, act_dtype: torch.dtype) -> MemoryNeed:
        """Memory of a rank with a KV cache of `kv_tokens`; the embedding table is counted whole."""
        config, kv_heads = self.config, len(self.shards[rank].kv_heads)
        cache_dtype = torch.int8 if self.run.kv_dtype == "int8" else act_dtype
        sizes = config.n_layers, kv_heads, config.head_dim, cache_dtype
        per_token = KVCache.bytes_per_token(*sizes, latent=config.mla is not None)
        weights = weight_bytes(self.params_of(rank), self.cuts(rank), self.formats, act_dtype)
        return MemoryNeed(weights, kv_tokens * per_token, kv_tokens)

    @property
    def body_format(self) -> Format:
        """Of the first layer's first split linear: what most of the model is in."""
        return next(self.formats[p.name] for p in self.params if p.columns is not None)

    def layer_bytes(self, rank: int, act_dtype: torch.dtype) -> list[int]:
        """What a rank multiplies with, layer by layer, the head last."""
        layers = by_layer([p for p in self.params_of(rank) if p.kind == "linear"])
        return [weight_bytes(layer, self.cuts(rank), self.formats, act_dtype) for layer in layers]

    def table_bytes(self, act_dtype: torch.dtype) -> int:
        """The embedding table: mapped from the file and shared by the ranks of a machine where it is in act_dtype."""
        tables = [p for p in self.params if p.kind == "table"]
        return weight_bytes(tables, self.cuts(0), self.formats, act_dtype)

    def workspace_bytes(self, rank: int, tokens: int, act_dtype: torch.dtype) -> int:
        """The widest activations of a prefill of `tokens`: the fp32 residual stream and what is added to it, and,
        in act_dtype, the normed rows with q, k, v and attention's result, or with gate, up and their product.
        Several ranks have two slots each for partial sums of a whole chunk besides, in shared memory, and their part
        of one for the node's sum.
        """
        shard, config, rows = self.shards[rank], self.config, min(tokens, PREFILL_ROWS)
        attention = 2 * (len(shard.q_heads) + len(shard.kv_heads)) * config.head_dim
        columns = len(shard.ffn)
        if config.moe:
            columns = max(columns, config.moe.top_k * len(shard.expert_ffn) + len(shard.shared_ffn))
        widest = config.hidden + max(attention, 3 * columns)
        ranks, slot = len(self.shards), PREFILL_ROWS * config.hidden * torch.float32.itemsize
        slots = (2 * ranks + 1) * slot // ranks if ranks > 1 else 0
        return rows * (2 * config.hidden * torch.float32.itemsize + widest * act_dtype.itemsize) + slots


def split_model(
    config: ModelConfig, shares: PhaseShares, ffn_multiple: int = TILE, expert_parallel: bool = False
) -> tuple[Shard, ...]:
    """Every rank's shard of a model; see ShardPlan.build. Raises ValueError when there are no experts to divide."""
    moe = config.moe
    if expert_parallel and not moe:
        raise ValueError(f"--expert-parallel: {config.model_type} models have no experts; expected a mixture of them")
    experts = (moe.n_experts, moe.ffn, moe.shared_ffn) if moe else (0, 0, 0)
    sizes = config.n_heads, config.n_kv_heads, config.ffn, config.vocab
    return ShardPlan.build(*sizes, shares, *experts, ffn_multiple, expert_parallel=expert_parallel).shards


def parse(hf: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """A model's family and architecture from config.json's fields. Raises ValueError naming what is not supported."""
    known = family(str(hf["model_type"]))
    return known, known.config_from_hf(hf)


@dataclass(frozen=True)
class RankReport:
    """What one rank will hold; bytes, and ranges of the whole model."""

    weights: int  # with its part of an embedding table that its machine's ranks share
    kv_cache: int
    workspace: int
    shard: Shard

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.workspace

    def sizes(self) -> dict[str, int]:
        """Bytes of each part and of all."""
        return {"weights": self.weights, "kv_cache": self.kv_cache, "workspace": self.workspace, "total": self.total}


def report(plan: Plan, kv_tokens: int, table_ranks: int) -> list[RankReport]:
    """Every rank's needs with a KV cache of `kv_tokens`; `table_ranks` share one embedding table."""
    act_dtype = torch.float32 if plan.run.dtype == "fp32" else torch.bfloat16
    table = plan.table_bytes(act_dtype)
    reports = []
    for rank, shard in enumerate(plan.shards):
        need = plan.need(rank, kv_tokens, act_dtype)
        weights = need.weights - table + table // table_ranks
        reports.append(RankReport(weights, need.kv_cache, plan.workspace_bytes(rank, kv_tokens, act_dtype), shard))
    return reports


def as_table(ranks: list[RankReport]) -> str:
    """For a person: GB (1e9 bytes), and first .. last of each range with its length."""

    def span(r: range) -> str:
        return f"{r.start} .. {r.stop - 1} ({len(r)})" if r else "none"

    names = {"q_heads": "query heads", "kv_heads": "KV heads", "ffn": "FFN columns", "vocab": "vocabulary"}
    names |= {"experts": "experts", "expert_ffn": "of an expert", "shared_ffn": "of the shared one"}
    parts = [part for part in names if any(getattr(r.shard, part) for r in ranks)]
    titles = ["rank", "weights", "KV cache", "workspace", "total GB", *(names[part] for part in parts)]
    rows = [
        [str(i), *(f"{n / 1e9:.1f}" for n in r.sizes().values()), *(span(getattr(r.shard, part)) for part in parts)]
        for i, r in enumerate(ranks)
    ]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    return "\n".join("  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in [titles, *rows])
