"""What a model is (ModelConfig) and how it is run (RunConfig): frozen, parsed once, checked with messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distinf.device import Device
from distinf.shard import PhaseShares


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base frequency, rotated part of a head, and the checkpoint's scaling entry, if any."""

    theta: float
    dim: int  # rotated elements of each head
    scaling: dict[str, Any] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder-only transformer, in the field's words; sizes are the whole model's."""

    model_type: str
    hidden: int
    ffn: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int  # context length, tokens
    norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    window: int = 0  # keys a token sees, itself included; 0: all
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("hidden", "ffn", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"config: {name} is {getattr(self, name)}, expected a positive number")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"config: {self.n_heads} heads are not a multiple of {self.n_kv_heads} KV heads")
        if self.rope.dim % 2 or self.rope.dim > self.head_dim:
            raise ValueError(f"config: rotary dimension {self.rope.dim} is odd or above head_dim {self.head_dim}")


DTYPES = ("fp32", "bf16", "int8", "w8a8", "int4")
KV_DTYPES = ("bf16", "int8")
KERNELS = ("auto", "native", "reference", "ipex")
ISAS = ("auto", "amx", "avx512", "avx2")
COMMS = ("auto", "single", "mpi", "shm", "shm+ccl", "ccl", "torch-ccl")
COMM_DTYPES = ("fp32", "bf16")
LOAD_FORMATS = ("auto", "dummy")


@dataclass(frozen=True)
class RunConfig:
    """Choices of one run, the same on every rank; `check` in cli and LLM has compared them across ranks."""

    dtype: str = "bf16"  # of the linears' weights
    head_dtype: str | None = None  # of the head's; None: like the rest
    group_size: int | None = None  # input features that share a scale; None: the dtype's own
    zero_points: bool = False
    shares: PhaseShares = field(default_factory=lambda: PhaseShares.of([1]))
    devices: tuple[Device, ...] = (Device(),)  # of each rank
    kernels: str = "auto"
    isa: str = "auto"
    threads: int = 0  # per rank; 0: the cores that the rank is bound to
    load_format: str = "auto"
    capture: bool = True  # record the decode step once and replay it
    gpu_memory_gb: float | None = None  # most that the weights of a rank with a device may take; None: all it has
    gpu_stream_all: bool = False  # keep no weights on a GPU: the baseline of offloading
    kv_dtype: str = "bf16"  # of the KV cache: as computed (bf16, with --dtype fp32 fp32) or int8

    def __post_init__(self) -> None:
        head_dtype = self.head_dtype or self.dtype
        for flag, value, known in (
            ("--dtype", self.dtype, DTYPES),
            ("--head-dtype", head_dtype, DTYPES),
            ("--kernels", self.kernels, KERNELS),
            ("--isa", self.isa, ISAS),
            ("--load-format", self.load_format, LOAD_FORMATS),
            ("--kv-dtype", self.kv_dtype, KV_DTYPES),
        ):
            if value not in known:
                raise ValueError(f"{flag} {value!r} is unknown; expected one of {', '.join(known)}")
        if (self.dtype == "fp32") != (head_dtype == "fp32"):
            raise ValueError(f"--head-dtype {head_dtype} and --dtype {self.dtype}: expected both or neither fp32")
        if self.kv_dtype == "int8" and self.dtype == "fp32":
            raise ValueError("--kv-dtype int8 and --dtype fp32: expected --kv-dtype bf16 or another --dtype")
        if self.gpu_memory_gb is not None and not self.gpu_memory_gb > 0:
            raise ValueError(f"--gpu-memory-gb {self.gpu_memory_gb}: expected a number above 0")
        if self.gpu_stream_all and all(device.kind != "cuda" for device in self.devices):
            raise ValueError("--gpu-stream-all is about a GPU; expected --device cuda with it")
        if self.threads < 0:
            raise ValueError(f"--threads {self.threads}: expected 0 (all cores of the rank) or more")
