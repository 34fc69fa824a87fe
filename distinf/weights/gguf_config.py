"""config.json of a GGUF file: the file's fields under the names that Hugging Face gives them.

A row of ARCHITECTURES for each family, with what llama.cpp's converter does to its tensors. Fields are those of the
`gguf` package's constants; where one is missing, what llama.cpp takes counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from distinf.weights.gguf_fields import GGUFFields
from distinf.weights.gguf_rope import Read, rope_entries


@dataclass(frozen=True)
class Architecture:
    """A family: its fields, and what has to be undone in its tensors."""

    model_type: str
    needed: Mapping[str, str]  # entry of config.json -> field, a number
    optional: Mapping[str, str] = field(default_factory=dict)  # left out where the field is
    constants: Mapping[str, Any] = field(default_factory=dict)  # entries that the file does not state
    present: Mapping[str, str] = field(default_factory=dict)  # entry -> tensor of the first layer that makes it true
    more: Callable[[GGUFFields], dict[str, Any]] | None = None
    rope: bool = True
    # Of each query and key head neighbours rotate together; Hugging Face has one half behind the other.
    interleaved: bool = False
    # All queries, all keys, all values; Hugging Face has those of a group (or head) together.
    qkv_apart: bool = False
    transposed: tuple[str, ...] = ()  # ends of names that Hugging Face keeps as [in, out]
    norm_shift: float = 0.0  # that norms have been given


_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_LLAMA = {**_SIZES, "rms_norm_eps": "attention.layer_norm_rms_epsilon"}
_HEADS = {"num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length"}
_MIXTRAL = {**_LLAMA, "num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_QWEN_MOE = {
    **_LLAMA,
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_QWEN_MOE_OPTIONAL = {**_HEADS, "norm_topk_prob": "expert_weights_norm"}
_DEEPSEEK = {
    **_LLAMA,
    "kv_lora_rank": "attention.kv_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_DEEPSEEK_OPTIONAL = {
    "q_lora_rank": "attention.q_lora_rank",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",  # early files have none: all experts compete, as in llama.cpp
    "topk_group": "expert_group_used_count",
}
_LAYER_NORM_EPS = "attention.layer_norm_epsilon"
_GATING_SOFTMAX, _GATING_SIGMOID = 1, 2  # expert_gating_func


def _gemma(file: GGUFFields, layers_of_27b: int) -> dict[str, Any]:
    """The scale of scores, which no field has: 1 / sqrt(head_dim), but hidden / heads in the models of 27 B."""
    wide = file.count("block_count") == layers_of_27b
    hidden, heads = file.count("embedding_length"), file.count("attention.head_count")
    return {"query_pre_attn_scalar": hidden // heads if wide else file.count("attention.key_length")}


def _gemma3(file: GGUFFields) -> dict[str, Any]:
    return {**_gemma(file, 62), "rope_local_base_freq": file.number("rope.freq_base_swa", 10000.0)}


def _gpt_neox(file: GGUFFields) -> dict[str, Any]:
    return {"use_parallel_residual": file.value("use_parallel_residual", True, (bool,))}


def _falcon(file: GGUFFields) -> dict[str, Any]:
    """The first design has one key head and one norm a layer; the second has groups, and a norm or two."""
    groups, two_norms = file.count("attention.head_count_kv", 1), "blk.0.attn_norm_2.weight" in file.tensors
    if groups == 1 and not two_norms:
        return {"multi_query": True}
    return {"new_decoder_architecture": True, "num_kv_heads": groups, "num_ln_in_parallel_attn": 1 + two_norms}


def _deepseek(file: GGUFFields) -> dict[str, Any]:
    """Heads' sizes. Where keys and values have a matrix each, the usual fields have the latent vectors' sizes."""
    usual = (file.count(f"attention.{x}_length") for x in ("key", "value"))
    key, value = (file.count(f"attention.{x}_length_mla", n) for x, n in zip(("key", "value"), usual, strict=True))
    file.count("attention.head_count_kv", 1)
    rotated = file.count("rope.dimension_count")
    if key <= rotated:
        raise ValueError(
            f"{file.path}: rotation of {rotated} elements of keys of {key} is not supported; expected fewer"
        )
    return {"qk_nope_head_dim": key - rotated, "v_head_dim": value}


def _deepseek_v2(file: GGUFFields) -> dict[str, Any]:
    grouped = file.number("expert_group_count", 1) > 1
    return {**_deepseek(file), "topk_method": "group_limited_greedy" if grouped else "greedy"}


_MIXTURE = Architecture("mixtral", _MIXTRAL, _HEADS, interleaved=True)
_DEEPSEEK_V3 = Architecture("deepseek_v3", _DEEPSEEK, _DEEPSEEK_OPTIONAL, more=_deepseek)

# general.architecture -> its family.
ARCHITECTURES = {
    "llama": Architecture(
        "llama",
        _LLAMA,
        _HEADS,
        present={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_gate.bias"},
        interleaved=True,
    ),
    "qwen2": Architecture("qwen2", _LLAMA, _HEADS),
    "qwen3": Architecture("qwen3", _LLAMA, _HEADS, present={"attention_bias": "attn_q.bias"}),
    "qwen2moe": Architecture(
        "qwen2_moe",
        {**_QWEN_MOE, "shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
        _QWEN_MOE_OPTIONAL,
        {"norm_topk_prob": False},
        present={"qkv_bias": "attn_q.bias"},
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        _QWEN_MOE,
        _QWEN_MOE_OPTIONAL,
        {"norm_topk_prob": True},
        present={"attention_bias": "attn_q.bias"},
    ),
    "gemma2": Architecture(
        "gemma2",
        _LLAMA,
        {
            **_HEADS,
            "sliding_window": "attention.sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        {"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        more=lambda file: _gemma(file, 46),
        norm_shift=1.0,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        _LLAMA,
        {
            **_HEADS,
            "sliding_window": "attention.sliding_window",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        more=_gemma3,
        norm_shift=1.0,
    ),
    "phi3": Architecture("phi3", _LLAMA, {**_HEADS, "sliding_window": "attention.sliding_window"}),
    "glm4": Architecture("glm4", _LLAMA, _HEADS, present={"attention_bias": "attn_q.bias"}),
    "gpt2": Architecture(
        "gpt2",
        {
            "n_embd": "embedding_length",
            "n_inner": "feed_forward_length",
            "n_layer": "block_count",
            "n_head": "attention.head_count",
            "n_positions": "context_length",
            "layer_norm_epsilon": _LAYER_NORM_EPS,
        },
        rope=False,
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    ),
    "gptneox": Architecture(
        "gpt_neox",
        {**_SIZES, "layer_norm_eps": _LAYER_NORM_EPS},
        constants={"hidden_act": "gelu"},
        present={"attention_bias": "attn_qkv.bias"},
        more=_gpt_neox,
        qkv_apart=True,
    ),
    "falcon": Architecture(
        "falcon",
        {
            **{entry: field for entry, field in _SIZES.items() if entry != "intermediate_size"},
            "ffn_hidden_size": "feed_forward_length",
            "layer_norm_epsilon": _LAYER_NORM_EPS,
        },
        present={"bias": "attn_qkv.bias"},
        more=_falcon,
        qkv_apart=True,
    ),
    "deepseek2": Architecture("deepseek_v2", _DEEPSEEK, _DEEPSEEK_OPTIONAL, more=_deepseek_v2),
}

# Fields of an architecture that do not change what a forward pass computes, or that the tensors' shapes say.
_NO_EFFECT = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length"}


def architecture_of(file: GGUFFields) -> Architecture:
    """Raises ValueError naming the file, and the known ones, for another."""
    known = ARCHITECTURES.get(file.architecture)
    if known is None:
        raise ValueError(
            f"{file.path}: GGUF architecture {file.architecture!r} is not supported; "
            f"expected one of {', '.join(ARCHITECTURES)}"
        )
    gating = file.number("expert_gating_func", _GATING_SOFTMAX)
    if known.model_type == "deepseek_v2" and gating == _GATING_SIGMOID:
        return _DEEPSEEK_V3
    if gating != _GATING_SOFTMAX:
        raise ValueError(f"{file.path}: {file.name('expert_gating_func')} {gating} is not supported")
    return _MIXTURE if known.model_type == "llama" and file.number("expert_count", 0) else known


def hf_config(file: GGUFFields, architecture: Architecture, read: Read) -> dict[str, Any]:
    """The entries of config.json. Raises ValueError naming the file and a field that is wrong, or not understood."""
    config: dict[str, Any] = {"model_type": architecture.model_type, **architecture.constants}
    config |= {entry: file.positive(name) for entry, name in architecture.needed.items()}
    _check_sizes(file)
    config |= {entry: file.value(name) for entry, name in architecture.optional.items() if file.has(name)}
    config |= {entry: f"blk.0.{name}" in file.tensors for entry, name in architecture.present.items()}
    if architecture.more:
        config |= architecture.more(file)
    if architecture.rope:
        config |= rope_entries(file, *_rotated(file, architecture), read)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{file.path}: tensor 'token_embd.weight' is missing")
    ends = (file.value(f"tokenizer.ggml.{x}_token_id", None, (int,)) for x in ("eos", "eot"))
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["eos_token_id"] = list(dict.fromkeys(end for end in ends if end is not None))
    file.refuse_rest(_NO_EFFECT)
    return config


def _check_sizes(file: GGUFFields) -> None:
    """Raises ValueError for counts that the tensors do not bear out, before anything is made as often."""
    layers, experts = file.count("block_count"), file.number("expert_count", 0)
    if layers > len(file.tensors):
        raise ValueError(f"{file.path}: {layers} layers ({file.name('block_count')}), but {len(file.tensors)} tensors")
    routers = {tensor.shape[0] for name, tensor in file.tensors.items() if name.endswith(".ffn_gate_inp.weight")}
    if routers != ({experts} if experts else set()):
        found = " or ".join(map(str, sorted(routers))) or "no"
        raise ValueError(f"{file.path}: {experts} experts ({file.name('expert_count')}), but {found} in the tensors")
    if not file.value("attention.causal", True, (bool,)):
        raise ValueError(f"{file.path}: {file.name('attention.causal')} False is not supported; expected a decoder")


def _rotated(file: GGUFFields, architecture: Architecture) -> tuple[int, int]:
    """Elements of a head that rotate, and its elements. Raises ValueError for heads that are not supported."""
    if file.has("attention.kv_lora_rank"):
        rotated = file.count("rope.dimension_count")
        return rotated, rotated  # a part of its own
    hidden, heads = file.count("embedding_length"), file.count("attention.head_count")
    head_dim = file.count("attention.key_length", max(hidden // heads, 1))
    values, rotated = file.count("attention.value_length", head_dim), file.count("rope.dimension_count", head_dim)
    if values != head_dim or rotated > head_dim or (architecture.interleaved and rotated != head_dim):
        raise ValueError(
            f"{file.path}: rotation of {rotated} of {head_dim} elements, values of {values}, is not supported"
        )
    return rotated, head_dim
