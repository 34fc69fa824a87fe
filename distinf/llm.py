"""The Python API: a model on all ranks of the job. Every rank runs the same script and gets the same results."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from distinf import __version__, comm
from distinf import kernels as kernel_library
from distinf.comm import LOADING_TIMEOUT_S, Group, InputError, agreed
from distinf.config import ModelConfig, RunConfig
from distinf.device import Device, check_gpus, device_rank, parse_devices, parse_fractions, with_rates
from distinf.engine import PREFILL_ROWS, Engine, Sequence
from distinf.kernels import Kernels, Placement, extension
from distinf.kernels.cuda import CudaKernels
from distinf.kernels.emulated import HEADROOM, emulated, measure_rates, world_rates
from distinf.kernels.formats import Format
from distinf.kernels.gpu import Gpu
from distinf.kernels.stream import check_limit
from distinf.memory import available_bytes, check_memory
from distinf.models import Model
from distinf.models.params import Weights
from distinf.placement import Bound, bind, describe, remote_memory
from distinf.plan import Plan, parse
from distinf.sampling import SamplingParams
from distinf.shard import PhaseShares, parse_shares
from distinf.tokenizer import DEFAULT_MODEL, Tokenizer, find_model
from distinf.weights import Checkpoint, open_checkpoint
from distinf.weights.load import Loader, load_weights
from distinf.weights.pack_cache import PackCache


@dataclass(frozen=True)
class LoadedModel:
    """One rank's part of a model and what it computes with."""

    model: Model
    kernels: Kernels
    weights: Weights
    plan: Plan
    devices: tuple[Device, ...]  # of all ranks; of emulated ones, with the rates in use


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
    pack_cache: Path | None = None,
) -> LoadedModel:
    """Plan the shards, check that all ranks mean the same model and have room for it, and load this rank's part.

    `kv_tokens`: tokens of all sequences together that the KV cache will have to hold. `notify` is given lines
    for a person, the same on every rank: what each is bound to, and warnings. `pack_cache`: a directory of
    packed shards, read where it has this one and written where not. Raises InputError on every rank for anything
    that one of them cannot load.
    """
    _, config = agreed(group, lambda: parse(checkpoint.config))
    _check_same(group, config, run)
    mates = group.node_mates()
    agreed(group, lambda: check_gpus(run.devices, mates))
    bound = bind_rank(run, group)
    plan = agreed(group, lambda: Plan.of(checkpoint, run))
    kernels, devices = on_device(bound.kernels, run.devices, plan.body_format, group)
    agreed(group, lambda: _check_device_memory(run, group.rank, plan.layer_bytes(group.rank, kernels.act_dtype)))
    needs = group.all_gather_object(plan.need(group.rank, kv_tokens, kernels.act_dtype))
    agreed(group, lambda: check_memory([needs[mate] for mate in mates], available_bytes()))
    slots = group.make_room(PREFILL_ROWS * config.hidden)  # after `bind`: near this rank's cores
    slow = [f"sums of a prefill go through in pieces: {slots}"] if slots else []
    on = [f"rank {rank} computes on {device}" for rank, device in enumerate(devices) if device.kind != "cpu"]
    for line in [*describe(bound.bindings), *on, *(f"warning: {text}" for text in [*bound.warnings, *slow])]:
        notify(line)
    cores = bound.bindings[group.rank].cores
    cache = agreed(group, lambda: _cache(pack_cache, checkpoint, plan, group.rank, kernels) if pack_cache else None)
    mine = plan.params_of(group.rank), plan.cuts(group.rank), group.rank
    loader = Loader(checkpoint, *mine, kernels, plan.formats, cores, cache)
    weights = agreed(group, lambda: load_weights(loader, progress and group.rank == 0))
    for text in remote_memory(group, bound):
        notify(f"warning: {text}")
    model = plan.family.build(config, plan.shards[group.rank], weights, kernels, group)
    return LoadedModel(model, kernels, weights, plan, devices)


