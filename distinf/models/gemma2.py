"""Gemma 2 (arXiv 2408.00118): norms on both sides, soft caps, every other layer with a sliding window."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distinf.comm import Group
from distinf.config import ModelConfig
from distinf.kernels import Kernels
from distinf.models.blocks import SandwichBlock
from distinf.models.decoder import Decoder, Parts
from distinf.models.fields import Fields, read_config
from distinf.models.llama import attention_params, llama_config, mlp_params, outer_params, windows
from distinf.models.params import Param, Weights, vector
from distinf.shard import Shard


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family."""

    def read(fields: Fields) -> ModelConfig:
        return gemma_config(fields, windows=windows(fields, lambda layer: layer % 2 == 0))

    return read_config(hf, read)


def gemma_config(fields: Fields, **more: Any) -> ModelConfig:
    """What Gemma 2 and 3 have in common; `more` are fields of ModelConfig."""
    fields.expect("use_bidirectional_attention", False)
    fields.expect("hidden_act", "gelu_pytorch_tanh")  # of old files, which mean hidden_activation
    bias = fields.flag("attention_bias")
    return llama_config(
        fields,
        tied=True,
        qkv_bias=bias,
        o_bias=bias,
        norm_shift=1.0,
        act=fields.activation("hidden_activation", default="gelu_pytorch_tanh"),
        embed_scale=math.sqrt(fields.integer("hidden_size")),
        score_scale=1 / math.sqrt(fields.number("query_pre_attn_scalar")),
        score_softcap=fields.number("attn_logit_softcapping", default=0.0),
        logit_softcap=fields.number("final_logit_softcapping", default=0.0),
        **more,
    )


def params(config: ModelConfig) -> list[Param]:
    """See distinf.models.Family."""
    table = outer_params(config)
    for i in range(config.n_layers):
        source, name = f"model.layers.{i}.", f"layers.{i}."
        norms = (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
        table += sandwich_norms(source, name, config, norms)
        table += attention_params(source + "self_attn.", name, config)
        table += mlp_params(source + "mlp.", name, config)
    return table


def sandwich_norms(source: str, name: str, config: ModelConfig, theirs: Sequence[str]) -> list[Param]:
    """The four norms of a layer, whose names in the checkpoint are `theirs`; `source` and `name` are prefixes."""
    ours = ("input_norm", "attention_norm", "mlp_input_norm", "mlp_norm")
    return [
        vector(name + norm, f"{source}{their}.weight", config.hidden, config.norm_shift)
        for norm, their in zip(ours, theirs, strict=True)
    ]


def build(config: ModelConfig, shard: Shard, weights: Weights, kernels: Kernels, group: Group) -> Decoder:
    """See distinf.models.Family."""
    part = Parts(config, shard, weights, kernels, group)

    def block(i: int) -> SandwichBlock:
        name = f"layers.{i}."
        return SandwichBlock(
            input_norm=part.norm(name + "input_norm"),
            attention=part.attention(i),
            attention_norm=part.norm(name + "attention_norm"),
            mlp_input_norm=part.norm(name + "mlp_input_norm"),
            mlp=part.mlp(i),
            mlp_norm=part.norm(name + "mlp_norm"),
            kernels=kernels,
        )

    return part.decoder([block(i) for i in range(config.n_layers)])
