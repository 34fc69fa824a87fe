"""The Python API: a model on all ranks of the job. Every rank runs the same script and gets the same results."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from distinf import comm
from distinf import kernels as kernel_library
from distinf.comm import Group, InputError, agreed
from distinf.config import ModelConfig, RunConfig
from distinf.engine import Engine, Sequence
from distinf.kernels import Kernels
from distinf.kv_cache import KVCache
from distinf.memory import MemoryNeed, available_bytes, check_memory
from distinf.models import Model, family
from distinf.models.params import Weights
from distinf.placement import bind, describe, remote_memory
from distinf.sampling import SamplingParams
from distinf.shard import ShardPlan, parse_shares
from distinf.tokenizer import DEFAULT_MODEL, Tokenizer, find_model
from distinf.weights import Checkpoint, open_checkpoint
from distinf.weights.load import Cuts, Formats, check_groups, load_weights, weight_bytes


@dataclass(frozen=True)
class LoadedModel:
    """One rank's part of a model and what it computes with."""

    model: Model
    kernels: Kernels
    weights: Weights


@dataclass(frozen=True)
class Completion:
    """One prompt's result, the same on every rank."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str  # "" without a tokenizer
    finish_reason: str  # "stop" (end of sequence) or "length"
    token_times_s: list[float]  # of each token, since generation began


def load_model(
    checkpoint: Checkpoint,
    run: RunConfig,
    group: Group,
    kv_tokens: int = 0,
    progress: bool = False,
    notify: Callable[[str], None] = lambda line: None,
) -> LoadedModel:
    """Plan the shards, check that all ranks mean the same model and have room for it, and load this rank's part.

    `kv_tokens`: tokens of all sequences together that the KV cache will have to hold. `notify` is given lines
    for a person, the same on every rank: what each is bound to, and warnings. Raises InputError on every rank
    for anything that one of them cannot load.
    """
    known, config = agreed(group, lambda: _parse(checkpoint))
    _check_same(group, config, run)
    bound = bind(group, run.threads, run.membind, lambda p: kernel_library.load(run.kernels, run.isa, run.dtype, p))
    kernels = bound.kernels
    plan = agreed(group, lambda: shard_plan(config, run.shares))
    shard, params, show = plan.shards[group.rank], known.params(config), progress and group.rank == 0
    formats = agreed(group, lambda: Formats.of(run))
    cuts = Cuts(config, shard)
    agreed(group, lambda: check_groups(params, cuts, formats))
    sizes = config.n_layers, len(shard.kv_heads), config.head_dim, cache_dtype(run, kernels)
    need = MemoryNeed(
        weights=weight_bytes(params, cuts, formats, kernels.act_dtype),
        kv_cache=kv_tokens * KVCache.bytes_per_token(*sizes, latent=config.mla is not None),
        kv_tokens=kv_tokens,
    )
    needs, mates = group.all_gather_object(need), group.node_mates()
    agreed(group, lambda: check_memory([needs[mate] for mate in mates], available_bytes()))
    for line in [*describe(bound.bindings), *(f"warning: {text}" for text in bound.warnings)]:
        notify(line)
    weights = agreed(group, lambda: load_weights(checkpoint, params, cuts, group.rank, kernels, formats, show))
    for text in remote_memory(group, bound):
        notify(f"warning: {text}")
    return LoadedModel(known.build(config, shard, weights, kernels, group), kernels, weights)


def shard_plan(config: ModelConfig, shares: tuple[Fraction, ...]) -> ShardPlan:
    """Every rank's part of a model. Raises ValueError when there are more ranks than it has parts."""
    experts = (config.moe.ffn, config.moe.shared_ffn) if config.moe else (0, 0)
    return ShardPlan.build(config.n_heads, config.n_kv_heads, config.ffn, config.vocab, shares, *experts)


def cache_dtype(run: RunConfig, kernels: Kernels) -> torch.dtype:
    """What `--kv-dtype` means for these kernels: keys and values as they are computed, or int8."""
    return torch.int8 if run.kv_dtype == "int8" else kernels.act_dtype


def _parse(checkpoint: Checkpoint) -> tuple[Any, ModelConfig]:
    known = family(str(checkpoint.config["model_type"]))
    return known, known.config_from_hf(checkpoint.config)


def _check_same(group: Group, config: ModelConfig, run: RunConfig) -> None:
    """Raises InputError naming the first difference when a rank was started with other settings or another model."""
    mine = {
        **{f"model {k}": repr(v) for k, v in asdict(config).items()},
        **{k: repr(v) for k, v in asdict(run).items()},
    }
    first, *others = group.all_gather_object(mine)
    for rank, other in enumerate(others, start=1):
        for key, value in first.items():
            if other[key] != value:
                raise InputError(f"ranks disagree on {key}: {value} on rank 0, {other[key]} on rank {rank}")


