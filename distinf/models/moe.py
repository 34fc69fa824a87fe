"""The rows of a split table that mixtures of experts have in common."""

from __future__ import annotations

from collections.abc import Sequence

from distinf.config import ModelConfig
from distinf.models.params import Param, Source

# What most checkpoints call an expert's gate, up and down projections.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def router_param(source: str, name: str, config: ModelConfig) -> Param:
    """The linear that scores the experts: whole on every rank and never quantised, so that all choose alike.

    To the bit that holds for ranks of one instruction set; where a GPU or another CPU takes part, two experts that are
    nearly equal may be told apart differently.
    """
    assert config.moe
    gate = Source(source + "gate.weight", (config.moe.n_experts, config.hidden))
    return Param(name + "router", "linear", (gate,), exact=True)


def expert_params(source: str, name: str, config: ModelConfig, theirs: Sequence[str] = PROJECTIONS) -> list[Param]:
    """Every expert's projections, `theirs` in the checkpoint; `source` and `name` are prefixes."""
    moe, hidden = config.moe, config.hidden
    assert moe
    use, table = moe.top_k / moe.n_experts, []
    gate, up, down = theirs
    for e in range(moe.n_experts):
        expert, ours = f"{source}experts.{e}.", f"{name}experts.{e}."
        gate_up = tuple(Source(f"{expert}{p}.weight", (moe.ffn, hidden), "expert_ffn") for p in (gate, up))
        output = Source(f"{expert}{down}.weight", (hidden, moe.ffn))
        table.append(Param(ours + "gate_up", "linear", gate_up, use=use, gated=True, expert=e))
        table.append(Param(ours + "down", "linear", (output,), columns="expert_ffn", use=use, expert=e))
    return table


def shared_params(source: str, name: str, config: ModelConfig) -> list[Param]:
    """The expert that all tokens use; `source` and `name` are prefixes."""
    assert config.moe
    shape = (config.moe.shared_ffn, config.hidden)
    gate_up = tuple(Source(f"{source}{p}_proj.weight", shape, "shared_ffn") for p in ("gate", "up"))
    down = Source(source + "down_proj.weight", shape[::-1])
    return [
        Param(name + "shared.gate_up", "linear", gate_up, gated=True),
        Param(name + "shared.down", "linear", (down,), columns="shared_ffn"),
    ]
