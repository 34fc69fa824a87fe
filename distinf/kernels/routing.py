"""Mixture of experts: how tokens choose their experts, and where their rows then stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Router:
    """How a token's logits, one for each expert, become its experts and their weights.

    Scores are the logits' softmax or sigmoid. With `groups`, only the experts of the `top_groups` best of that many
    equal groups can be chosen; a group is as good as its `group_best` best experts together.
    """

    top_k: int
    sigmoid: bool = False
    normalise: bool = False  # weights of a token add up to 1 before `scale`
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1


@dataclass(frozen=True)
class Routes:
    """The choices of T tokens, as buffers that a recorded step writes again.

    Grouped rows are one for each token and choice, those of an expert adjacent and in the tokens' order.
    """

    ids: torch.Tensor  # int32 [T, top_k], the best first
    weights: torch.Tensor  # fp32 [T, top_k]
    place: torch.Tensor  # int32 [T, top_k], the grouped row
    starts: torch.Tensor  # int32 [experts + 1], the first grouped row of each expert, and the end
    experts: range  # those that are meant, of all: a rank may have some of them only

    @property
    def bounds(self) -> torch.Tensor:
        """int32 [len(experts) + 1]: the first grouped row of each expert that is meant, and the end; a view."""
        return self.starts[self.experts.start : self.experts.stop + 1]
