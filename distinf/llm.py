"""The Python API: a model on all ranks of the job. Every rank runs the same script and gets the same results."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from distinf import comm, topology
from distinf import kernels as kernel_library
from distinf.comm import Group, InputError, agreed
from distinf.config import ModelConfig, RunConfig
from distinf.device import Device, device_rank, parse_devices, parse_fractions, with_rates
from distinf.engine import Engine, Sequence
from distinf.kernels import Kernels, Placement
from distinf.kernels.emulated import HEADROOM, emulated, measure_rates, world_rates
from distinf.kv_cache import KVCache
from distinf.memory import MemoryNeed, available_bytes, check_memory
from distinf.models import Model, family
from distinf.models.params import Weights
from distinf.sampling import SamplingParams
from distinf.shard import PhaseShares, ShardPlan, parse_shares
from distinf.tokenizer import DEFAULT_MODEL, Tokenizer, find_model
from distinf.weights import Checkpoint, open_checkpoint
from distinf.weights.load import Cuts, Formats, check_groups, load_weights, weight_bytes


@dataclass(frozen=True)
class LoadedModel:
    """One rank's part of a model and what it computes with."""

    model: Model
    kernels: Kernels
    weights: Weights
    devices: tuple[Device, ...]  # of all ranks; of emulated ones, with the rates in use


@dataclass(frozen=True)
class Completion:
    """One prompt's result, the same on every rank."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str  # "" without a tokenizer
    finish_reason: str  # "stop" (end of sequence) or "length"
    token_times_s: list[float]  # of each token, since generation began


def place(group: Group, threads: int) -> Placement:
    """Cores of this rank among the ranks of its node; `threads` 0 takes all of them."""
    cores = group.all_gather_object(topology.allowed_cores())
    mates = group.node_mates()
    return Placement(*topology.place([cores[m] for m in mates], mates.index(group.rank), threads))


def load_model(
    checkpoint: Checkpoint, run: RunConfig, group: Group, kv_tokens: int = 0, progress: bool = False
) -> LoadedModel:
    """Plan the shards, check that all ranks mean the same model and have room for it, and load this rank's part.

    `kv_tokens`: tokens of all sequences together that the KV cache will have to hold. Raises InputError on
    every rank for anything that one of them cannot load.
    """
    known, config = agreed(group, lambda: _parse(checkpoint))
    _check_same(group, config, run)
    placement = place(group, run.threads)
    kernels = agreed(group, lambda: load_kernels(run, group.rank, placement))
    formats = agreed(group, lambda: Formats.of(run))
    kernels, devices = on_device(kernels, run.devices, formats, group)
    plan = agreed(
        group, lambda: ShardPlan.build(config.n_heads, config.n_kv_heads, config.ffn, config.vocab, run.shares)
    )
    shard, params, show = plan.shards[group.rank], known.params(config), progress and group.rank == 0
    cuts = Cuts(config, shard)
    agreed(group, lambda: check_groups(params, cuts, formats))
    need = MemoryNeed(
        weights=weight_bytes(params, cuts, formats, kernels.act_dtype),
        kv_cache=kv_tokens
        * KVCache.bytes_per_token(config.n_layers, len(shard.kv_heads), config.head_dim, cache_dtype(run, kernels)),
        kv_tokens=kv_tokens,
    )
    linears = weight_bytes([p for p in params if p.kind == "linear"], cuts, formats, kernels.act_dtype)
    agreed(group, lambda: _check_device_memory(run, group.rank, linears, config.n_layers))
    needs, mates = group.all_gather_object(need), group.node_mates()
    agreed(group, lambda: check_memory([needs[mate] for mate in mates], available_bytes()))
    weights = agreed(group, lambda: load_weights(checkpoint, params, cuts, group.rank, kernels, formats, show))
    return LoadedModel(known.build(config, shard, weights, kernels, group), kernels, weights, devices)


def load_kernels(run: RunConfig, rank: int, placement: Placement) -> Kernels:
    """What a rank computes with, at its own speed. Raises ValueError where that cannot be had."""
    device = run.devices[rank]
    memory = 0.0 if run.gpu_stream_all else float("inf") if run.gpu_memory_gb is None else 1e9 * run.gpu_memory_gb
    gpu = device.index if device.kind == "cuda" else None
    return kernel_library.load(run.kernels, run.isa, run.dtype, placement, gpu, memory)


def on_device(
    kernels: Kernels, devices: tuple[Device, ...], formats: Formats, group: Group
) -> tuple[Kernels, tuple[Device, ...]]:
    """This rank's kernels at the pace of its device, and all devices with the rates in use. Collective."""
    worlds = [device for device in devices if device.kind == "emulated"]
    if not worlds:
        return kernels, devices
    if not all(device.read_gb_s and device.tflops for device in worlds):
        group.barrier()
        found = group.all_gather_object(measure_rates(kernels, formats.body))
        read_gb_s, tflops = (HEADROOM * min(rates) for rates in zip(*found, strict=True))
        devices = with_rates(devices, read_gb_s, tflops)
    return emulated(kernels, world_rates(devices)[group.rank]), devices


