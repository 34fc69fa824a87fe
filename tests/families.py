"""A tiny random model of every family, made by transformers: a family without a recipe here fails its tests."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers.models.falcon import modeling_falcon

from distinf import LLM, SamplingParams
from distinf.config import ModelConfig
from distinf.engine import Decoder, Sequence

VOCAB = 199

# Three heads, widths that are no whole tile, three layers.
COMMON: dict[str, Any] = {
    "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "vocab_size": VOCAB,
    "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": VOCAB - 1, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA: dict[str, Any] = {**COMMON, "intermediate_size": 176, "num_key_value_heads": 1, "head_dim": 20}
QWEN_MOE: dict[str, Any] = {**LLAMA, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
DEEPSEEK: dict[str, Any] = {
    **COMMON, "intermediate_size": 176, "num_key_value_heads": 3, "q_lora_rank": 48, "kv_lora_rank": 64,
    "qk_nope_head_dim": 20, "qk_rope_head_dim": 12, "v_head_dim": 32, "n_routed_experts": 8, "n_shared_experts": 2,
    "num_experts_per_tok": 3, "moe_intermediate_size": 40, "first_k_dense_replace": 1,
}  # fmt: skip
FALCON_RW: dict[str, Any] = {"num_attention_heads": 6, "multi_query": False, "parallel_attn": False, "bias": True,
                             "alibi": True, "attn_implementation": "sdpa"}  # the eager one adds the slopes twice  # fmt: skip
NEOX: dict[str, Any] = {**COMMON, "intermediate_size": 176}
OPT: dict[str, Any] = {**COMMON, "ffn_dim": 176, "word_embed_proj_dim": 96, "tie_word_embeddings": True}
GPT2: dict[str, Any] = {"n_embd": 96, "n_head": 3, "n_layer": 3, "n_positions": 512, "vocab_size": VOCAB,
                        "bos_token_id": 0, "eos_token_id": VOCAB - 1}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128,
            "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}  # fmt: skip


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """The model with norms around their neutral value and everything else around zero, biases included."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            neutral = float(parameter.flatten()[0]) if parameter.dim() == 1 else 0.0  # 1, in Gemma 0; a bias: 0
            parameter.normal_(neutral, 0.2 if parameter.dim() == 1 else 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    return model.eval()


def make(name: str, base: dict[str, Any] = LLAMA, head: str = "ForCausalLM", **fields: Any) -> Callable[[Path], Any]:
    """Recipe of transformers' `name`, with these fields of its config besides those of `base`."""

    def recipe(directory: Path) -> Any:
        config = getattr(transformers, name + "Config")(**{"attn_implementation": "eager", **base, **fields})
        model = randomised(getattr(transformers, name.removesuffix("Text") + head)(config))
        model.save_pretrained(directory)
        return model

    return recipe


class NoRotation(nn.Module):
    """Cosines and sines of no angle."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(1, 1, 1), torch.zeros(1, 1, 1)


class Sloped(nn.Module):
    """A Llama of three heads with slopes instead of rotated heads."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        model.model.rotary_emb = NoRotation()

    def forward(self, ids: torch.Tensor) -> Any:
        positions = torch.arange(ids.shape[1])
        distance = positions - positions[:, None]
        slopes = 2.0 ** torch.tensor([-4, -8, -2])  # of two heads, and the first of four
        bias = (slopes[:, None, None] * distance).masked_fill(distance > 0, -math.inf)
        return self.model(ids, attention_mask=bias[None])


class ExactSlopes(nn.Module):
    """transformers rounds slope times position to bf16, which from 257 positions on is another model than trained."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> Any:
        rounded = modeling_falcon.build_alibi_tensor

        def exact(mask: torch.Tensor, n_heads: int, dtype: torch.dtype) -> torch.Tensor:
            slopes = rounded(torch.ones(1, 2, dtype=torch.long), n_heads, dtype)[..., 1:]  # powers of two
            return slopes * torch.arange(mask.shape[1])

        with mock.patch.object(modeling_falcon, "build_alibi_tensor", exact):
            return self.model(ids)


def falcon_rw(directory: Path) -> Any:
    return ExactSlopes(make("Falcon", COMMON, **FALCON_RW)(directory))


def baichuan_7b(directory: Path) -> Any:
    """No class of transformers': a Llama whose head's rows have length 1, written as Baichuan 2 keeps it."""
    model = baichuan(directory, {"max_position_embeddings": 512, "z_loss_weight": 0})
    model.lm_head.weight.data = nn.functional.normalize(model.lm_head.weight.data)
    return model


def baichuan_13b(directory: Path) -> Any:
    """The first release's."""
    return Sloped(baichuan(directory, {}))


def baichuan(directory: Path, entries: dict[str, Any]) -> Any:
    config = transformers.LlamaConfig(
        **{**LLAMA, "num_key_value_heads": 3, "head_dim": 32}, attn_implementation="eager"
    )
    model = randomised(transformers.LlamaForCausalLM(config))
    tensors = {k: v.clone() for k, v in model.state_dict().items()}  # the head's rows of any length
    for i in range(config.num_hidden_layers):
        attention = f"model.layers.{i}.self_attn."
        parts = [tensors.pop(f"{attention}{p}_proj.weight") for p in "qkv"]
        tensors[attention + "W_pack.weight"] = torch.cat(parts)
    save_file(tensors, directory / "model.safetensors")
    fields = {k: v for k, v in COMMON.items() if k not in ("tie_word_embeddings", "max_position_embeddings")}
    fields |= {"model_type": "baichuan", "intermediate_size": 176, "rms_norm_eps": config.rms_norm_eps,
               "hidden_act": "silu", "model_max_length": 512, **entries}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(fields))
    return model


