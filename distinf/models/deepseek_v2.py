"""DeepSeek-V2 (arXiv 2405.04434): latent attention; experts in groups, and one that all tokens share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distinf.config import MlaConfig, ModelConfig, MoeConfig, RopeConfig
from distinf.models.fields import Fields, read_config
from distinf.models.llama import build, decoder_params, llama_config, rope_config
from distinf.models.moe import expert_params, router_param, shared_params
from distinf.models.params import Param, Source, vector
from distinf.models.rope import yarn_mscale
from distinf.shard import TILE

__all__ = ["build", "config_from_hf", "params"]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family."""

    def read(fields: Fields) -> ModelConfig:
        method = fields.get("topk_method", default="greedy")
        fields.expect("topk_method", "greedy", "group_limited_greedy")
        fields.expect("scoring_func", "softmax")
        fields.expect("norm_topk_prob", False)
        groups = fields.integer("n_group", default=1), fields.integer("topk_group", default=1)
        n_groups, top_groups = groups if method == "group_limited_greedy" else (1, 1)
        moe = deepseek_moe(fields, groups=n_groups, top_groups=top_groups)
        return deepseek_config(fields, moe=moe, pairs=True)

    return read_config(hf, read)


def deepseek_moe(fields: Fields, **more: Any) -> MoeConfig:
    """What V2 and V3 have in common; `more` are fields of MoeConfig."""
    fields.expect("moe_layer_freq", 1)
    dense, ffn = fields.integer("first_k_dense_replace", default=0), fields.integer("moe_intermediate_size")
    return MoeConfig(
        layers=tuple(i >= dense for i in range(fields.integer("num_hidden_layers"))),
        n_experts=fields.integer("n_routed_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        ffn=ffn,
        shared_ffn=ffn * fields.integer("n_shared_experts", default=0),
        scale=fields.number("routed_scaling_factor", default=1.0),
        **more,
    )


def deepseek_config(fields: Fields, moe: MoeConfig, pairs: bool) -> ModelConfig:
    """What V2 and V3 have in common; `pairs`: see MlaConfig."""
    mla = MlaConfig(
        q_rank=fields.integer("q_lora_rank", default=0),
        kv_rank=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_nope_head_dim"),
        rope_dim=fields.integer("qk_rope_head_dim"),
        v_dim=fields.integer("v_head_dim"),
        pairs=pairs,
    )
    for name, size in (("kv_lora_rank", mla.kv_rank), ("v_head_dim", mla.v_dim)):
        if size % TILE:
            raise ValueError(f"config: {name} {size} is not supported; expected a multiple of {TILE}")
    fields.expect("qk_head_dim", mla.nope_dim + mla.rope_dim)
    fields.expect("attention_bias", False)
    fields.expect("mlp_bias", False)
    rope = rope_config(fields, mla.rope_dim)
    return llama_config(
        fields,
        head_dim=mla.kv_rank + mla.rope_dim,
        n_kv_heads=1,
        rope=rope,
        score_scale=score_scale(mla, rope),
        mla=mla,
        moe=moe,
    )


def score_scale(mla: MlaConfig, rope: RopeConfig) -> float:
    """1 / sqrt of a query head's size, times what a stretched context asks for (see rope.yarn_mscale), squared."""
    scaling = rope.scaling or {}
    stretch, all_dims = float(scaling.get("factor", 1.0)), float(scaling.get("mscale_all_dim") or 0.0)
    return yarn_mscale(stretch, all_dims) ** 2 / math.sqrt(mla.nope_dim + mla.rope_dim)


def params(config: ModelConfig) -> list[Param]:
    """See distinf.models.Family."""
    return decoder_params(config, latent_params, layer_experts)


def latent_params(source: str, name: str, config: ModelConfig) -> list[Param]:
    """Latent attention's projections and norms; `source` and `name` are prefixes. See layers.LatentAttention."""
    mla, hidden, n = config.mla, config.hidden, config.n_heads
    assert mla
    kv_rank, nope, rope, v = mla.kv_rank, mla.nope_dim, mla.rope_dim, mla.v_dim
    pairs = rope if mla.pairs else 0
    q_shape = (n * (nope + rope), mla.q_rank or hidden)
    q_name = source + ("q_b_proj.weight" if mla.q_rank else "q_proj.weight")
    kv_name, kv_shape = source + "kv_a_proj_with_mqa.weight", (kv_rank + rope, hidden)
    up_name, up_shape = source + "kv_b_proj.weight", (n * (nope + v), kv_rank)
    q = (
        Source(q_name, q_shape, "q_heads", n, range(nope)),
        Source(q_name, q_shape, "q_heads", n, range(nope, nope + rope), pairs=pairs, head_dim=rope),
    )
    kv = (
        Source(kv_name, kv_shape, part=range(kv_rank)),
        Source(kv_name, kv_shape, part=range(kv_rank, kv_rank + rope), pairs=pairs, head_dim=rope),
    )
    k_up = Source(up_name, up_shape, "q_heads", n, range(nope), across=True)
    v_up = Source(up_name, up_shape, "q_heads", n, range(nope, nope + v))
    o = Source(source + "o_proj.weight", (hidden, n * v))
    q_down = Source(source + "q_a_proj.weight", (mla.q_rank, hidden))
    q_latent = [
        Param(name + "q_down", "linear", (q_down,)),
        vector(name + "q_norm", source + "q_a_layernorm.weight", mla.q_rank),
    ]
    return [
        *(q_latent if mla.q_rank else []),
        Param(name + "q", "linear", q),
        Param(name + "kv_down", "linear", kv),
        vector(name + "kv_norm", source + "kv_a_layernorm.weight", kv_rank),
        Param(name + "k_up", "linear", (k_up,)),
        Param(name + "v_up", "linear", (v_up,)),
        Param(name + "o", "linear", (o,), columns="q_heads"),
    ]


def layer_experts(source: str, name: str, config: ModelConfig) -> list[Param]:
    """Router and experts of a layer; `source` and `name` are prefixes."""
    moe = config.moe
    assert moe
    table = [router_param(source, name, config), *expert_params(source, name, config)]
    if moe.choice_bias:
        table.append(vector(name + "choice_bias", source + "gate.e_score_correction_bias", moe.n_experts))
    if moe.shared_ffn:
        table += shared_params(source + "shared_experts.", name, config)
    return table
