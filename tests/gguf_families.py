"""Tiny models of every family in GGUF files, written as llama.cpp's converter does it, names and all."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

from tests.families import COMMON, DEEPSEEK, GPT2, LLAMA, LONGROPE, NEOX, QWEN_MOE, YARN, make

MIXTRAL = {**LLAMA, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}
SHARED = {**QWEN_MOE, "shared_expert_intermediate_size": 80}
FALCON = {**COMMON, "num_attention_heads": 6, "new_decoder_architecture": True}
DEEPSEEK_YARN = {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}

# case -> general.architecture, and a recipe of a model that such a file can hold.
CASES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "llama": ("llama", make("Llama", attention_bias=True, mlp_bias=True)),
    "llama linear": ("llama", make("Llama", tie_word_embeddings=True, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5})),
    "llama yarn": ("llama", make("Llama", rope_parameters=YARN)),
    "mixtral": ("llama", make("Mixtral", MIXTRAL)),
    "mixtral, old": ("llama", make("Mixtral", MIXTRAL)),
    "qwen2": ("qwen2", make("Qwen2")),
    "qwen3": ("qwen3", make("Qwen3", tie_word_embeddings=True)),
    "qwen2moe": ("qwen2moe", make("Qwen2Moe", SHARED)),
    "qwen3moe": ("qwen3moe", make("Qwen3Moe", QWEN_MOE, norm_topk_prob=True)),
    "gemma2": ("gemma2", make("Gemma2", query_pre_attn_scalar=20, sliding_window=40, attn_logit_softcapping=3.0, final_logit_softcapping=20.0, tie_word_embeddings=True)),
    "gemma3": ("gemma3", make("Gemma3Text", num_hidden_layers=6, query_pre_attn_scalar=20, sliding_window=40, tie_word_embeddings=True)),
    "phi3": ("phi3", make("Phi3", partial_rotary_factor=0.8, sliding_window=60)),
    "phi3 longrope": ("phi3", make("Phi3", head_dim=16, num_attention_heads=6, num_key_value_heads=2, rope_parameters=LONGROPE, original_max_position_embeddings=128)),
    "glm4": ("glm4", make("Glm4", partial_rotary_factor=0.5, attention_bias=True)),
    "gpt2": ("gpt2", make("GPT2", GPT2, "LMHeadModel")),
    "gptneox": ("gptneox", make("GPTNeoX", NEOX)),
    "gptneox sequential": ("gptneox", make("GPTNeoX", NEOX, use_parallel_residual=False, rotary_pct=0.5)),
    "falcon": ("falcon", make("Falcon", COMMON, ffn_hidden_size=176)),
    "falcon groups": ("falcon", make("Falcon", FALCON, num_kv_heads=2)),
    "falcon one norm": ("falcon", make("Falcon", FALCON, num_kv_heads=3, num_ln_in_parallel_attn=1)),
    "deepseek2": ("deepseek2", make("DeepseekV2", DEEPSEEK, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=4.0, rope_parameters=DEEPSEEK_YARN)),
    "deepseek2, old": ("deepseek2", make("DeepseekV2", DEEPSEEK, q_lora_rank=None)),
    "deepseek2, sigmoid": ("deepseek2", make("DeepseekV3", DEEPSEEK, n_group=4, topk_group=2, norm_topk_prob=True)),
}  # fmt: skip

_TOP = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "transformer.word_embeddings": "token_embd",
    "gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "embed_out": "output",
}  # fmt: skip
_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up",
    "mlp.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.gate.e_score_correction": "exp_probs_b",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output",
    "self_attention.query_key_value": "attn_qkv", "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down",
    "ln_attn": "attn_norm_2", "ln_mlp": "attn_norm",
}  # fmt: skip
for _shared in ("shared_expert", "shared_experts"):
    _LAYER |= {f"mlp.{_shared}.{p}_proj": f"ffn_{p}_shexp" for p in ("gate", "up", "down")}
_SANDWICH = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
_OF_ARCHITECTURE = {
    "gemma2": _SANDWICH,
    "gemma3": _SANDWICH,
    "glm4": {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"},
}
_PROJECTIONS = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "down_proj": "down", "up_proj": "up"}


def write(
    case: str, directory: Path, kind: Kind = Kind.F32, more: Callable[[gguf.GGUFWriter], None] = lambda _: None
) -> tuple[Path, Path]:
    """The directory of a case's model, and the GGUF file of the same, matrices of whole blocks in `kind`.

    `more` adds to the file.
    """
    architecture, recipe = CASES[case]
    source, path = directory / "hf", directory / "model.gguf"
    config = recipe(source).config
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        tensors |= converted(architecture, config, name, tensor.float())
    if case != "mixtral, old":
        tensors = stacked(tensors)
    absorbed = case in ("deepseek2", "deepseek2, sigmoid")
    if absorbed:
        tensors = in_two(tensors, config)
    writer = gguf.GGUFWriter(path, architecture)
    add_fields(writer, config)
    if architecture == "deepseek2":
        add_latent_fields(writer, config, absorbed)
    more(writer)
    if "longrope" in case:
        for which in ("long", "short"):
            tensors[f"rope_factors_{which}.weight"] = torch.tensor(LONGROPE[f"{which}_factor"])
    for name, tensor in tensors.items():
        data = tensor.contiguous().numpy()
        if kind != Kind.F32 and data.ndim > 1 and data.shape[-1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return source, path


def converted(architecture: str, config: Any, name: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor under the file's name, as the converter changes it."""
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    stem, _, kind = name.rpartition(".")
    heads, kv = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
        n = heads if stem.endswith("q_proj") else kv
        x = x.unflatten(0, (n, 2, -1)).transpose(1, 2).flatten(0, 2)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        x = x + 1
    if architecture == "gpt2" and kind == "weight" and re.search(r"\.c_(attn|proj|fc)$", stem):
        x = x.T
    if stem.endswith("query_key_value"):
        groups = heads if architecture == "gptneox" else config.num_kv_heads if config.new_decoder_architecture else 1
        parts = x.unflatten(0, (groups, heads // groups + 2, -1))
        x = torch.cat([part.flatten(0, 2) for part in (parts[:, :-2], parts[:, -2:-1], parts[:, -1:])])
    if stem in _TOP:
        return {f"{_TOP[stem]}.{kind}": x}
    layer, rest = re.fullmatch(r"\w+\.\w+\.(\d+)\.(.*)", stem).groups()
    if expert := re.fullmatch(r"\w+\.experts\.(\d+)\.(\w+)", rest):
        return {f"blk.{layer}.ffn_{_PROJECTIONS[expert[2]]}.{expert[1]}.{kind}": x}
    return {f"blk.{layer}.{({**_LAYER, **_OF_ARCHITECTURE.get(architecture, {})})[rest]}.{kind}": x}


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts' matrices of a layer in one tensor."""
    kept: dict[str, Any] = {}
    for name, x in tensors.items():
        if expert := re.fullmatch(r"(blk\.\d+\.ffn_\w+)\.(\d+)\.weight", name):
            kept.setdefault(f"{expert[1]}_exps.weight", {})[int(expert[2])] = x
        else:
            kept[name] = x
    return {k: torch.stack([v[e] for e in sorted(v)]) if isinstance(v, dict) else v for k, v in kept.items()}


def in_two(tensors: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """Latent attention's keys, transposed, and values of each head."""
    kept = {}
    for name, x in tensors.items():
        if ".attn_kv_b." in name:
            heads = x.unflatten(0, (config.num_attention_heads, -1))
            keys, values = heads.split([config.qk_nope_head_dim, config.v_head_dim], 1)
            kept[name.replace("kv_b", "k_b")] = keys.transpose(1, 2)
            kept[name.replace("kv_b", "v_b")] = values
        else:
            kept[name] = x
    return kept


def add_fields(w: gguf.GGUFWriter, config: Any) -> None:
    """What most converters write, each where the model has it."""
    hf = config.to_dict()
    rope = hf.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    ffn = hf.get("intermediate_size") or hf.get("ffn_hidden_size") or 4 * config.hidden_size
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(ffn)
    w.add_block_count(config.num_hidden_layers)
    w.add_head_count(config.num_attention_heads)
    w.add_context_length(2048 if config.model_type == "falcon" else config.max_position_embeddings)
    w.add_vocab_size(config.vocab_size)
    w.add_file_type(0)
    w.add_token_list(["a", "b", "c"])
    w.add_eos_token_id(198)
    kv = hf.get("num_key_value_heads")
    if config.model_type == "falcon":
        kv = config.num_kv_heads if config.new_decoder_architecture else 1
        w.add_tensor_data_layout("jploski")
    latent = config.model_type.startswith("deepseek")
    if kv and not latent:
        w.add_head_count_kv(kv)
    if not latent and (head_dim := hf.get("head_dim")):
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
        if config.model_type in ("phi3", "glm4", "llama", "mixtral"):
            w.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if config.model_type == "gpt_neox":
        head_dim = config.hidden_size // config.num_attention_heads
        w.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
        w.add_parallel_residual(config.use_parallel_residual)
    if eps := hf.get("rms_norm_eps"):
        w.add_layer_norm_rms_eps(eps)
    else:
        w.add_layer_norm_eps(hf.get("layer_norm_eps") or hf["layer_norm_epsilon"])
    if (window := hf.get("sliding_window")) and config.model_type in ("gemma2", "gemma3_text", "phi3"):
        w.add_sliding_window(window)
    if config.model_type == "gemma2":
        w.add_attn_logit_softcapping(config.attn_logit_softcapping)
        w.add_final_logit_softcapping(config.final_logit_softcapping)
    elif rope and config.model_type not in ("gpt_neox", "falcon"):  # those that have the usual base
        w.add_rope_freq_base(rope["rope_theta"])
    add_scaling(w, rope, config.max_position_embeddings)
    add_experts(w, hf)


def add_scaling(w: gguf.GGUFWriter, rope: dict[str, Any], max_positions: int) -> None:
    """Of rotations."""
    kind = rope.get("rope_type")
    if kind == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(rope["factor"])
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "mscale_all_dim" in rope:
            w.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        w.add_rope_scaling_orig_ctx_len(original)
        w.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(max_positions / original) / np.log(original))))


