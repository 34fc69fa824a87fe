"""Llama 1, 2, 3 and what shares its layout (Touvron et al., arXiv 2302.13971)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distinf.comm import Group
from distinf.config import ModelConfig, RopeConfig
from distinf.kernels import Kernels
from distinf.models.blocks import PreNormBlock
from distinf.models.decoder import Decoder, Parts
from distinf.models.fields import Fields, read_config
from distinf.models.params import Param, Source, Weights, vector
from distinf.models.rope import Rotary, scaling_kind
from distinf.shard import Shard

# (prefix in the checkpoint, prefix of ours, config) -> a part of one layer.
LayerParams = Callable[[str, str, ModelConfig], list[Param]]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family."""

    def read(fields: Fields) -> ModelConfig:
        bias = fields.flag("attention_bias")
        return llama_config(fields, qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias"))

    return read_config(hf, read)


def llama_config(fields: Fields, tied: bool = False, **more: Any) -> ModelConfig:
    """The entries that this family and its kin have in common; `more` are fields of ModelConfig.

    `tied`: whether the head is the embedding where config.json does not say.
    """
    hidden, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", default=hidden // n_heads)
    rope = more.pop("rope") if "rope" in more else rope_config(fields, head_dim)
    return ModelConfig(
        **{
            "model_type": fields.get("model_type"),
            "hidden": hidden,
            "ffn": more.get("ffn") or fields.integer("intermediate_size"),
            "n_layers": fields.integer("num_hidden_layers"),
            "n_heads": n_heads,
            "n_kv_heads": fields.integer("num_key_value_heads", default=n_heads),
            "head_dim": head_dim,
            "vocab": fields.integer("vocab_size"),
            "max_positions": context_length(rope) if rope else 0,
            "norm_eps": more.get("norm_eps") or fields.number("rms_norm_eps"),
            "rope": rope,
            "tie_embeddings": fields.flag("tie_word_embeddings", tied),
            "eos_ids": fields.eos_ids(),
            "act": fields.activation("hidden_act"),
            **more,
        }
    )


def rope_config(
    fields: Fields, head_dim: int, rotary_factor: float = 1.0, theta: float = 0.0, max_positions: int | None = None
) -> RopeConfig:
    """Rotary settings: `rope_theta` and `rope_scaling`, or the newer `rope_parameters` that holds both.

    `rotary_factor` (the rotated part of a head), `theta` and `max_positions` count where config.json does not say.
    """
    scaling = fields.entries("rope_parameters", "rope_scaling")
    theta = fields.number("rope_theta", "rotary_emb_base", default=theta)
    factor = fields.number("partial_rotary_factor", "rotary_pct", default=rotary_factor)
    # Phi-3 keeps this entry beside the scaling that it belongs to.
    original = fields.integer("original_max_position_embeddings", default=0)
    if original and scaling:
        scaling.setdefault("original_max_position_embeddings", original)
    otherwise = {} if max_positions is None else {"default": max_positions}
    return rope_of(scaling, theta, factor, head_dim, fields.integer("max_position_embeddings", **otherwise))


def rope_of(scaling: dict[str, Any], theta: float, factor: float, head_dim: int, max_positions: int) -> RopeConfig:
    """A scaling entry, which may hold the base frequency and the rotated part of a head itself.

    Raises ValueError when no base frequency is given: a guessed one gives wrong text without an error.
    """
    theta = float(scaling.pop("rope_theta", None) or theta)
    if not theta:
        raise ValueError("config: 'rope_theta' is missing")
    rotated = int(head_dim * float(scaling.pop("partial_rotary_factor", None) or factor))
    rope = RopeConfig(theta, rotated, scaling or None, max_positions)
    Rotary(rope)  # an unknown scaling is refused here, before anything is loaded
    return rope


def context_length(rope: RopeConfig) -> int:
    """Positions that the rope reaches: with the dynamic scaling config.json has the length of the training."""
    stretch = float((rope.scaling or {})["factor"]) if scaling_kind(rope) == "dynamic" else 1.0
    return int(rope.max_positions * stretch)


def windows(fields: Fields, has_window: Callable[[int], bool]) -> tuple[int, ...]:
    """Each layer's sliding window: `layer_types` names the layers that have one, else `has_window` tells."""
    window = fields.integer("sliding_window", "sliding_window_size", default=0)
    n_layers = fields.integer("num_hidden_layers")
    kinds = ("full_attention", "sliding_attention")
    types = fields.items("layer_types", default=[kinds[has_window(i)] for i in range(n_layers)])[:n_layers]
    if unknown := [t for t in types if t not in kinds]:
        raise ValueError(f"config: layer_types {unknown[0]!r} is not supported; expected {' or '.join(kinds)}")
    if len(types) < n_layers:
        raise ValueError(f"config: layer_types has {len(types)} entries for {n_layers} layers")
    return tuple(window if t == "sliding_attention" else 0 for t in types)


def params(config: ModelConfig) -> list[Param]:
    """See distinf.models.Family."""
    return decoder_params(config, attention_params)


def decoder_params(config: ModelConfig, attention: LayerParams, experts: LayerParams | None = None) -> list[Param]:
    """The split table of a model in Llama's layout; `experts` take the MLP's place in layers that have them."""
    table = outer_params(config)
    for i in range(config.n_layers):
        source, name = f"model.layers.{i}.", f"layers.{i}."
        mlp = experts if experts and config.has_experts(i) else mlp_params
        table += norm_params(source, name, config)
        table += attention(source + "self_attn.", name, config)
        table += mlp(source + "mlp.", name, config)
    return table


def norm_params(source: str, name: str, config: ModelConfig) -> list[Param]:
    """The norms before attention and MLP; `source` and `name` are prefixes."""
    return [
        vector(name + "input_norm", source + "input_layernorm.weight", config.hidden, config.norm_shift),
        vector(name + "post_norm", source + "post_attention_layernorm.weight", config.hidden, config.norm_shift),
    ]


def outer_params(config: ModelConfig) -> list[Param]:
    """Embedding, last norm and head."""
    embed = (config.vocab, config.hidden)
    head = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    return [
        Param("embed", "table", (Source("model.embed_tokens.weight", embed),)),
        vector("norm", "model.norm.weight", config.hidden, config.norm_shift),
        Param("head", "linear", (Source(head, embed, "vocab", unit_rows=config.unit_head),)),
    ]


def attention_params(source: str, name: str, config: ModelConfig, pairs: int = 0) -> list[Param]:
    """Query, key, value and output projections, and the norms of heads; `source` and `name` are prefixes.

    `pairs`: see Source.
    """
    head_dim = config.head_dim if pairs else 0
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    qkv = (
        Source(source + "q_proj.weight", (q, config.hidden), "q_heads", pairs=pairs, head_dim=head_dim),
        Source(source + "k_proj.weight", (kv, config.hidden), "kv_heads", pairs=pairs, head_dim=head_dim),
        Source(source + "v_proj.weight", (kv, config.hidden), "kv_heads"),
    )
    norms = ("q_norm", "k_norm") if config.qk_norm else ()
    return [
        Param(name + "qkv", "linear", qkv, bias=config.qkv_bias),
        *(vector(name + n, f"{source}{n}.weight", config.head_dim, config.norm_shift) for n in norms),
        output_param(source, name, config),
    ]


def output_param(source: str, name: str, config: ModelConfig) -> Param:
    """The attention's output projection."""
    o = Source(source + "o_proj.weight", (config.hidden, config.n_heads * config.head_dim))
    return Param(name + "o", "linear", (o,), columns="q_heads", bias=config.o_bias)


def mlp_params(source: str, name: str, config: ModelConfig) -> list[Param]:
    """Gate, up and down projections."""
    hidden, ffn = config.hidden, config.ffn
    gate_up = tuple(Source(f"{source}{p}_proj.weight", (ffn, hidden), "ffn") for p in ("gate", "up"))
    return [
        Param(name + "gate_up", "linear", gate_up, bias=config.mlp_bias, gated=True),
        down_param(source, name, config),
    ]


def down_param(source: str, name: str, config: ModelConfig) -> Param:
    """The feed-forward block's output projection."""
    down = Source(source + "down_proj.weight", (config.hidden, config.ffn))
    return Param(name + "down", "linear", (down,), columns="ffn", bias=config.mlp_bias)


def build(config: ModelConfig, shard: Shard, weights: Weights, kernels: Kernels, group: Group) -> Decoder:
    """See distinf.models.Family."""
    part = Parts(config, shard, weights, kernels, group)

    def block(i: int) -> PreNormBlock:
        name = f"layers.{i}."
        attention = part.latent_attention(i) if config.mla else part.attention(i)
        mlp = part.experts(i) if config.has_experts(i) else part.mlp(i)
        return PreNormBlock(part.norm(name + "input_norm"), attention, part.norm(name + "post_norm"), mlp)

    return part.decoder([block(i) for i in range(config.n_layers)])
