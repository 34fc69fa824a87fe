"""From each rank's logits to the same token on every rank, without gathering the vocabulary.

Sampling is the Gumbel-max trick (Maddison et al., arXiv 1411.0030): argmax of logit / temperature + Gumbel
noise is a draw from the softmax. The noise of a token comes from a counter-based generator (Philox; Salmon et
al., SC 2011) at counter (token id, position) with key (seed, sequence): any rank can make the noise of any
token, so the choice is the same for every split of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from distinf.comm import Group

# Candidates that each rank offers at first when top_p has to see probabilities in order.
_TOP_P_CANDIDATES = 128


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. temperature 0 is greedy; top_k 0 and top_p 1 do not limit."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 128
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"--temperature {self.temperature}: expected 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k}: expected 0 (no limit) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p}: expected a number above 0 and at most 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"--seed {self.seed}: expected 0 .. 2^64 - 1")
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens}: expected 1 or more")


def sample(
    logits: torch.Tensor, vocab: range, params: SamplingParams, sequences: list[int], positions: list[int], group: Group
) -> list[int]:
    """Next token of each row, the same on every rank.

    logits fp32 [B, len(vocab)] are this rank's rows of the vocabulary; `sequences` and `positions` [B] are the
    counters of the noise: the row's index in the request and the position of the token to be chosen.
    """
    if params.temperature == 0:
        return _argmax(logits, vocab, group)
    scaled = logits / params.temperature
    noise = _gumbel(vocab, params.seed, sequences, positions)
    if params.top_k == 0 and params.top_p == 1:
        return _argmax(scaled + noise, vocab, group)
    return [_sample_limited(s[None], n[None], vocab, params, group) for s, n in zip(scaled, noise, strict=True)]


def _argmax(scores: torch.Tensor, vocab: range, group: Group) -> list[int]:
    """The token of the highest score of each row over all ranks, the lowest id on a tie."""
    rows = np.arange(len(scores))
    local = scores.numpy()
    place = local.argmax(1) if len(vocab) else rows  # the first of equals; ten times faster than torch's
    if group.world_size == 1:
        return [int(p) for p in place]
    mine = np.stack([local[rows, place] if len(vocab) else np.full(len(rows), -np.inf), place + vocab.start])
    everyone = group.all_gather(torch.from_numpy(mine.astype(np.float64))).numpy()  # ids are exact in fp64
    winner = everyone[:, 0].argmax(0)  # vocabularies ascend with the rank, so the first of equals is lowest
    return [int(i) for i in everyone[winner, 1, rows]]


def log_probs(logits: torch.Tensor, vocab: range, tokens: list[int], group: Group) -> torch.Tensor:
    """Natural log of the probability that each row gives its token: fp64 [B], the same on every rank.

    logits fp32 [B, len(vocab)] are this rank's rows of the vocabulary; two numbers of each row travel, its
    log-sum-exp here and the token's logit from the rank that holds it.
    """
    places = torch.tensor(tokens) - vocab.start
    here = (places >= 0) & (places < len(vocab))
    mine = torch.full((2, len(logits)), -torch.inf, dtype=torch.float64)
    mine[0] = logits.logsumexp(1)
    mine[1, here] = logits[here, places[here]].double()
    totals, chosen = group.all_gather(mine).unbind(1)
    return chosen.amax(0) - totals.logsumexp(0)


def _best(group: Group, vocab: range, k: int, scores: torch.Tensor, *carried: torch.Tensor) -> list[torch.Tensor]:
    """The k best scores of all ranks [B, k], best first and the lower id first on a tie.

    Returns the scores, what `carried` (like scores, [B, len(vocab)]) has at their places, and last the token ids.
    """
    local_k = min(k, len(vocab))
    values, places = scores.topk(local_k) if local_k else (scores, scores.long())
    columns = [values, *(c.gather(1, places) for c in carried), places + vocab.start]
    mine = torch.full((len(columns), len(scores), k), -torch.inf, dtype=torch.float64)  # ids are exact in fp64
    for row, column in zip(mine, columns, strict=True):
        row[:, :local_k] = column
    everyone = group.all_gather(mine).permute(1, 2, 0, 3).flatten(2)  # [columns, B, world_size * k]
    order = torch.from_numpy(np.lexsort((everyone[-1].numpy(), -everyone[0].numpy()))[:, :k])
    best = [column.gather(1, order) for column in everyone]
    return [*best[:-1], best[-1].long()]


def _gumbel(vocab: range, seed: int, sequences: list[int], positions: list[int]) -> torch.Tensor:
    """Gumbel noise fp32 [B, len(vocab)] of the tokens in `vocab`."""
    first = vocab.start // 4  # one Philox counter gives four numbers
    rows = []
    for sequence, position in zip(sequences, positions, strict=True):
        bits = np.random.Philox(key=[seed, sequence], counter=[first, position, 0, 0])
        raw = bits.random_raw(4 * (-(-vocab.stop // 4) - first))[vocab.start - 4 * first :][: len(vocab)]
        rows.append((raw >> np.uint64(11)) * 2.0**-53)
    uniform = np.clip(np.stack(rows), 2.0**-53, None)  # log(0) has no place in a maximum
    return torch.from_numpy(-np.log(-np.log(uniform))).float()


def _sample_limited(
    scaled: torch.Tensor, noise: torch.Tensor, vocab: range, params: SamplingParams, group: Group
) -> int:
    """One row [1, len(vocab)] under top_k, then top_p: noise decides among the candidates that both leave."""
    total_vocab = int(group.all_gather(torch.tensor([len(vocab)])).sum())
    log_total = group.all_gather(scaled.double().logsumexp(1)).logsumexp(0)
    k = params.top_k or _TOP_P_CANDIDATES
    while True:
        k = min(k, total_vocab)
        scores, noises, ids = (column[0] for column in _best(group, vocab, k, scaled, noise))
        probs = (scores - (scores.logsumexp(0) if params.top_k else log_total)).exp()
        before = probs.cumsum(0) - probs
        if params.top_k or k == total_vocab or before[-1] >= params.top_p:
            # The token that crosses top_p is in, so one is always left.
            return int(ids[(scores + noises).masked_fill(before >= params.top_p, -torch.inf).argmax()])
        k *= 8  # the nucleus reaches past the candidates
