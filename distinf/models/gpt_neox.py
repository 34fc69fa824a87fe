"""GPT-NeoX and Pythia (Black et al., arXiv 2204.06745): attention beside the MLP, a quarter of each head rotates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distinf.config import ModelConfig
from distinf.models.fields import Fields, read_config
from distinf.models.llama import llama_config, rope_config
from distinf.models.opt import build
from distinf.models.params import Param, Source, layer_norm

__all__ = ["build", "config_from_hf", "params"]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family."""

    def read(fields: Fields) -> ModelConfig:
        n_heads = fields.integer("num_attention_heads")
        head_dim = fields.integer("hidden_size") // n_heads
        bias = fields.flag("attention_bias", True)
        return llama_config(
            fields,
            rope=rope_config(fields, head_dim, rotary_factor=0.25),
            head_dim=head_dim,
            n_kv_heads=n_heads,
            norm_eps=fields.number("layer_norm_eps"),
            layer_norm=True,
            parallel_norms=2 if fields.flag("use_parallel_residual", True) else 0,
            qkv_bias=bias,
            o_bias=bias,
        )

    return read_config(hf, read)


def params(config: ModelConfig) -> list[Param]:
    """See distinf.models.Family."""
    hidden, embed = config.hidden, (config.vocab, config.hidden)
    head = "gpt_neox.embed_in.weight" if config.tie_embeddings else "embed_out.weight"
    table = [
        Param("embed", "table", (Source("gpt_neox.embed_in.weight", embed),)),
        *layer_norm("norm", "gpt_neox.final_layer_norm", hidden),
        Param("head", "linear", (Source(head, embed, "vocab"),)),
    ]
    for i in range(config.n_layers):
        table += layer_params(f"gpt_neox.layers.{i}.", f"layers.{i}.", config)
    return table


def layer_params(source: str, name: str, config: ModelConfig) -> list[Param]:
    """One layer; `source` and `name` are prefixes. A head's query, key and value stand together."""
    hidden, ffn, d = config.hidden, config.ffn, config.head_dim
    fused = source + "attention.query_key_value.weight"
    qkv = tuple(
        Source(fused, (3 * hidden, hidden), "q_heads", config.n_heads, range(i * d, (i + 1) * d)) for i in range(3)
    )
    o = Source(source + "attention.dense.weight", (hidden, hidden))
    up = Source(source + "mlp.dense_h_to_4h.weight", (ffn, hidden), "ffn")
    down = Source(source + "mlp.dense_4h_to_h.weight", (hidden, ffn))
    return [
        *layer_norm(name + "input_norm", source + "input_layernorm", hidden),
        Param(name + "qkv", "linear", qkv, bias=config.qkv_bias),
        Param(name + "o", "linear", (o,), columns="q_heads", bias=config.o_bias),
        *layer_norm(name + "post_norm", source + "post_attention_layernorm", hidden),
        Param(name + "up", "linear", (up,), bias=True),
        Param(name + "down", "linear", (down,), columns="ffn", bias=True),
    ]
