"""Tiny checkpoints of every format, written from the formats' public definitions, with the matrices they stand for."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors.torch import save_file

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 256, 512, 4, 2, 96
CONFIG = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 1,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
KV = HIDDEN // HEADS * KV_HEADS
LINEARS = {
    "model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.k_proj": (KV, HIDDEN),
    "model.layers.0.self_attn.v_proj": (KV, HIDDEN),
    "model.layers.0.self_attn.o_proj": (HIDDEN, HIDDEN),
    "model.layers.0.mlp.gate_proj": (FFN, HIDDEN),
    "model.layers.0.mlp.up_proj": (FFN, HIDDEN),
    "model.layers.0.mlp.down_proj": (HIDDEN, FFN),
}

# One linear's tensors by what follows its name, and its matrix.
Linear = tuple[dict[str, torch.Tensor], torch.Tensor]


def write_directory(path: Path, quantisation: dict[str, Any], linear: Callable[[int, int], Linear]) -> dict[str, Any]:
    """A Llama directory whose linears `linear(n, k)` makes; the matrices by tensor name."""
    torch.manual_seed(0)
    tensors, matrices = {}, {}
    for stem, (n, k) in LINEARS.items():
        parts, matrix = linear(n, k)
        tensors |= {f"{stem}.{name}": tensor.contiguous() for name, tensor in parts.items()}
        matrices[f"{stem}.weight"] = matrix
    plain = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    norms = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
    plain |= {f"{norm}.weight": (HIDDEN,) for norm in norms}
    tensors |= {name: torch.randn(shape).bfloat16() for name, shape in plain.items()}
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": quantisation}))
    return matrices


def _pack_words(numbers: torch.Tensor) -> torch.Tensor:
    """[a, 8 b] numbers of 4 bits -> int32 [a, b], the first in the lowest bits."""
    words = sum(numbers.long()[:, i::8] << (4 * i) for i in range(8))
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def gptq(symmetric: bool, group: int = 64, act_order: bool = False, version: str = "gptq") -> Any:
    """quantization_config and a maker of linears."""
    config = {
        "quant_method": "gptq", "bits": 4, "group_size": group, "sym": symmetric, "desc_act": act_order,
        "checkpoint_format": version,
    }  # fmt: skip

    def linear(n: int, k: int) -> Linear:
        g = k if group == -1 else group
        number = torch.randint(16, (n, k))
        zero = torch.full((n, k // g), 8) if symmetric else torch.randint(1, 16, (n, k // g))
        scale = (torch.rand(n, k // g) * 0.02 + 0.001).half()
        g_idx = torch.arange(k) // g
        if act_order:
            g_idx = g_idx[torch.randperm(k)]
        parts = {
            "qweight": _pack_words(number).T,
            "qzeros": _pack_words((zero - int(version == "gptq")).T),
            "scales": scale.T,
            "g_idx": g_idx.int(),
        }
        return parts, scale.float()[:, g_idx] * (number - zero[:, g_idx])

    return config, linear


def awq(group: int = 64) -> Any:
    """quantization_config and a maker of linears."""
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(x: torch.Tensor) -> torch.Tensor:
        return _pack_words(x.unflatten(1, (-1, 8))[..., order].flatten(1))

    def linear(n: int, k: int) -> Linear:
        number, zero = torch.randint(16, (n, k)), torch.randint(16, (n, k // group))
        scale = (torch.rand(n, k // group) * 0.02 + 0.001).half()
        parts = {"qweight": words(number.T), "qzeros": words(zero.T), "scales": scale.T}
        spread = torch.arange(k) // group
        return parts, scale.float()[:, spread] * (number - zero[:, spread])

    return config, linear


def compressed(packing: str, group: int, activations: bool, scale_dtype: torch.dtype = torch.bfloat16) -> Any:
    """quantization_config and a maker of linears; group 0: one scale for an output feature."""
    bits = 4 if packing == "pack-quantized" else 8
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group" if group else "channel"}
    inputs = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"} if activations else None
    groups = {"group_0": {"weights": {**weights, "group_size": group or None}, "input_activations": inputs}}
    config = {"quant_method": "compressed-tensors", "format": packing, "config_groups": groups, "ignore": ["lm_head"]}

    def linear(n: int, k: int) -> Linear:
        half = 1 << (bits - 1)
        number = torch.randint(-half, half, (n, k))
        scale = (torch.rand(n, k // (group or k)) * 0.02 + 0.001).to(scale_dtype)
        parts = {"weight_scale": scale}
        if bits == 8:
            parts["weight"] = number.to(torch.int8)
        else:
            parts |= {"weight_packed": _pack_words(number + 8), "weight_shape": torch.tensor([n, k])}
        return parts, scale.float()[:, torch.arange(k) // (group or k)] * number

    return config, linear


def fp8(block: tuple[int, int] | None, scale_dtype: torch.dtype = torch.float32) -> Any:
    """quantization_config and a maker of linears; no block: one scale in all."""
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    if block:
        config |= {"weight_block_size": list(block)}
    return config, _floats(block, "weight_scale_inv", scale_dtype)


def compressed_fp8(strategy: str, block: tuple[int, int] | None = None) -> Any:
    """quantization_config and a maker of linears; `block` 0: all features."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    if strategy == "block" and block:
        weights["block_structure"] = list(block)
    groups = {"group_0": {"weights": weights, "input_activations": None}}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    return config, _floats(block, "weight_scale", torch.bfloat16)


