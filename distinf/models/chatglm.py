"""ChatGLM2, ChatGLM3 and GLM-4 as first released (arXiv 2406.12793): GLM in other names, its projections fused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distinf.config import ModelConfig, RopeConfig
from distinf.models.fields import Fields, read_config
from distinf.models.llama import build, norm_params, rope_of
from distinf.models.params import Param, Source, vector
from distinf.models.phi3 import fused_gate_up, fused_qkv

__all__ = ["build", "config_from_hf", "params"]

# Entries that say how the published code computes, not what.
_NO_EFFECT = (
    "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion", "fp32_residual_connection",
)  # fmt: skip

# Of ChatGLM2 and ChatGLM3 alike; GLM-4's is larger.
_VOCAB_2_AND_3 = 65024


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family. The first ChatGLM, of the same model_type, is refused."""

    def read(fields: Fields) -> ModelConfig:
        fields.expect("position_encoding_2d", False)  # the first one's
        for name in ("rmsnorm", "post_layer_norm", "original_rope"):
            fields.expect(name, True)
        for name in ("add_bias_linear", "apply_residual_connection_post_layernorm", "tie_word_embeddings"):
            fields.expect(name, False)
        for name in ("pre_seq_len", "quantization_bit"):  # a trained prefix; weights in a format of its own
            fields.expect(name, 0)
        fields.get("prefix_projection", *_NO_EFFECT, default=None)
        n_heads = fields.integer("num_attention_heads")
        grouped, groups = fields.flag("multi_query_attention"), fields.integer("multi_query_group_num", default=1)
        head_dim = fields.integer("kv_channels")
        rope = rope_config(fields, head_dim)
        return ModelConfig(
            model_type=fields.get("model_type"),
            hidden=fields.integer("hidden_size"),
            ffn=fields.integer("ffn_hidden_size"),
            n_layers=fields.integer("num_hidden_layers", "num_layers"),
            n_heads=n_heads,
            n_kv_heads=groups if grouped else n_heads,
            head_dim=head_dim,
            vocab=fields.integer("padded_vocab_size", "vocab_size"),
            max_positions=rope.max_positions,
            norm_eps=fields.number("layernorm_epsilon"),
            rope=rope,
            eos_ids=fields.eos_ids(),
            qkv_bias=fields.flag("add_qkv_bias"),
        )

    return read_config(hf, read)


def rope_config(fields: Fields, head_dim: int) -> RopeConfig:
    """Half of each head rotates. `rope_ratio` multiplies the base; in ChatGLM2-32k, whose name alone tells, it divides
    the positions.

    Raises ValueError where it may be either, since the wrong one gives wrong text without an error.
    """
    ratio, positions = fields.number("rope_ratio", default=1.0), fields.integer("seq_length")
    name = str(fields.get("_name_or_path", default="")).lower()
    told = "chatglm2" in name or "chatglm3" in name
    if ratio != 1 and not told and fields.integer("padded_vocab_size", "vocab_size") == _VOCAB_2_AND_3:
        raise ValueError(
            f"config: 'rope_ratio' {ratio:g} means one thing in ChatGLM2 and another in ChatGLM3, and '_name_or_path' "
            f"{name!r} tells neither; expected a name with chatglm2 or chatglm3 in it"
        )
    if "chatglm2" in name:
        return rope_of({"rope_type": "linear", "factor": ratio}, 10000.0, 0.5, head_dim, positions)
    return rope_of({}, 10000.0 * ratio, 0.5, head_dim, positions)


def params(config: ModelConfig) -> list[Param]:
    """See distinf.models.Family."""
    embed, top = (config.vocab, config.hidden), "transformer."
    table = [
        Param("embed", "table", (Source(top + "embedding.word_embeddings.weight", embed),)),
        vector("norm", top + "encoder.final_layernorm.weight", config.hidden),
        Param("head", "linear", (Source(top + "output_layer.weight", embed, "vocab"),)),
    ]
    for i in range(config.n_layers):
        table += layer_params(f"{top}encoder.layers.{i}.", f"layers.{i}.", config)
    return table


def layer_params(source: str, name: str, config: ModelConfig) -> list[Param]:
    """One layer; `source` and `name` are prefixes."""
    assert config.rope
    o = Source(source + "self_attention.dense.weight", (config.hidden, config.n_heads * config.head_dim))
    down = Source(source + "mlp.dense_4h_to_h.weight", (config.hidden, config.ffn))
    return [
        *norm_params(source, name, config),
        fused_qkv(source + "self_attention.query_key_value.weight", name, config, pairs=config.rope.dim),
        Param(name + "o", "linear", (o,), columns="q_heads"),
        fused_gate_up(source + "mlp.dense_h_to_4h.weight", name, config),
        Param(name + "down", "linear", (down,), columns="ffn"),
    ]
