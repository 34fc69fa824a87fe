"""What a model is (ModelConfig) and how it is run (RunConfig): frozen, parsed once, checked with messages."""

from __future__ import annotations

import math
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
    max_positions: int = 0  # the checkpoint's max_position_embeddings, which some scalings start from


@dataclass(frozen=True)
class MoeConfig:
    """Feed-forward blocks of several experts, of which each token uses a few. See distinf.kernels.routing.Router."""

    layers: tuple[bool, ...]  # which have experts; the others have a plain feed-forward block
    n_experts: int
    top_k: int
    ffn: int  # of each expert
    shared_ffn: int = 0  # of the expert that all tokens use; 0: none
    shared_gate: bool = False  # whose result is weighted by a gate of its own
    sigmoid: bool = False
    choice_bias: bool = False
    normalise: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.top_k <= self.n_experts:
            raise ValueError(f"config: {self.top_k} experts a token of {self.n_experts}: expected 1 up to all")
        if self.n_experts % self.groups or not 0 < self.top_groups <= self.groups:
            raise ValueError(
                f"config: {self.n_experts} experts in {self.groups} groups, {self.top_groups} of them chosen: "
                "expected equal groups, and 1 up to all chosen"
            )


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    q_rank: int  # of the queries' compression; 0: none
    kv_rank: int  # elements of the latent vector of keys and values
    nope_dim: int  # of a query or key head: not rotated
    rope_dim: int  # of a query head, and of the one key for all heads: rotated
    v_dim: int  # of a value head
    pairs: bool = True  # neighbours rotate together; else i and i + rope_dim / 2


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder-only transformer, in the field's words; sizes are the whole model's.

    What most families share has no default; the rest is what some of them add, and off where it is left out.
    """

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
    rope: RopeConfig | None  # None: learned positions, or slopes
    tie_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()
    # Layers
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    layer_norm: bool = False  # LayerNorm instead of RMSNorm
    norm_shift: float = 0.0  # added to the weight of every norm (Gemma keeps w - 1)
    parallel_norms: int = 0  # 0: attention before the MLP; 1: beside it, behind one norm; 2: behind a norm each
    qk_norm: bool = False  # a norm of each query and key head
    act: str = "silu"  # of the feed-forward block; see Kernels.linear
    moe: MoeConfig | None = None
    # Attention
    mla: MlaConfig | None = None  # then n_kv_heads is 1 and head_dim that of the latent vector and the rotated key
    windows: tuple[int, ...] = ()  # of each layer: keys a token sees, itself included, 0: all; (): 0 everywhere
    local_rope: RopeConfig | None = None  # of the layers that have a window; None: like the others
    score_scale: float | None = None  # of q k^T; None: 1 / sqrt(head_dim)
    score_softcap: float = 0.0  # c: scores become c tanh(score / c); 0: as they are
    alibi_scale: float = 0.0  # of the heads' slopes (distinf.models.alibi); 0: none
    # The two ends
    embed_scale: float = 1.0
    unit_head: bool = False  # the head's rows are divided by their length
    logit_softcap: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hidden", "ffn", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"config: {name} is {getattr(self, name)}, expected a positive number")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"config: {self.n_heads} heads are not a multiple of {self.n_kv_heads} KV heads")
        if self.rope and (self.rope.dim % 2 or self.rope.dim > self.head_dim):
            raise ValueError(f"config: rotary dimension {self.rope.dim} is odd or above head_dim {self.head_dim}")

    def has_experts(self, layer: int) -> bool:
        """Whether this layer's feed-forward block is a mixture of experts."""
        return self.moe is not None and self.moe.layers[layer]

    def window(self, layer: int) -> int:
        """Keys that a token sees in this layer, itself included; 0: all."""
        return self.windows[layer] if self.windows else 0


DTYPES = ("auto", "fp32", "bf16", "int8", "w8a8", "int4")
KV_DTYPES = ("bf16", "int8")
KERNELS = ("auto", "native", "reference", "ipex")
ISAS = ("auto", "amx", "avx512", "avx2")
MEMBINDS = ("auto", "hbm", "off")
LOAD_FORMATS = ("auto", "dummy")


@dataclass(frozen=True)
class RunConfig:
    """Choices of one run, the same on every rank; `check` in cli and LLM has compared them across ranks."""

    dtype: str = "bf16"  # of the linears' weights; auto: as the checkpoint has them
    head_dtype: str | None = None  # of the head's; None: see head
    group_size: int | None = None  # input features that share a scale; None: the dtype's own
    zero_points: bool = False
    shares: PhaseShares = field(default_factory=lambda: PhaseShares.of([1]))
    devices: tuple[Device, ...] = (Device(),)  # of each rank
    kernels: str = "auto"
    isa: str = "auto"
    threads: int = 0  # per rank; 0: the cores that the rank is bound to
    load_format: str = "auto"
    expert_parallel: bool = False  # a rank has some experts whole, instead of columns of each
    capture: bool = True  # record the decode step once and replay it
    gpu_memory_gb: float | None = None  # most that the linears of a rank with a device may take; None: no limit
    gpu_stream_all: bool = False  # keep no weights on a GPU: the baseline of offloading
    kv_dtype: str = "bf16"  # of the KV cache: as computed (bf16, with --dtype fp32 fp32) or int8
    membind: str = "auto"  # memory policy: of the cores' NUMA node, of the nearest HBM, or not set
    timeout_s: float = 60  # longest wait for other ranks once the model is loaded

    def __post_init__(self) -> None:
        for flag, value, known in (
            ("--dtype", self.dtype, DTYPES),
            ("--head-dtype", self.head, DTYPES),
            ("--kernels", self.kernels, KERNELS),
            ("--isa", self.isa, ISAS),
            ("--load-format", self.load_format, LOAD_FORMATS),
            ("--kv-dtype", self.kv_dtype, KV_DTYPES),
            ("--membind", self.membind, MEMBINDS),
        ):
            if value not in known:
                raise ValueError(f"{flag} {value!r} is unknown; expected one of {', '.join(known)}")
        if (self.dtype == "fp32") != (self.head == "fp32"):
            raise ValueError(f"--head-dtype {self.head} and --dtype {self.dtype}: expected both or neither fp32")
        if self.kv_dtype == "int8" and self.dtype == "fp32":
            raise ValueError("--kv-dtype int8 and --dtype fp32: expected --kv-dtype bf16 or another --dtype")
        if self.gpu_memory_gb is not None and not self.gpu_memory_gb > 0:
            raise ValueError(f"--gpu-memory-gb {self.gpu_memory_gb}: expected a number above 0")
        if self.gpu_stream_all and all(device.kind != "cuda" for device in self.devices):
            raise ValueError("--gpu-stream-all is about a GPU; expected --device cuda with it")
        if self.devices and all(device.kind == "cuda" for device in self.devices) and self.kernels != "auto":
            raise ValueError(f"--kernels {self.kernels} is about ranks on CPUs; with --device cuda alone expected auto")
        if self.threads < 0:
            raise ValueError(f"--threads {self.threads}: expected 0 (all cores of the rank) or more")
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(f"--timeout {self.timeout_s}: expected a positive number of seconds")

    @property
    def head(self) -> str:
        """Dtype of the head's weights: as asked, else like the rest, but int8 beside w8a8.

        It takes the same bytes, and the head is multiplied by few rows: finer activations cost nothing there.
        """
        return self.head_dtype or ("int8" if self.dtype == "w8a8" else self.dtype)
