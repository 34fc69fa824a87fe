"""config.json files of published models: every entry is understood, and the table has as many weights as they have."""

from __future__ import annotations

import math
from typing import Any

import pytest

from distinf.config import RopeConfig
from distinf.models import family

COMMON: dict[str, Any] = {
    "architectures": ["X"], "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0", "use_cache": True, "attention_dropout": 0.0, "tie_word_embeddings": False,
    "hidden_act": "silu",
}  # fmt: skip


def sizes(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, positions: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": positions,
    }  # fmt: skip


CHATGLM: dict[str, Any] = {
    "model_type": "chatglm", "auto_map": {"AutoConfig": "x"}, "add_bias_linear": False, "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
    "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "ffn_hidden_size": 13696,
    "fp32_residual_connection": False, "hidden_act": None, "hidden_dropout": 0.0, "hidden_size": 4096,
    "kv_channels": 128, "multi_query_attention": True, "multi_query_group_num": 2, "num_attention_heads": 32,
    "original_rope": True, "post_layer_norm": True, "pre_seq_len": None, "prefix_projection": False,
    "quantization_bit": 0, "rmsnorm": True,
}  # fmt: skip

# Model -> its entries besides COMMON, and its parameters in thousand million, the head counted once where it is tied.
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "Llama-3.1-8B": ({
        **sizes(4096, 14336, 32, 32, 8, 128256, 131072), "model_type": "llama", "attention_bias": False,
        "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"}}, 8.03),
    "Mistral-7B-v0.1": ({
        **sizes(4096, 14336, 32, 32, 8, 32000, 32768), "model_type": "mistral", "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": 4096}, 7.24),
    "Mixtral-8x7B-v0.1": ({
        **sizes(4096, 14336, 32, 32, 8, 32000, 32768), "model_type": "mixtral", "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2,
        "output_router_logits": False, "router_aux_loss_coef": 0.02}, 46.7),
    "Qwen2.5-7B": ({
        **sizes(3584, 18944, 28, 28, 4, 152064, 131072), "model_type": "qwen2", "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28,
        "use_mrope": False}, 7.62),
    "Qwen3-8B": ({
        **sizes(4096, 12288, 36, 32, 8, 151936, 40960), "model_type": "qwen3", "attention_bias": False,
        "head_dim": 128, "max_window_layers": 36, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1e6,
        "sliding_window": None, "use_sliding_window": False}, 8.19),
    "Qwen3-30B-A3B": ({
        **sizes(2048, 6144, 48, 32, 4, 151936, 40960), "model_type": "qwen3_moe", "attention_bias": False,
        "decoder_sparse_step": 1, "head_dim": 128, "max_window_layers": 48, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1e6,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False}, 30.5),
    "Qwen1.5-MoE-A2.7B": ({
        **sizes(2048, 5632, 24, 16, 16, 151936, 8192), "model_type": "qwen2_moe", "decoder_sparse_step": 1,
        "max_window_layers": 21, "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_experts": 60,
        "num_experts_per_tok": 4, "output_router_logits": False, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
        "use_sliding_window": False}, 14.3),
    "Phi-3.5-mini": ({
        **sizes(3072, 8192, 32, 32, 32, 32064, 131072), "model_type": "phi3", "attention_bias": False,
        "embd_pdrop": 0.0, "resid_pdrop": 0.0, "original_max_position_embeddings": 4096, "pad_token_id": 32000,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 262144,
        "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"}}, 3.82),
    "gemma-2-9b": ({
        **sizes(3584, 14336, 42, 16, 8, 256000, 8192), "model_type": "gemma2", "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096,
        "sliding_window_size": 4096, "tie_word_embeddings": None}, 9.24),
    "gemma-3-1b": ({
        **sizes(1152, 6912, 26, 4, 1, 262144, 32768), "model_type": "gemma3_text", "attention_bias": False,
        "attn_logit_softcapping": None, "cache_implementation": "hybrid", "final_logit_softcapping": None,
        "head_dim": 256, "hidden_act": None, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6, "tie_word_embeddings": None}, 1.00),
    "opt-6.7b": ({
        "model_type": "opt", "_remove_final_layer_norm": False, "activation_function": "relu", "dropout": 0.1,
        "do_layer_norm_before": True, "ffn_dim": 16384, "hidden_size": 4096, "init_std": 0.02, "layerdrop": 0.0,
        "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 1,
        "prefix": "</s>", "vocab_size": 50272, "word_embed_proj_dim": 4096, "tie_word_embeddings": None,
        "hidden_act": None}, 6.66),
    "gpt2": ({
        "model_type": "gpt2", "activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
        "resid_pdrop": 0.1, "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True}}, "tie_word_embeddings": None,
        "hidden_act": None}, 0.124),
    "pythia-6.9b": ({
        **sizes(4096, 16384, 32, 32, 32, 50432, 2048), "model_type": "gpt_neox", "hidden_act": "gelu",
        "layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.25, "use_parallel_residual": True,
        "num_key_value_heads": None}, 6.86),
    "falcon-7b": ({
        "model_type": "falcon", "alibi": False, "apply_residual_connection_post_layernorm": False, "bias": False,
        "hidden_dropout": 0.0, "hidden_size": 4544, "layer_norm_epsilon": 1e-5, "multi_query": True,
        "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32, "parallel_attn": True,
        "vocab_size": 65024, "tie_word_embeddings": None, "hidden_act": None}, 6.92),
    "falcon-40b": ({
        "model_type": "falcon", "alibi": False, "bias": False, "hidden_dropout": 0.0, "hidden_size": 8192,
        "layer_norm_epsilon": 1e-5, "multi_query": True, "new_decoder_architecture": True, "num_attention_heads": 128,
        "num_hidden_layers": 60, "num_kv_heads": 8, "parallel_attn": True, "vocab_size": 65024,
        "tie_word_embeddings": None, "hidden_act": None}, 41.3),
    "glm-4-9b-chat-hf": ({
        **sizes(4096, 13696, 40, 32, 2, 151552, 131072), "model_type": "glm", "attention_bias": True, "head_dim": 128,
        "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-7, "rope_theta": 10000.0,
        "eos_token_id": [151329, 151336, 151338]}, 9.40),
    "GLM-4-32B-0414": ({
        **sizes(6144, 23040, 61, 48, 2, 151552, 32768), "model_type": "glm4", "attention_bias": False,
        "head_dim": 128, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}, 32.6),
    "chatglm2-6b-32k": ({
        **CHATGLM, "_name_or_path": "THUDM/chatglm2-6b-32k", "layernorm_epsilon": 1e-5, "num_layers": 28,
        "padded_vocab_size": 65024, "rope_ratio": 50, "seq_length": 32768}, 6.24),
    "glm-4-9b-chat": ({
        **CHATGLM, "classifier_dropout": None, "eos_token_id": [151329, 151336, 151338],
        "layernorm_epsilon": 1.5625e-7, "num_hidden_layers": 40, "num_layers": 40, "padded_vocab_size": 151552,
        "rope_ratio": 500, "seq_length": 131072, "vocab_size": 151552}, 9.40),
    "Baichuan2-7B-Chat": ({
        **sizes(4096, 11008, 32, 32, 32, 125696, 4096), "model_type": "baichuan", "_from_model_config": True,
        "auto_map": {"AutoConfig": "x"}, "model_max_length": 4096, "rms_norm_eps": 1e-6, "z_loss_weight": 0,
        "num_key_value_heads": None, "pad_token_id": 0}, 7.51),
    "Baichuan2-13B-Chat": ({
        **sizes(5120, 13696, 40, 40, 40, 125696, 4096), "model_type": "baichuan", "_from_model_config": True,
        "auto_map": {"AutoConfig": "x"}, "max_position_embeddings": None, "model_max_length": 4096,
        "rms_norm_eps": 1e-6, "num_key_value_heads": None, "pad_token_id": 0}, 13.9),
    "falcon-rw-1b": ({
        "model_type": "falcon", "alibi": True, "apply_residual_connection_post_layernorm": False, "bias": True,
        "hidden_dropout": 0.0, "hidden_size": 2048, "layer_norm_epsilon": 1e-5, "multi_query": False,
        "new_decoder_architecture": False, "num_attention_heads": 32, "num_hidden_layers": 24, "parallel_attn": False,
        "vocab_size": 50304, "tie_word_embeddings": None, "hidden_act": None}, 1.31),
    "DeepSeek-V2-Lite": ({
        **sizes(2048, 10944, 27, 16, 16, 102400, 163840), "model_type": "deepseek_v2", "attention_bias": False,
        "aux_loss_alpha": 0.001, "first_k_dense_replace": 1, "kv_lora_rank": 512, "moe_intermediate_size": 1408,
        "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
        "num_experts_per_tok": 6, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000, "routed_scaling_factor": 1.0,
        "scoring_func": "softmax", "seq_aux": True, "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                         "original_max_position_embeddings": 4096, "type": "yarn"}}, 15.7),
    "DeepSeek-V3": ({
        **sizes(7168, 18432, 61, 128, 128, 129280, 163840), "model_type": "deepseek_v3", "attention_bias": False,
        "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 3, "kv_lora_rank": 512,
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8, "num_nextn_predict_layers": 1,
        "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "seq_aux": True, "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096, "type": "yarn"}}, 671.0),
}  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_model(model: str) -> None:
    entries, billions = PUBLISHED[model]
    hf = {**COMMON, **entries}
    known = family(hf["model_type"])
    shapes: dict[str, tuple[int, ...]] = {}
    for param in known.params(known.config_from_hf(hf)):
        shapes |= param.shapes()
    assert sum(map(math.prod, shapes.values())) / 1e9 == pytest.approx(billions, rel=0.006)


