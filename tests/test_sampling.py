"""Sampling: limits, distribution, and the same choice for every split of the vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distinf.comm.single import SingleGroup
from distinf.sampling import SamplingParams, sample
from distinf.shard import split


class Replay(SingleGroup):
    """A group of `len(parts)` ranks in one process: ranks run one after the other, until every gather is known."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size  # type: ignore[misc]
        self.seen: list[list[torch.Tensor]] = []

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        if self.call == len(self.seen):
            self.seen.append([])
        if len(self.seen[self.call]) <= self.rank:
            self.seen[self.call].append(x.clone())
            raise _Waiting
        if len(self.seen[self.call]) < self.world_size:
            raise _Waiting
        self.call += 1
        return torch.stack(self.seen[self.call - 1])


class _Waiting(Exception):
    """Other ranks have to give their part first."""


def sample_split(logits: torch.Tensor, shares: list[int], params: SamplingParams, position: int = 5) -> list[int]:
    """`sample` on len(shares) ranks that hold unequal parts of the vocabulary; all must choose alike."""
    group: Any = Replay(len(shares))
    parts = split(logits.shape[1], shares, 32)
    chosen: dict[int, list[int]] = {}
    while len(chosen) < len(shares):
        for rank, vocab in enumerate(parts):
            group.rank, group.call = rank, 0
            try:
                sequences = list(range(len(logits)))
                part = logits[:, vocab.start : vocab.stop]
                chosen[rank] = sample(part, vocab, params, sequences, [position] * len(logits), group)
            except _Waiting:
                pass
    assert all(c == chosen[0] for c in chosen.values())
    return chosen[0]


SHARES = [[1], [1, 1], [3, 1], [1, 0, 2], [1, 1, 1, 1]]


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.8, seed=3),
        SamplingParams(temperature=1.3, top_k=17, seed=4),
        SamplingParams(temperature=5.0, top_p=0.9, seed=5),  # flat: the nucleus passes the first candidates
        SamplingParams(temperature=0.7, top_k=40, top_p=0.5, seed=2**63),
    ],
    ids=str,
)
def test_every_split_of_the_vocabulary_chooses_the_same(shares: list[int], params: SamplingParams) -> None:
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(1)) * 3
    for position in range(8):
        assert sample_split(logits, shares, params, position) == sample_split(logits, [1], params, position)


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    logits = torch.zeros(1, 256)
    logits[0, [70, 130, 200]] = 1.0
    for shares in SHARES:
        assert sample_split(logits, shares, SamplingParams()) == [70]


def draws(logits: torch.Tensor, params: SamplingParams, n: int) -> torch.Tensor:
    """Relative frequency of each token over n positions."""
    rows = logits.expand(n, -1)
    ids = sample(rows, range(len(logits)), params, [0] * n, list(range(n)), SingleGroup())
    return torch.bincount(torch.tensor(ids), minlength=len(logits)) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    """Within five standard deviations of a binomial frequency."""
    logits, n = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5]), 4000
    expected = (logits / temperature).softmax(0)
    observed = draws(logits, SamplingParams(temperature=temperature, seed=11), n)
    assert ((observed - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_top_k_and_top_p_leave_out_the_rest() -> None:
    logits = torch.tensor([3.0, 2.9, 0.0, 2.8, -1.0])
    assert (draws(logits, SamplingParams(temperature=1.0, top_k=2), 500) > 0).tolist() == [
        True,
        True,
        False,
        False,
        False,
    ]
    # Probabilities are about .36, .33, .29: 0.5 needs the first two, 0.3 the first alone.
    nucleus = draws(logits, SamplingParams(temperature=1.0, top_p=0.5), 500)
    assert (nucleus > 0).tolist() == [True, True, False, False, False]
    assert draws(logits, SamplingParams(temperature=1.0, top_p=0.3), 100)[0] == 1


def test_seed_sequence_and_position_each_change_the_noise() -> None:
    logits = torch.zeros(1, 4096)

    def draw(seed: int, sequence: int, position: int) -> list[int]:
        params = SamplingParams(temperature=1.0, seed=seed)
        return sample(logits, range(4096), params, [sequence], [position], SingleGroup())

    assert draw(1, 0, 7) == draw(1, 0, 7)
    assert len({tuple(draw(*c)) for c in [(1, 0, 7), (2, 0, 7), (1, 1, 7), (1, 0, 8)]}) == 4


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("temperature", -1.0, "--temperature -1.0"),
        ("temperature", float("nan"), "--temperature nan"),
        ("top_k", -1, "--top-k -1"),
        ("top_p", 0.0, "--top-p 0.0"),
        ("top_p", 1.5, "--top-p 1.5"),
        ("seed", -1, "--seed -1"),
        ("max_new_tokens", 0, "--max-new-tokens 0"),
    ],
)
def test_bad_parameters(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{field: value})  # type: ignore[arg-type]