def bind_rank(run: RunConfig, group: Group) -> Bound:
    """This rank's kernels, on its own cores. Collective.

    Where the launcher left ranks together, one that computes on a GPU takes one core of theirs.
    """
    load, on_gpu = partial(rank_kernels, run, group.rank), run.devices[group.rank].kind == "cuda"
    return bind(group, run.threads, run.membind, load, on_gpu)


def rank_kernels(run: RunConfig, rank: int, placement: Placement) -> Kernels:
    """What a rank computes with. Raises ValueError where that cannot be had."""
    device = run.devices[rank]
    if device.kind != "cuda":
        return kernel_library.load(run.kernels, run.isa, run.dtype, placement)
    act_dtype = torch.float32 if run.dtype == "fp32" else torch.bfloat16
    limit = None if run.gpu_memory_gb is None else 1e9 * run.gpu_memory_gb
    return CudaKernels(Gpu(device.index), act_dtype, len(placement.cpus), limit, run.gpu_stream_all)


def on_device(
    kernels: Kernels, devices: tuple[Device, ...], form: Format, group: Group
) -> tuple[Kernels, tuple[Device, ...]]:
    """This rank's kernels at the pace of its device, and all devices with the rates in use. Collective.

    Rates that the flags leave open are measured on weights of `form`.
    """
    worlds = [device for device in devices if device.kind == "emulated"]
    if not worlds:
        return kernels, devices
    if not all(device.read_gb_s and device.tflops for device in worlds):
        group.barrier()
        found = group.all_gather_object(measure_rates(kernels, form))
        read_gb_s, tflops = (HEADROOM * min(rates) for rates in zip(*found, strict=True))
        devices = with_rates(devices, read_gb_s, tflops)
    return emulated(kernels, world_rates(devices)[group.rank]), devices


def _cache(directory: Path, checkpoint: Checkpoint, plan: Plan, rank: int, kernels: Kernels) -> PackCache:
    """This rank's entry: the packed bytes are a function of what is in its key."""
    if kernels.name != "native":
        raise ValueError(f"--pack-cache needs the native kernels, but rank {rank} has {kernels.name}")
    made_of = (
        __version__,
        extension.build_id(),
        kernels.isa,
        checkpoint.identity,
        plan.shards[rank],
        plan.formats,
        plan.params_of(rank),
    )
    return PackCache(directory, "\n".join(map(str, made_of)))


def cache_dtype(run: RunConfig, kernels: Kernels) -> torch.dtype:
    """What `--kv-dtype` means for these kernels: keys and values as they are computed, or int8."""
    return torch.int8 if run.kv_dtype == "int8" else kernels.act_dtype