def _floats(block: tuple[int, int] | None, name: str, scale_dtype: torch.dtype) -> Any:
    """A maker of linears of e4m3."""

    def linear(n: int, k: int) -> Linear:
        rows, columns = ((size or whole) for size, whole in zip(block or (0, 0), (n, k), strict=True))
        number = torch.randn(n, k).to(torch.float8_e4m3fn)
        scale = (torch.rand(-(-n // rows), -(-k // columns)) * 0.02 + 0.001).to(scale_dtype)
        spread = scale.float()[torch.arange(n) // rows][:, torch.arange(k) // columns]
        return {"weight": number, name: scale if block else scale.reshape(())}, number.float() * spread

    return linear


_GGUF_NAMES = {
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
    "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
    "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
    "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
}


def write_gguf(
    path: Path, kind: GGMLQuantizationType, rope_factors: np.ndarray | None = None
) -> dict[str, torch.Tensor]:
    """A llama GGUF whose linears have blocks of one type; the matrices by Hugging Face name, by the gguf package."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list(["a", "b", "c"])
    matrices = {}
    for stem, (n, k) in LINEARS.items():
        blocks = random_blocks(rng, n, k, kind)
        writer.add_tensor(f"{_GGUF_NAMES[stem]}.weight", blocks, raw_dtype=kind)
        values = torch.from_numpy(gguf.quants.dequantize(blocks, kind)).reshape(n, k)
        if stem.endswith(("q_proj", "k_proj")):  # pairs of neighbours turn together; in Hugging Face's order halves do
            values = values.unflatten(0, (-1, HIDDEN // HEADS // 2, 2)).transpose(1, 2).flatten(0, 2)
        matrices[f"{stem}.weight"] = values
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", rng.standard_normal((VOCAB, HIDDEN), dtype=np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return matrices


def random_blocks(rng: np.random.Generator, n: int, k: int, kind: GGMLQuantizationType) -> np.ndarray:
    """[n, bytes of a row]. Scales stand in the first or the last bytes of a block: no exponent there is full."""
    if kind == GGMLQuantizationType.F32:
        return rng.standard_normal((n, k), dtype=np.float32)
    if kind == GGMLQuantizationType.F16:
        return rng.standard_normal((n, k), dtype=np.float32).astype(np.float16)
    block, size = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(256, size=(n, k // block, size), dtype=np.uint8)
    blocks[..., :4] &= 0xBF
    blocks[..., -2:] &= 0xBF
    return blocks.reshape(n, -1)


def split_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and data."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_header(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    """The file of a header and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