def add_experts(w: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    """Of mixtures."""
    if n := hf.get("num_local_experts") or hf.get("num_experts") or hf.get("n_routed_experts"):
        w.add_expert_count(n)
        w.add_expert_used_count(hf["num_experts_per_tok"])
    if ffn := hf.get("moe_intermediate_size"):
        w.add_expert_feed_forward_length(ffn)
    if ffn := hf.get("shared_expert_intermediate_size"):
        w.add_expert_shared_feed_forward_length(ffn)


def add_latent_fields(w: gguf.GGUFWriter, config: Any, absorbed: bool) -> None:
    """Of DeepSeek's models."""
    key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    if absorbed:
        w.add_head_count_kv(1)
        w.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        w.add_value_length(config.kv_lora_rank)
        w.add_key_length_mla(key)
        w.add_value_length_mla(value)
    else:
        w.add_head_count_kv(config.num_attention_heads)
        w.add_key_length(key)
        w.add_value_length(value)
    if config.q_lora_rank:
        w.add_q_lora_rank(config.q_lora_rank)
    w.add_kv_lora_rank(config.kv_lora_rank)
    w.add_rope_dimension_count(config.qk_rope_head_dim)
    w.add_leading_dense_block_count(config.first_k_dense_replace)
    w.add_expert_shared_count(config.n_shared_experts)
    w.add_expert_weights_scale(config.routed_scaling_factor)
    if (config.n_group or 1) > 1:
        w.add_expert_group_count(config.n_group)
        w.add_expert_group_used_count(config.topk_group)
    if config.model_type == "deepseek_v3":
        w.add_expert_weights_norm(config.norm_topk_prob)
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
