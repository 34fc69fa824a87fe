"""DeepSeek-V3 and R1 (arXiv 2412.19437): V2 with sigmoid scores and a bias that balances the experts' load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distinf.config import ModelConfig
from distinf.models.deepseek_v2 import build, deepseek_config, deepseek_moe, params
from distinf.models.fields import Fields, read_config

__all__ = ["build", "config_from_hf", "params"]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """See distinf.models.Family."""

    def read(fields: Fields) -> ModelConfig:
        fields.expect("topk_method", "noaux_tc")
        fields.expect("scoring_func", "sigmoid")
        moe = deepseek_moe(
            fields,
            sigmoid=True,
            choice_bias=True,
            normalise=fields.flag("norm_topk_prob"),
            groups=fields.integer("n_group", default=1),
            top_groups=fields.integer("topk_group", default=1),
            group_best=2,  # a group is as good as its two best experts
        )
        return deepseek_config(fields, moe=moe, pairs=fields.flag("rope_interleave", True))

    return read_config(hf, read)
