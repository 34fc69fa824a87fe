"""Falcon (Almazrouei et al., arXiv 2311.16867): attention beside the MLP, one KV head or one for each group.

falcon-rw has them behind one another, a KV head for each head, and slopes (ALiBi) instead of rotated heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distinf.config import ModelConfig
from distinf.models.fields import Fields, read_config
from distinf.models.llama import context_length, llama_config, rope_config
from distinf.models.opt import build
from distinf.models.params import Param, Source, layer_norm

__all__ = ["build", "config_from_hf", "params"]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family."""

    def read(fields: Fields) -> ModelConfig:
        fields.expect("apply_residual_connection_post_layernorm", False)
        hidden, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        grouped, multi_query = fields.flag("new_decoder_architecture"), fields.flag("multi_query", True)
        if grouped:
            fields.expect("parallel_attn", True)
            fields.expect("num_ln_in_parallel_attn", 1, 2)
        groups = fields.integer("num_kv_heads", "n_head_kv", default=n_heads)
        norms = fields.integer("num_ln_in_parallel_attn", default=2)
        beside, bias = fields.flag("parallel_attn", True), fields.flag("bias")
        rope = rope_config(fields, hidden // n_heads, theta=10000.0, max_positions=2048)
        alibi = fields.flag("alibi")
        return llama_config(
            fields,
            tied=True,
            ffn=fields.integer("ffn_hidden_size", default=4 * hidden),
            n_kv_heads=groups if grouped else 1 if multi_query else n_heads,
            norm_eps=fields.number("layer_norm_epsilon"),
            rope=None if alibi else rope,
            # It adds the slopes to scores that are not scaled yet.
            alibi_scale=math.sqrt(n_heads / hidden) if alibi else 0.0,
            max_positions=context_length(rope),
            act=fields.activation("activation", default="gelu"),
            layer_norm=True,
            parallel_norms=norms if grouped else int(beside),
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=bias,
        )

    return read_config(hf, read)


def params(config: ModelConfig) -> list[Param]:
    """See distinf.models.Family."""
    hidden, top = config.hidden, "transformer."
    embed = (config.vocab, hidden)
    table = [
        Param("embed", "table", (Source(top + "word_embeddings.weight", embed),)),
        *layer_norm("norm", top + "ln_f", hidden),
        Param("head", "linear", (Source(head_name(config), embed, "vocab"),)),
    ]
    for i in range(config.n_layers):
        table += layer_params(f"{top}h.{i}.", f"layers.{i}.", config)
    return table


def head_name(config: ModelConfig) -> str:
    """The head's tensor."""
    return "transformer.word_embeddings.weight" if config.tie_embeddings else "lm_head.weight"


def layer_params(source: str, name: str, config: ModelConfig) -> list[Param]:
    """One layer; `source` and `name` are prefixes. A group's queries stand before its key and its value."""
    hidden, ffn, n_kv, d = config.hidden, config.ffn, config.n_kv_heads, config.head_dim
    q = config.n_heads // n_kv * d
    fused, shape = source + "self_attention.query_key_value.weight", (n_kv * (q + 2 * d), hidden)
    qkv = (
        Source(fused, shape, "q_heads", n_kv, range(q)),
        Source(fused, shape, "kv_heads", n_kv, range(q, q + d)),
        Source(fused, shape, "kv_heads", n_kv, range(q + d, q + 2 * d)),
    )
    o = Source(source + "self_attention.dense.weight", (hidden, hidden))
    up = Source(source + "mlp.dense_h_to_4h.weight", (ffn, hidden), "ffn")
    down = Source(source + "mlp.dense_4h_to_h.weight", (hidden, ffn))
    names = (("input_layernorm", "post_attention_layernorm"), ("input_layernorm",), ("ln_attn", "ln_mlp"))
    norms = zip(("input_norm", "post_norm"), names[config.parallel_norms], strict=False)
    return [
        *(p for ours, theirs in norms for p in layer_norm(name + ours, source + theirs, hidden)),
        Param(name + "qkv", "linear", qkv, bias=config.qkv_bias),
        Param(name + "o", "linear", (o,), columns="q_heads", bias=config.o_bias),
        Param(name + "up", "linear", (up,), bias=config.mlp_bias),
        Param(name + "down", "linear", (down,), columns="ffn", bias=config.mlp_bias),
    ]
