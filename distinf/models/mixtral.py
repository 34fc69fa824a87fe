"""Mixtral (Jiang et al., arXiv 2401.04088): Mistral with eight experts in every layer, two for a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distinf.config import ModelConfig, MoeConfig
from distinf.models.fields import Fields, read_config
from distinf.models.llama import attention_params, build, llama_config, norm_params, outer_params, windows
from distinf.models.moe import expert_params, router_param
from distinf.models.params import Param

__all__ = ["build", "config_from_hf", "params"]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family."""

    def read(fields: Fields) -> ModelConfig:
        moe = MoeConfig(
            layers=(True,) * fields.integer("num_hidden_layers"),
            n_experts=fields.integer("num_local_experts"),
            top_k=fields.integer("num_experts_per_tok"),
            ffn=fields.integer("intermediate_size"),
            normalise=True,
        )
        return llama_config(fields, windows=windows(fields, lambda layer: True), moe=moe)

    return read_config(hf, read)


def params(config: ModelConfig) -> list[Param]:
    """See distinf.models.Family."""
    table = outer_params(config)
    for i in range(config.n_layers):
        source, name = f"model.layers.{i}.", f"layers.{i}."
        moe = source + "block_sparse_moe."
        table += norm_params(source, name, config)
        table += attention_params(source + "self_attn.", name, config)
        table.append(router_param(moe, name, config))
        table += expert_params(moe, name, config, theirs=("w1", "w3", "w2"))
    return table