def _check_device_memory(run: RunConfig, rank: int, layer_bytes: list[int]) -> None:
    """Raises ValueError when the linears of a rank with a device are too large for --gpu-memory-gb: all together, or
    on a GPU, where they can be streamed, the buffers for that.
    """
    kind, nbytes = run.devices[rank].kind, sum(layer_bytes)
    if run.gpu_memory_gb is None or kind == "cpu" or run.gpu_stream_all:
        return
    if kind == "cuda":
        check_limit(layer_bytes, 1e9 * run.gpu_memory_gb)
    elif nbytes > 1e9 * run.gpu_memory_gb:
        raise ValueError(
            f"--gpu-memory-gb {run.gpu_memory_gb:g}: rank {rank}'s share takes {nbytes / 1e9:.3f} GB; "
            "expected a smaller --gpu-fraction, or auto"
        )


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
        expert_parallel: bool = False,
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
        timeout_s: float = comm.DEFAULT_TIMEOUT_S,
        kv_tokens: int = 0,
        membind: str = "auto",
        group: Group | None = None,
        progress: bool = False,
        notify: Callable[[str], None] = lambda line: None,
        pack_cache: str | None = None,
    ) -> None:
        """Load this rank's shard of `model`: a Hugging Face directory, a .gguf file, or an embedded model's name.

        `dtype` is auto (as the checkpoint has it), fp32, bf16, int8, w8a8 or int4 (`head_dtype`: of the head, None:
        the same, int8 for w8a8); `group_size` and `zero_points` are those of the quantised ones. `kv_dtype` int8
        halves the KV cache. `shares` is one number for each rank ("3,1"; None: equal), or what the tuner found.
        `expert_parallel` gives whole experts to ranks, by their FFN shares, instead of columns of each.
        `devices` are ranks that are no plain cpu ("1=cuda:0", "1=emulated:speed=4": rank 1); `gpu_fraction` is what the
        one such rank takes ("0.3", or "0.2,0.5,0" of attention, FFN and vocabulary), the others sharing the rest, and
        `gpu_memory_gb` the most that weights may take there: on a GPU the rest is streamed, with `gpu_stream_all`
        everything.

        `load_format` "dummy" makes random weights of the shape in `config` (a config.json; None: the model's own),
        of `num_layers` layers when given. `capture` False runs decode steps eagerly instead of replaying a recorded
        one. With `kv_tokens`, the tokens of all sequences of a call together, a KV cache that does not fit is refused
        before loading.

        A rank that keeps others waiting longer than `timeout_s` (ten minutes while loading and between two calls)
        ends the job. `membind` takes memory near the cores ("auto"), from the nearest HBM node ("hbm") or as the
        launcher left it ("off"). `progress` shows a loading bar on stderr; `notify` is given lines about the
        placement of all ranks. `pack_cache` is a directory where packed weights are kept from one start to the next.

        Raises InputError (a ValueError), on every rank, for anything that cannot be run as asked.
        """
        start = time.perf_counter()
        self.group = group or comm.init()
        world_size = self.group.world_size
        self.group.begin("loading", LOADING_TIMEOUT_S)
        of, on = agreed(self.group, lambda: _shares_and_devices(shares, devices, gpu_fraction, world_size))
        self.run = agreed(
            self.group,
            lambda: RunConfig(
                dtype=dtype, head_dtype=head_dtype, group_size=group_size, zero_points=zero_points, shares=of,
                devices=on, kernels=kernels, isa=isa, threads=threads, load_format=load_format, capture=capture,
                gpu_memory_gb=gpu_memory_gb, gpu_stream_all=gpu_stream_all, kv_dtype=kv_dtype, membind=membind,
                timeout_s=timeout_s, expert_parallel=expert_parallel,
            ),
        )  # fmt: skip
        self.group.timeout_s = timeout_s
        self._path = agreed(self.group, lambda: None if load_format == "dummy" and config else find_model(model))
        checkpoint = agreed(
            self.group,
            lambda: open_checkpoint(self._path or Path(), load_format, Path(config) if config else None, num_layers),
        )
        cache = Path(pack_cache) if pack_cache else None
        self.loaded = load_model(checkpoint, self.run, self.group, kv_tokens, progress, notify, cache)
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
        self.group.begin("reading the prompts", LOADING_TIMEOUT_S)  # rank 0 may load its tokenizer, or ask a person
        texts = [prompts] if isinstance(prompts, str) else prompts
        ids = [self.tokenize(p, chat) if isinstance(p, str) else list(p) for p in texts]
        tokenizer = self.tokenizer if self.group.rank == 0 else None  # loaded before the clock starts
        agreed(self.group, lambda: self.engine.check(ids, params))
        sequences = self.engine.generate(ids, params, on_token)
        decoded = [tokenizer.decode(s.generated) if tokenizer else "" for s in sequences]
        return [
            Completion(s.prompt, s.generated, text, s.finish_reason or "length", s.token_times_s)
            for s, text in zip(sequences, self.group.broadcast_object(decoded), strict=True)
        ]


def peak_rss_mb() -> float:
    """Most memory that this process has had resident, MB (1e6 bytes), by the kernel's account."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
