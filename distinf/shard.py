"""Shares into ranges: who holds which heads, FFN columns and vocabulary rows. Integers only, no tensor in sight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

# FFN and vocabulary ranges end on multiples of this: one packed panel of the kernels, one block of every
# GGUF type with 32-element blocks, one group of the smallest int4 group size.
TILE = 32


def parse_shares(text: str | None, world_size: int) -> tuple[Fraction, ...]:
    """`"3,1"` -> (3, 1); None -> equal shares.

    Raises ValueError naming `--shares` when a share is no number or negative, when all are zero, or when
    there is not one share for each of the `world_size` ranks.
    """
    if text is None:
        return (Fraction(1),) * world_size
    try:
        shares = tuple(Fraction(part.strip()) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"--shares {text!r}: expected numbers separated by commas, such as 1,1 or 3,1") from None
    if len(shares) != world_size:
        raise ValueError(f"--shares {text!r} has {len(shares)} entries but there are {world_size} ranks")
    if min(shares) < 0:
        raise ValueError(f"--shares {text!r}: a share cannot be negative")
    if sum(shares) == 0:
        raise ValueError(f"--shares {text!r}: at least one share must be above zero")
    return shares


def split(n: int, shares: Sequence[Fraction | int], multiple: int = 1) -> list[range]:
    """Split `range(n)` into one contiguous range per share, on multiples of `multiple`.

    Each boundary is the cumulated share rounded to the nearest multiple, so no range is off by more than one
    multiple; a zero share gets an empty range.
    """
    total = sum(Fraction(s) for s in shares)
    units = -(-n // multiple)
    bounds = [min(n, multiple * int(units * s / total + Fraction(1, 2))) for s in accumulate(map(Fraction, shares))]
    return [range(a, b) for a, b in zip([0, *bounds[:-1]], bounds, strict=True)]


@dataclass(frozen=True)
class HeadRange:
    """One rank's query heads and the KV heads that they read (a KV head may stand on two ranks)."""

    q: range
    kv: range


def split_heads(n_heads: int, n_kv_heads: int, shares: Sequence[Fraction | int]) -> list[HeadRange]:
    """Split attention heads by shares: by single query heads or by whole KV groups, whichever loads ranks less.

    A rank's load is its QKV and output projections, `2 q + 2 kv` head widths, per unit of share. A split by
    query heads may repeat a KV head on two ranks; on a tie whole groups win, for their smaller KV cache.
    """
    group = n_heads // n_kv_heads
    by_group = [HeadRange(range(r.start * group, r.stop * group), r) for r in split(n_kv_heads, shares)]
    by_head = [
        HeadRange(r, range(r.start // group, -(-r.stop // group)) if r else range(0)) for r in split(n_heads, shares)
    ]

    def load(heads: list[HeadRange]) -> Fraction:
        return max((len(h.q) + len(h.kv)) / Fraction(s) for h, s in zip(heads, shares, strict=True) if s)

    return by_group if load(by_group) <= load(by_head) else by_head


@dataclass(frozen=True)
class PhaseShares:
    """Each rank's share of the parts of a model that finish together: attention heads, FFN columns, vocabulary.

    One FFN share serves prefill and decode: two would keep the columns between them packed a second time.
    """

    attention: tuple[Fraction, ...]
    ffn: tuple[Fraction, ...]
    vocab: tuple[Fraction, ...]

    @staticmethod
    def of(shares: PhaseShares | Sequence[Fraction | int]) -> PhaseShares:
        """The same shares of everything, unless they are given for each part."""
        if isinstance(shares, PhaseShares):
            return shares
        same = tuple(map(Fraction, shares))
        return PhaseShares(same, same, same)

    def with_device(self, rank: int, fractions: tuple[Fraction, Fraction, Fraction]) -> PhaseShares:
        """`rank` takes a fraction of each part and the others what is left, by the shares they have.

        Raises ValueError naming `--gpu-fraction` when a part is left to others that have no share.
        """
        attention, ffn, vocab = (
            _with_device(shares, rank, f)
            for shares, f in zip((self.attention, self.ffn, self.vocab), fractions, strict=True)
        )
        return PhaseShares(attention, ffn, vocab)


def _with_device(shares: tuple[Fraction, ...], rank: int, fraction: Fraction) -> tuple[Fraction, ...]:
    others = sum(shares) - shares[rank]
    if others == 0 and fraction < 1:
        raise ValueError(f"--gpu-fraction {float(fraction):g} leaves a part to other ranks, but none has a share")
    return tuple(
        fraction if r == rank else (1 - fraction) * share / others if others else Fraction(0)
        for r, share in enumerate(shares)
    )


@dataclass(frozen=True)
class Shard:
    """What one rank holds: ranges over the whole model's heads, FFN columns and vocabulary."""

    q_heads: range
    kv_heads: range
    ffn: range
    vocab: range
    experts: range = range(0)  # all, unless they are divided
    expert_ffn: range = range(0)  # of each of these
    shared_ffn: range = range(0)


@dataclass(frozen=True)
class ShardPlan:
    """Every rank's shard of one model."""

    shards: tuple[Shard, ...]

    @staticmethod
    def build(
        n_heads: int,
        n_kv_heads: int,
        ffn: int,
        vocab: int,
        shares: PhaseShares | Sequence[Fraction | int],
        n_experts: int = 0,
        expert_ffn: int = 0,
        shared_ffn: int = 0,
        ffn_multiple: int = TILE,
        expert_parallel: bool = False,
    ) -> ShardPlan:
        """Plan for as many ranks as there are shares. Each expert is split like a plain FFN and all ranks work on all,
        or with `expert_parallel` each is one rank's.

        Ranges of FFN columns end on multiples of `ffn_multiple`, itself a multiple of TILE.

        Raises ValueError when a rank with a share above zero would get neither heads nor FFN columns.
        """
        of = PhaseShares.of(shares)
        heads = split_heads(n_heads, n_kv_heads, of.attention)
        ffns, shared = (split(n, of.ffn, ffn_multiple) for n in (ffn, shared_ffn))
        vocabs = split(vocab, of.vocab, TILE)
        if expert_parallel:
            experts = split(n_experts, of.ffn)
            columns = [range(expert_ffn if mine else 0) for mine in experts]
        else:
            experts, columns = [range(n_experts)] * len(heads), split(expert_ffn, of.ffn, ffn_multiple)
        shards = tuple(
            Shard(h.q, h.kv, *rest) for h, *rest in zip(heads, ffns, vocabs, experts, columns, shared, strict=True)
        )
        for rank, shard in enumerate(shards):
            if (of.attention[rank] or of.ffn[rank]) and not shard.q_heads and not shard.ffn:
                raise ValueError(
                    f"{len(shards)} ranks are more than the model can use: rank {rank} would hold nothing of "
                    f"{n_heads} heads and {ffn} FFN columns (in units of {ffn_multiple})"
                )
        return ShardPlan(shards)
