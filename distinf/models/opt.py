"""OPT (Zhang et al., arXiv 2205.01068): learned positions, LayerNorm before each part, ReLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distinf.comm import Group
from distinf.config import ModelConfig
from distinf.kernels import Kernels
from distinf.models.blocks import Block, ParallelBlock, PreNormBlock
from distinf.models.decoder import Decoder, Parts
from distinf.models.fields import Fields, read_config
from distinf.models.params import Param, Source, Weights, layer_norm
from distinf.shard import Shard

# The position table begins with rows that no token uses.
_UNUSED_POSITIONS = 2


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family. OPT-350m, with its norms behind and narrower embeddings, is refused."""

    def read(fields: Fields) -> ModelConfig:
        hidden, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        fields.expect("word_embed_proj_dim", hidden)
        fields.expect("do_layer_norm_before", True)
        fields.expect("_remove_final_layer_norm", False)
        fields.expect("layer_norm_elementwise_affine", True)
        fields.expect("enable_bias", True)
        return ModelConfig(
            model_type=fields.get("model_type"),
            hidden=hidden,
            ffn=fields.integer("ffn_dim"),
            n_layers=fields.integer("num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=n_heads,
            head_dim=hidden // n_heads,
            vocab=fields.integer("vocab_size"),
            max_positions=fields.integer("max_position_embeddings"),
            norm_eps=1e-5,  # what its LayerNorms are made with; config.json has no entry
            rope=None,
            tie_embeddings=fields.flag("tie_word_embeddings", True),
            eos_ids=fields.eos_ids(),
            layer_norm=True,
            act=fields.activation("activation_function", default="relu"),
        )

    return read_config(hf, read)


def params(config: ModelConfig) -> list[Param]:
    """See distinf.models.Family."""
    hidden, top = config.hidden, "model.decoder."
    embed, used = (config.vocab, hidden), range(_UNUSED_POSITIONS, _UNUSED_POSITIONS + config.max_positions)
    head = top + "embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    table = [
        Param("embed", "table", (Source(top + "embed_tokens.weight", embed),)),
        Param("positions", "table", (Source(top + "embed_positions.weight", (used.stop, hidden), part=used),)),
        *layer_norm("norm", top + "final_layer_norm", hidden),
        Param("head", "linear", (Source(head, embed, "vocab"),)),
    ]
    for i in range(config.n_layers):
        table += layer_params(f"{top}layers.{i}.", f"layers.{i}.", config)
    return table


def layer_params(source: str, name: str, config: ModelConfig) -> list[Param]:
    """One layer; `source` and `name` are prefixes."""
    hidden, ffn, attn = config.hidden, config.ffn, source + "self_attn."
    qkv = tuple(Source(f"{attn}{p}_proj.weight", (hidden, hidden), "q_heads") for p in "qkv")
    o = Source(attn + "out_proj.weight", (hidden, hidden))
    up, down = Source(source + "fc1.weight", (ffn, hidden), "ffn"), Source(source + "fc2.weight", (hidden, ffn))
    return [
        *layer_norm(name + "input_norm", source + "self_attn_layer_norm", hidden),
        Param(name + "qkv", "linear", qkv, bias=True),
        Param(name + "o", "linear", (o,), columns="q_heads", bias=True),
        *layer_norm(name + "post_norm", source + "final_layer_norm", hidden),
        Param(name + "up", "linear", (up,), bias=True),
        Param(name + "down", "linear", (down,), columns="ffn", bias=True),
    ]


def build(config: ModelConfig, shard: Shard, weights: Weights, kernels: Kernels, group: Group) -> Decoder:
    """See distinf.models.Family. Of every family without a gate."""
    part = Parts(config, shard, weights, kernels, group)

    def block(i: int) -> Block:
        first, attention, mlp = part.norm(f"layers.{i}.input_norm"), part.attention(i), part.mlp(i, gated=False)
        second = None if config.parallel_norms == 1 else part.norm(f"layers.{i}.post_norm")
        if config.parallel_norms:
            return ParallelBlock(first, attention, second, mlp)
        assert second
        return PreNormBlock(first, attention, second, mlp)

    return part.decoder([block(i) for i in range(config.n_layers)])