def cache_dtype(run: RunConfig, kernels: Kernels) -> torch.dtype:
    """What `--kv-dtype` means for these kernels: keys and values as they are computed, or int8."""
    return torch.int8 if run.kv_dtype == "int8" else kernels.act_dtype


def _check_device_memory(run: RunConfig, rank: int, nbytes: int, n_layers: int) -> None:
    """Raises ValueError when this rank's linears are too large for --gpu-memory-gb: on a GPU, those of one layer, since
    the rest is streamed; on an emulated device all of them.
    """
    kind = run.devices[rank].kind
    layer = nbytes / n_layers
    if run.gpu_memory_gb is not None and {"cpu": 0.0, "cuda": layer}.get(kind, nbytes) > 1e9 * run.gpu_memory_gb:
        raise ValueError(
            f"--gpu-memory-gb {run.gpu_memory_gb:g}: rank {rank}'s share takes {nbytes / 1e9:.3f} GB, "
            f"{layer / 1e9:.3f} GB a layer; expected a smaller --gpu-fraction, or auto"
        )


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


def _shares_and_devices(
    shares: str | PhaseShares | None,
    devices: list[str] | tuple[Device, ...],
    gpu_fraction: str | None,
    world_size: int,
) -> tuple[PhaseShares, tuple[Device, ...]]:
    """The flags --shares, --device and --gpu-fraction. Raises ValueError naming the one that is wrong."""
    on = devices if isinstance(devices, tuple) and devices else parse_devices([str(d) for d in devices], world_size)
    if isinstance(shares, PhaseShares):
        return shares, on
    of = PhaseShares.of(parse_shares(shares, world_size))
    if gpu_fraction is not None:
        of = of.with_device(device_rank(on), parse_fractions(gpu_fraction))
    return of, on


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
        shares: str | PhaseShares | None = None,
        devices: list[str] | tuple[Device, ...] = (),
        gpu_fraction: str | None = None,
        gpu_memory_gb: float | None = None,
        gpu_stream_all: bool = False,
        kernels: str = "auto",
        isa: str = "auto",
        threads: int = 0,
        load_format: str = "auto",
        kv_dtype: str = "bf16",
        config: str | None = None,
        num_layers: int | None = None,
        capture: bool = True,
        kv_tokens: int = 0,
        group: Group | None = None,
        progress: bool = False,
    ) -> None:
        """Load this rank's shard of `model`: a Hugging Face directory, a .gguf file, or an embedded model's name.

        `dtype` is fp32, bf16, int8, w8a8 or int4 (`head_dtype`: of the head, None: the same); `group_size`
        and `zero_points` are those of the quantised ones. `kv_dtype` int8 halves the KV cache. `shares` is one
        number for each rank ("3,1"; None: equal), or what the tuner found. `devices` are ranks that are no plain
        cpu ("1=emulated:speed=4": rank 1); `gpu_fraction` is what the one such rank takes ("0.3", or "0.2,0.5,0" of
        attention, FFN and vocabulary), the others sharing the rest, and `gpu_memory_gb` the most its weights may be
        (on a GPU the rest is streamed; with `gpu_stream_all` everything).

        `load_format` "dummy" makes random weights of the shape in `config` (a config.json; None: the model's own),
        of `num_layers` layers when given. `capture` False runs decode steps eagerly instead of replaying a recorded
        one. With `kv_tokens`, the tokens of all sequences of a call together, a KV cache that does not fit is
        refused before loading. `progress` shows a loading bar on stderr.

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
                *_shares_and_devices(shares, devices, gpu_fraction, world_size),
                kernels,
                isa,
                threads,
                load_format,
                capture,
                gpu_memory_gb,
                gpu_stream_all,
                kv_dtype,
            ),
        )
        self._path = agreed(self.group, lambda: None if load_format == "dummy" and config else find_model(model))
        checkpoint = agreed(
            self.group,
            lambda: open_checkpoint(self._path or Path(), load_format, Path(config) if config else None, num_layers),
        )
        self.loaded = load_model(checkpoint, self.run, self.group, kv_tokens, progress)
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