class LLM:
    """A loaded model with its tokenizer. Under `mpirun -n N` each rank constructs it and calls the same methods."""

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        dtype: str = "bf16",
        head_dtype: str | None = None,
        group_size: int | None = None,
        zero_points: bool = False,
        shares: str | None = None,
        kernels: str = "auto",
        isa: str = "auto",
        threads: int = 0,
        load_format: str = "auto",
        kv_dtype: str = "bf16",
        config: str | None = None,
        num_layers: int | None = None,
        capture: bool = True,
        kv_tokens: int = 0,
        membind: str = "auto",
        group: Group | None = None,
        progress: bool = False,
        notify: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Load this rank's shard of `model`: a Hugging Face directory, a .gguf file, or an embedded model's name.

        `dtype` is fp32, bf16, int8, w8a8 or int4 (`head_dtype`: of the head, None: the same, int8 for w8a8);
        `group_size` and `zero_points` are those of the quantised ones. `kv_dtype` int8 halves the KV cache.
        `shares` is one number for each rank ("3,1"; None: equal). `load_format` "dummy" makes random weights
        of the shape in `config` (a config.json; None: the model's own), of `num_layers` layers when given.
        `capture` False runs decode steps eagerly instead of replaying a recorded one. With `kv_tokens`, the
        tokens of all sequences of a call together, a KV cache that does not fit is refused before loading.
        `membind` takes memory near the cores ("auto"), from the nearest HBM node ("hbm") or as the launcher left it
        ("off"). `progress` shows a loading bar on stderr; `notify` is given lines about the placement of all ranks.

        Raises InputError (a ValueError), on every rank, for anything that cannot be run as asked.
        """
        start = time.perf_counter()
        self.group = group or comm.init()
        world_size = self.group.world_size
        self.run = agreed(
            self.group,
            lambda: RunConfig(
                dtype,
                head_dtype,
                group_size,
                zero_points,
                parse_shares(shares, world_size),
                kernels,
                isa,
                threads,
                load_format,
                capture,
                kv_dtype,
                membind,
            ),
        )
        self._path = agreed(self.group, lambda: None if load_format == "dummy" and config else find_model(model))
        checkpoint = agreed(
            self.group,
            lambda: open_checkpoint(self._path or Path(), load_format, Path(config) if config else None, num_layers),
        )
        self.loaded = load_model(checkpoint, self.run, self.group, kv_tokens, progress, notify)
        self.engine = Engine(
            self.loaded.model, self.loaded.kernels, self.group, cache_dtype(self.run, self.loaded.kernels), capture
        )
        self._loaded_tokenizer: Tokenizer | None = None
        self.load_s = time.perf_counter() - start

    @property
    def config(self) -> ModelConfig:
        """The model's architecture."""
        return self.loaded.model.config

    def tokenize(self, text: str, chat: bool = False) -> list[int]:
        """Ids of a text on every rank; only rank 0 reads the tokenizer. Raises InputError without one."""
        ids = agreed(self.group, lambda: self._need_tokenizer().encode(text, chat) if self.group.rank == 0 else [])
        return list(self.group.broadcast_object(ids))

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, for rank 0; None when it has none. Loading it takes seconds."""
        try:
            return self._need_tokenizer()
        except ValueError:
            return None

    def _need_tokenizer(self) -> Tokenizer:
        if self._path is None:
            raise ValueError("random weights have no tokenizer; give --token-ids instead of text")
        if self._loaded_tokenizer is None:
            self._loaded_tokenizer = Tokenizer(self._path)
        return self._loaded_tokenizer

    def generate(
        self,
        prompts: str | list[str] | list[list[int]],
        params: SamplingParams | None = None,
        *,
        chat: bool = False,
        on_token: Callable[[Sequence], None] = lambda sequence: None,
    ) -> list[Completion]:
        """Complete every prompt, all in one batch; texts, or lists of token ids.

        `chat` puts each text into the checkpoint's chat template. `on_token` is called on every rank after
        each token. Raises InputError for prompts that the model cannot take.
        """
        params = params or SamplingParams()
        texts = [prompts] if isinstance(prompts, str) else prompts
        ids = [self.tokenize(p, chat) if isinstance(p, str) else list(p) for p in texts]
        agreed(self.group, lambda: self.engine.check(ids, params))
        tokenizer = self.tokenizer if self.group.rank == 0 else None  # loaded before the clock starts
        sequences = self.engine.generate(ids, params, on_token)
        decoded = [tokenizer.decode(s.generated) if tokenizer else "" for s in sequences]
        return [
            Completion(s.prompt, s.generated, text, s.finish_reason or "length", s.token_times_s)
            for s, text in zip(sequences, self.group.broadcast_object(decoded), strict=True)
        ]


def peak_rss_mb() -> float:
    """Most memory that this process has had resident, MB (1e6 bytes), by the kernel's account."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
