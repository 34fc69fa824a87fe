"""From each rank's time for its share to the shares with which all finish together. Nothing is measured here.

A token takes n_layers * (attention + ffn) + vocab, each phase as long as its slowest rank, and two reductions a layer.
The balance is HeteGen's (Zhao et al., MLSys 2024: T_CPU = T_GPU + T_COM), for any number of ranks, by water-filling.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import inf

from distinf.config import ModelConfig
from distinf.device import PHASES
from distinf.kernels.stream import buffer_bytes
from distinf.plan import split_model
from distinf.shard import TILE, PhaseShares, Shard


@dataclass(frozen=True)
class Line:
    """Seconds that a rank takes for the share w of a phase: fixed_s + whole_s * w, and none for w = 0."""

    fixed_s: float
    whole_s: float

    def __call__(self, share: float) -> float:
        return self.fixed_s + self.whole_s * share if share > 0 else 0.0


# Of one number of rows: phase -> each rank's line. Attention's and ffn's are of one layer.
Lines = dict[str, list[Line]]


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """Least squares through (share, seconds), with neither part below zero."""
    n = len(points)
    mean_w, mean_t = sum(w for w, _ in points) / n, sum(t for _, t in points) / n
    spread = sum((w - mean_w) ** 2 for w, _ in points)
    whole = sum((w - mean_w) * (t - mean_t) for w, t in points) / spread if spread else 0.0
    fixed = mean_t - whole * mean_w
    if fixed < 0 or not spread:
        return Line(0.0, sum(w * t for w, t in points) / sum(w * w for w, _ in points))
    return Line(fixed, whole) if whole > 0 else Line(mean_t, 0.0)


def water_fill(lines: Sequence[Line], caps: Sequence[float]) -> tuple[list[float], float]:
    """Shares, of sum 1 and at most `caps`, with the least time for the slowest rank; and that time in seconds.

    Where no cap is met, T = (1 + sum fixed/whole) / sum 1/whole over the ranks with fixed < T; w = (T - fixed) / whole.
    Raises ValueError when the caps leave a part to nobody.
    """
    if sum(caps) < 1:
        raise ValueError(f"the ranks have room for {sum(caps):.2f} of the model, expected at least 1")

    def shares(level_s: float) -> list[float]:
        # A line without slope is all or nothing: past its fixed time it takes what its cap allows.
        return [
            0.0
            if level_s <= line.fixed_s
            else min(cap, (level_s - line.fixed_s) / line.whole_s if line.whole_s else cap)
            for line, cap in zip(lines, caps, strict=True)
        ]

    low, high = 0.0, max(line.fixed_s + line.whole_s for line in lines) + 1e-12
    for _ in range(100):  # halvings: past the precision of a double
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle)) < 1 else (low, middle)
    found = shares(high)
    return [w / sum(found) for w in found], high


def fill_units(lines: Sequence[Line], n: int, caps: Sequence[float]) -> list[int]:
    """n equal units over ranks, so that the slowest rank's time is least: each goes to the rank that would have it done
    first, which is optimal since no time falls with more units.
    """
    counts = [0] * len(lines)
    room = [int(cap * n + 1e-9) for cap in caps]
    queue = [(line(1 / n), rank) for rank, line in enumerate(lines) if room[rank]]
    heapq.heapify(queue)
    for _ in range(n):
        if not queue:
            raise ValueError(f"the ranks have room for {sum(counts)} of {n} units, expected all of them")
        _, rank = heapq.heappop(queue)
        counts[rank] += 1
        if counts[rank] < room[rank]:
            heapq.heappush(queue, (lines[rank]((counts[rank] + 1) / n), rank))
    return counts


@dataclass(frozen=True)
class Room:
    """Bytes that each phase takes in the whole model, and that each rank may hold (inf: no limit).

    A rank with a link, of so many GB/s, may have more than it holds: the rest is streamed in every step.
    """

    phase_bytes: dict[str, int]
    rank_bytes: list[float]
    link_gb_s: list[float] = field(default_factory=list)  # of each rank; 0, or []: no link

    def caps(self, taken: list[float], phase: str) -> list[float]:
        """Largest share of a phase for each rank that has `taken` bytes already."""
        size = self.phase_bytes[phase]
        return [min(1.0, max(0.0, (all_ - used) / size)) for all_, used in zip(self.rank_bytes, taken, strict=True)]


def best_shares(config: ModelConfig, lines: Lines, room: Room, ffn_multiple: int = TILE) -> PhaseShares:
    """Whole heads, or whole KV groups, and whole tiles for each rank: the least time that `token_s` has for them.

    Memory goes to FFN and head first: the KV cache grows with attention. Raises ValueError when memory does not do.
    """
    taken = [0.0] * len(room.rank_bytes)
    counts: dict[str, list[int]] = {}
    ffn = config.moe.ffn if config.moe else config.ffn
    for phase, units in (("ffn", -(-ffn // ffn_multiple)), ("vocab", -(-config.vocab // TILE))):
        counts[phase] = fill_units(lines[phase], units, room.caps(taken, phase))
        total = sum(counts[phase])
        taken = [t + room.phase_bytes[phase] * c / total for t, c in zip(taken, counts[phase], strict=True)]
    heads = [
        fill_units(lines["attention"], n, room.caps(taken, "attention")) for n in (config.n_heads, config.n_kv_heads)
    ]
    options = [
        PhaseShares(_fractions(attention), _fractions(counts["ffn"]), _fractions(counts["vocab"]))
        for attention in heads
    ]
    return min(options, key=lambda shares: token_s(config, lines, shares, 0.0, ffn_multiple))


def streamed(config: ModelConfig, lines: Lines, room: Room, shares: PhaseShares) -> Lines:
    """The lines of ranks with these shares: what has to come over a link takes at least the link's time.

    Every phase streams the same part, and copies run ahead of their use, so that the link never rests.
    """
    if not any(room.link_gb_s):
        return lines
    found: Lines = {}
    for phase, of_ranks in lines.items():
        layer_bytes = room.phase_bytes[phase] / (1 if phase == "vocab" else config.n_layers)
        found[phase] = []
        for rank, (line, link) in enumerate(zip(of_ranks, room.link_gb_s, strict=True)):
            taken = _taken(room, shares, rank)
            rest = max(0.0, 1 - room.rank_bytes[rank] / taken) if taken and link else 0.0
            link_s = rest * layer_bytes / (1e9 * link) if rest else 0.0
            found[phase].append(replace(line, whole_s=max(line.whole_s, link_s)))
    return found


# Of shares and the part of them that has to be streamed, each of which decides the other.
_ROUNDS = 8
# Of the memory that buffers may take: shares in whole heads and tiles are a little more or less than these fractions.
_FULL = 0.95


def streamed_shares(config: ModelConfig, lines: Lines, room: Room, ffn_multiple: int = TILE) -> PhaseShares:
    """The best shares when ranks with a link may have more than they hold.

    Raises ValueError without room for the model, or for the buffers that streaming takes.
    """
    n = len(room.rank_bytes)
    most = [inf if link else held for held, link in zip(room.rank_bytes, room.link_gb_s, strict=True)]
    slower = streamed(config, lines, replace(room, rank_bytes=[0.0] * n), PhaseShares.of([1] * n))
    options = []
    for _ in range(_ROUNDS):
        shares = best_shares(config, slower, replace(room, rank_bytes=most), ffn_multiple)
        taken = [_taken(room, shares, rank) for rank in range(n)]
        needs = [min(taken[rank], _buffers(config, room, shares, rank)) for rank in range(n)]
        allowed = [_FULL * held for held in room.rank_bytes]
        if all(need <= held for need, held in zip(needs, allowed, strict=True)):
            options.append(shares)
        for rank in range(n):
            if needs[rank] > allowed[rank]:
                most[rank] = taken[rank] * allowed[rank] / needs[rank]
        slower = streamed(config, lines, room, shares)
    if not options:
        raise ValueError("the devices' memory is too small for the buffers of streamed weights")
    return min(options, key=lambda s: token_s(config, streamed(config, lines, room, s), s, ffn_multiple=ffn_multiple))


def _taken(room: Room, shares: PhaseShares, rank: int) -> float:
    """Bytes of a rank's share."""
    return sum(size * float(_part(shares, phase, rank)) for phase, size in room.phase_bytes.items())


