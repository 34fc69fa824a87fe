"""Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671): Qwen2 with experts, and one that all tokens share behind a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distinf.config import ModelConfig, MoeConfig
from distinf.models.fields import Fields, read_config
from distinf.models.llama import attention_params, build, decoder_params, llama_config
from distinf.models.moe import expert_params, router_param, shared_params
from distinf.models.params import Param, Source
from distinf.models.qwen2 import qwen_windows

__all__ = ["build", "config_from_hf", "params"]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family."""

    def read(fields: Fields) -> ModelConfig:
        moe = qwen_moe(fields, shared_ffn=fields.integer("shared_expert_intermediate_size"), shared_gate=True)
        return llama_config(fields, qkv_bias=fields.flag("qkv_bias", True), windows=qwen_windows(fields), moe=moe)

    return read_config(hf, read)


def qwen_moe(fields: Fields, **more: Any) -> MoeConfig:
    """What Qwen's mixtures have in common; `more` are fields of MoeConfig."""
    n_layers, step = fields.integer("num_hidden_layers"), fields.integer("decoder_sparse_step", default=1)
    plain = fields.items("mlp_only_layers", default=[])
    return MoeConfig(
        layers=tuple((i + 1) % step == 0 and i not in plain for i in range(n_layers)),
        n_experts=fields.integer("num_experts", "num_local_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        ffn=fields.integer("moe_intermediate_size"),
        normalise=fields.flag("norm_topk_prob"),
        **more,
    )


def params(config: ModelConfig) -> list[Param]:
    """See distinf.models.Family."""
    return decoder_params(config, attention_params, layer_experts)


def layer_experts(source: str, name: str, config: ModelConfig) -> list[Param]:
    """Router and experts of a layer, with the shared one if there is one; `source` and `name` are prefixes."""
    table = [router_param(source, name, config), *expert_params(source, name, config)]
    if config.moe and config.moe.shared_ffn:
        gate = Source(source + "shared_expert_gate.weight", (1, config.hidden))
        table += shared_params(source + "shared_expert.", name, config)
        table.append(Param(name + "shared_gate", "linear", (gate,), exact=True))
    return table