def test_both_sizes_of_baichuan2_have_a_head_of_unit_rows_and_the_larger_has_slopes() -> None:
    small, large = (
        family("baichuan").config_from_hf({**COMMON, **PUBLISHED[f"Baichuan2-{size}-Chat"][0]})
        for size in ("7B", "13B")
    )
    assert small.unit_head and small.rope and not small.alibi_scale
    assert large.unit_head and not large.rope and (large.alibi_scale, large.max_positions) == (1.0, 4096)


def test_rope_ratio_of_chatglm() -> None:
    """It multiplies the base, but divides ChatGLM2's positions."""
    interpolated, raised = (
        family("chatglm").config_from_hf({**COMMON, **PUBLISHED[name][0]}).rope
        for name in ("chatglm2-6b-32k", "glm-4-9b-chat")
    )
    assert interpolated == RopeConfig(10000.0, 64, {"rope_type": "linear", "factor": 50.0}, 32768)
    assert raised == RopeConfig(5e6, 64, None, 131072)


def test_rope_ratio_without_a_name_is_refused() -> None:
    hf = {**COMMON, **PUBLISHED["chatglm2-6b-32k"][0], "_name_or_path": "my/finetune"}
    with pytest.raises(
        ValueError, match=r"'rope_ratio' 50 means one thing in ChatGLM2 .* expected a name with chatglm2"
    ):
        family("chatglm").config_from_hf(hf)
    assert family("chatglm").config_from_hf({**hf, "rope_ratio": 1}).rope
    assert family("chatglm").config_from_hf({**hf, "_name_or_path": "a/chatglm3-6b-32k"}).rope == RopeConfig(
        500000.0, 64, None, 32768
    )


def test_the_first_chatglm_is_refused() -> None:
    hf = {**COMMON, "model_type": "chatglm", "position_encoding_2d": True, "inner_hidden_size": 16384}
    with pytest.raises(ValueError, match="config: position_encoding_2d True is not supported; expected False"):
        family("chatglm").config_from_hf(hf)