def _buffers(config: ModelConfig, room: Room, shares: PhaseShares, rank: int) -> int:
    """Bytes that streaming a rank's share takes at least."""
    of = {phase: size * float(_part(shares, phase, rank)) for phase, size in room.phase_bytes.items()}
    layer = int((of["attention"] + of["ffn"]) / config.n_layers)
    return sum(buffer_bytes([layer] * config.n_layers + [int(of["vocab"])]))


def _part(shares: PhaseShares, phase: str, rank: int) -> Fraction:
    of_ranks: tuple[Fraction, ...] = getattr(shares, phase)
    return of_ranks[rank] / sum(of_ranks)


def _fractions(counts: Sequence[int]) -> tuple[Fraction, ...]:
    return tuple(Fraction(c) for c in counts)


def token_s(
    config: ModelConfig, lines: Lines, shares: PhaseShares, reduce_s: float = 0.0, ffn_multiple: int = TILE
) -> float:
    """Seconds of one step's GEMMs and reductions with these shares, rounded as they will be."""
    shards = split_model(config, shares, ffn_multiple)
    slowest = {
        phase: max(line(width(config, shard, phase)) for line, shard in zip(lines[phase], shards, strict=True))
        for phase in PHASES
    }
    return config.n_layers * (slowest["attention"] + slowest["ffn"] + 2 * reduce_s) + slowest["vocab"]


def width(config: ModelConfig, shard: Shard, phase: str) -> float:
    """A shard's part of a phase's weights: of the widths of q, k, v and o; of the experts' columns a token uses."""
    if phase == "attention":
        return (len(shard.q_heads) + len(shard.kv_heads)) / (config.n_heads + config.n_kv_heads)
    if phase == "ffn" and config.moe:
        moe = config.moe
        used = moe.top_k * len(shard.expert_ffn) + len(shard.shared_ffn)
        return used / (moe.top_k * moe.ffn + moe.shared_ffn)
    return len(getattr(shard, phase)) / int(getattr(config, phase))