def chatglm(directory: Path) -> Any:
    """No class of transformers': a GLM in ChatGLM's names."""
    rope = {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.5}
    config = transformers.GlmConfig(
        **{**LLAMA, "head_dim": 24}, attention_bias=True, rope_parameters=rope, attn_implementation="eager"
    )
    model = randomised(transformers.GlmForCausalLM(config))
    theirs = {
        "lm_head": "transformer.output_layer", "model.embed_tokens": "transformer.embedding.word_embeddings",
        "model.norm": "transformer.encoder.final_layernorm", "model.layers": "transformer.encoder.layers",
        "self_attn.o_proj": "self_attention.dense", "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h", "self_attn": "self_attention",
    }  # fmt: skip
    tensors = {}
    for name, tensor in model.state_dict().items():
        for ours, their in theirs.items():
            name = name.replace(ours, their)
        tensors[name] = tensor.clone()
    for i in range(config.num_hidden_layers):
        for kind in ("weight", "bias"):
            attention = f"transformer.encoder.layers.{i}.self_attention."
            parts = [tensors.pop(f"{attention}{p}_proj.{kind}") for p in "qkv"]
            tensors[f"{attention}query_key_value.{kind}"] = torch.cat(parts)
    save_file(tensors, directory / "model.safetensors")
    fields = {
        "model_type": "chatglm", "add_bias_linear": False, "add_qkv_bias": True, "ffn_hidden_size": 176,
        "hidden_size": 96, "kv_channels": 24, "layernorm_epsilon": config.rms_norm_eps, "multi_query_attention": True,
        "multi_query_group_num": 1, "num_attention_heads": 3, "num_layers": 3, "original_rope": True,
        "padded_vocab_size": VOCAB, "post_layer_norm": True, "rmsnorm": True, "rope_ratio": 5, "seq_length": 512,
        "tie_word_embeddings": False, "eos_token_id": VOCAB - 1,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(fields))
    return model


