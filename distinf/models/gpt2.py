"""GPT-2 (Radford et al., 2019): OPT's shape; weights are kept as [in, out], query, key and value in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distinf.config import ModelConfig
from distinf.models.fields import Fields, read_config
from distinf.models.opt import build
from distinf.models.params import Param, Source, layer_norm

__all__ = ["build", "config_from_hf", "params"]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family."""

    def read(fields: Fields) -> ModelConfig:
        hidden, n_heads = fields.integer("n_embd", "hidden_size"), fields.integer("n_head", "num_attention_heads")
        fields.expect("scale_attn_weights", True)
        fields.expect("scale_attn_by_inverse_layer_idx", False)
        fields.expect("add_cross_attention", False)
        positions = fields.integer("n_positions", "max_position_embeddings", "n_ctx")
        return ModelConfig(
            model_type=fields.get("model_type"),
            hidden=hidden,
            ffn=fields.integer("n_inner", default=4 * hidden),
            n_layers=fields.integer("num_hidden_layers", "n_layer"),
            n_heads=n_heads,
            n_kv_heads=n_heads,
            head_dim=hidden // n_heads,
            vocab=fields.integer("vocab_size"),
            max_positions=positions,
            norm_eps=fields.number("layer_norm_epsilon"),
            rope=None,
            tie_embeddings=fields.flag("tie_word_embeddings", True),
            eos_ids=fields.eos_ids(),
            layer_norm=True,
            act=fields.activation("activation_function", default="gelu_new"),
        )

    return read_config(hf, read)


def params(config: ModelConfig) -> list[Param]:
    """See distinf.models.Family."""
    hidden, top = config.hidden, "transformer."
    embed = (config.vocab, hidden)
    head = top + "wte.weight" if config.tie_embeddings else "lm_head.weight"
    table = [
        Param("embed", "table", (Source(top + "wte.weight", embed),)),
        Param("positions", "table", (Source(top + "wpe.weight", (config.max_positions, hidden)),)),
        *layer_norm("norm", top + "ln_f", hidden),
        Param("head", "linear", (Source(head, embed, "vocab"),)),
    ]
    for i in range(config.n_layers):
        table += layer_params(f"{top}h.{i}.", f"layers.{i}.", config)
    return table


def layer_params(source: str, name: str, config: ModelConfig) -> list[Param]:
    """One layer; `source` and `name` are prefixes."""
    hidden, ffn = config.hidden, config.ffn

    def conv1d(layer: str, out: int, into: int, **more: Any) -> Source:
        return Source(f"{source}{layer}.weight", (into, out), transposed=True, **more)

    thirds = [range(i * hidden, (i + 1) * hidden) for i in range(3)]
    qkv = tuple(conv1d("attn.c_attn", 3 * hidden, hidden, rows="q_heads", part=part) for part in thirds)
    return [
        *layer_norm(name + "input_norm", source + "ln_1", hidden),
        Param(name + "qkv", "linear", qkv, bias=True),
        Param(name + "o", "linear", (conv1d("attn.c_proj", hidden, hidden),), columns="q_heads", bias=True),
        *layer_norm(name + "post_norm", source + "ln_2", hidden),
        Param(name + "up", "linear", (conv1d("mlp.c_fc", ffn, hidden, rows="ffn"),), bias=True),
        Param(name + "down", "linear", (conv1d("mlp.c_proj", hidden, ffn),), columns="ffn", bias=True),
    ]