# model_type -> recipes by a name of their own: each writes a directory and returns the oracle.
RECIPES: dict[str, dict[str, Callable[[Path], Any]]] = {
    "llama": {
        "plain": make("Llama", attention_bias=True, mlp_bias=True),
        "linear": make("Llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
        "dynamic": make("Llama", max_position_embeddings=128,
                        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}),
        "llama3": make("Llama", rope_parameters={**LLAMA3, "rope_theta": 10000.0}, tie_word_embeddings=True),
        "yarn": make("Llama", rope_parameters=YARN),
    },
    "mistral": {"window": make("Mistral", sliding_window=50), "no window": make("Mistral", sliding_window=None)},
    "qwen2": {
        "plain": make("Qwen2"),
        "some windows": make("Qwen2", use_sliding_window=True, sliding_window=40, max_window_layers=1),
    },
    "qwen3": {"plain": make("Qwen3", tie_word_embeddings=True)},
    "gemma2": {"plain": make("Gemma2", query_pre_attn_scalar=24, sliding_window=40, attn_logit_softcapping=3.0,
                             final_logit_softcapping=20.0)},
    "gemma3_text": {
        "plain": make("Gemma3Text", num_hidden_layers=4, tie_word_embeddings=True, sliding_window=40, query_pre_attn_scalar=24,
                      layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]),
    },
    "opt": {"plain": make("OPT", OPT)},
    "gpt2": {"plain": make("GPT2", GPT2, "LMHeadModel")},
    "gpt_neox": {
        "parallel": make("GPTNeoX", NEOX),
        "sequential": make("GPTNeoX", NEOX, use_parallel_residual=False, attention_bias=False, rotary_pct=0.5),
    },
    "mixtral": {"plain": make("Mixtral", num_local_experts=5, num_experts_per_tok=2, sliding_window=None)},
    "qwen2_moe": {
        "all sparse": make("Qwen2Moe", QWEN_MOE, shared_expert_intermediate_size=80),
        "some dense": make("Qwen2Moe", QWEN_MOE, shared_expert_intermediate_size=80, mlp_only_layers=[1],
                           norm_topk_prob=True),
    },
    "qwen3_moe": {"plain": make("Qwen3Moe", QWEN_MOE, norm_topk_prob=True, decoder_sparse_step=2)},
    "deepseek_v2": {
        "lite": make("DeepseekV2", DEEPSEEK, q_lora_rank=None),
        "groups": make("DeepseekV2", DEEPSEEK, topk_method="group_limited_greedy", n_group=4, topk_group=2,
                       routed_scaling_factor=4.0, rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 0.9}),
    },
    "deepseek_v3": {
        "groups": make("DeepseekV3", DEEPSEEK, n_group=4, topk_group=2, norm_topk_prob=True,
                       rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
        "halves": make("DeepseekV3", DEEPSEEK, n_group=1, topk_group=1, rope_interleave=False),
    },
    "falcon": {
        "multi-query": make("Falcon", COMMON, ffn_hidden_size=176),
        "new": make("Falcon", COMMON, num_attention_heads=6, num_kv_heads=2, new_decoder_architecture=True, bias=True),
        "new, one norm": make("Falcon", COMMON, num_attention_heads=6, num_kv_heads=3, new_decoder_architecture=True,
                              num_ln_in_parallel_attn=1),
        "slopes": falcon_rw,
    },
    "glm": {"plain": make("Glm", attention_bias=True, partial_rotary_factor=0.5)},
    "glm4": {"plain": make("Glm4", partial_rotary_factor=0.5)},
    "chatglm": {"plain": chatglm},
    "baichuan": {"7b": baichuan_7b, "13b": baichuan_13b},
    "phi3": {
        "partial": make("Phi3", partial_rotary_factor=0.8, sliding_window=60),
        "longrope": make("Phi3", head_dim=16, num_attention_heads=6, num_key_value_heads=2, rope_parameters=LONGROPE,
                         original_max_position_embeddings=128),
    },
}  # fmt: skip


CASES = [(name, case) for name, recipes in RECIPES.items() for case in recipes]


def prompt_of(n: int, seed: int = 11) -> list[int]:
    return [(37 * i + seed) % VOCAB for i in range(n)]


NEW_TOKENS = 8


def steps_of(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """This rank's logits of the decode steps of two sequences."""
    steps: list[torch.Tensor] = []
    decode = Decoder.__call__

    def keep(self: Decoder, running: list[Sequence]) -> torch.Tensor:
        steps.append(decode(self, running).clone())
        return steps[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "__call__", keep)
        llm.generate([prompt_of(5), prompt_of(70)], SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True))
    return steps


def bf16_tolerance(config: ModelConfig, logits: torch.Tensor) -> float:
    """How far bf16 logits may be from fp32 ones.

    A random walk of bf16 roundings: at most 16 a layer, half an ulp each, and five sigma of it; the scores of these
    models are of the size of 1, so that an error in one is as large in its weight.
    """
    return 5 * 2**-9 * (16 * config.n_layers) ** 0.5 * float(logits.std())
