"""Shares into ranges."""

from __future__ import annotations

from fractions import Fraction

import pytest

from distinf.shard import TILE, ShardPlan, parse_shares, split, split_heads


def test_split_of_qwen2_72b_ffn_is_uneven_on_eight_equal_ranks() -> None:
    sizes = [len(r) for r in split(29568, [1] * 8, multiple=64)]
    assert sorted(sizes) == [3648] * 2 + [3712] * 6


def test_split_gives_a_gpu_rank_its_larger_part() -> None:
    assert len(split(29568, [1] * 8 + [4], multiple=64)[-1]) == 9856


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 576, 1536, 49152, 151936])
@pytest.mark.parametrize("shares", [[1], [1, 1], [1, 1, 1], [3, 1], [0, 1], [1, 0, 2], [Fraction("0.6"), 1, 1]])
@pytest.mark.parametrize("multiple", [1, 32])
def test_split_covers_all_in_order_on_multiples(n: int, shares: list[Fraction | int], multiple: int) -> None:
    ranges = split(n, shares, multiple)
    assert [i for r in ranges for i in r] == list(range(n))
    assert all(r.start % multiple == 0 or r.start == n for r in ranges)
    for r, share in zip(ranges, shares, strict=True):
        assert share or not r
        assert abs(len(r) - Fraction(n) * share / sum(shares)) <= multiple


def test_nine_heads_on_two_ranks_repeat_a_kv_head() -> None:
    first, second = split_heads(9, 3, [1, 1])
    assert (first.q, first.kv) == (range(0, 5), range(0, 2))
    assert (second.q, second.kv) == (range(5, 9), range(1, 3))


def test_whole_groups_are_kept_where_that_costs_nothing() -> None:
    assert [h.kv for h in split_heads(32, 8, [1, 1])] == [range(0, 4), range(4, 8)]
    assert [len(h.kv) for h in split_heads(32, 8, [1] * 8)] == [1] * 8


@pytest.mark.parametrize("n_heads, n_kv", [(9, 3), (32, 8), (64, 8), (7, 7), (5, 1), (14, 2)])
@pytest.mark.parametrize("shares", [[1], [1, 1], [1, 1, 1, 1], [3, 1], [0, 1], [5, 1, 1]])
def test_every_query_head_has_its_kv_head(n_heads: int, n_kv: int, shares: list[int]) -> None:
    heads = split_heads(n_heads, n_kv, shares)
    assert [q for h in heads for q in h.q] == list(range(n_heads))
    for h in heads:
        assert {q // (n_heads // n_kv) for q in h.q} == set(h.kv)


def test_plan_of_smollm2_over_four_ranks() -> None:
    """Single heads would load a rank as much as a whole group does, so one rank has none."""
    plan = ShardPlan.build(9, 3, 1536, 49152, [1] * 4)
    assert sorted(len(s.q_heads) for s in plan.shards) == [0, 3, 3, 3]
    assert all(s.ffn and len(s.ffn) % TILE == 0 and len(s.vocab) % TILE == 0 for s in plan.shards)


def test_whole_experts_go_by_ffn_shares_and_a_rank_may_have_none() -> None:
    plan = ShardPlan.build(4, 2, 128, 64, [0, 3, 1], n_experts=5, expert_ffn=40, shared_ffn=128, expert_parallel=True)
    assert [(s.experts, s.expert_ffn) for s in plan.shards] == [
        (range(0), range(0)), (range(4), range(40)), (range(4, 5), range(40))
    ]  # fmt: skip
    assert [s.shared_ffn for s in plan.shards] == [range(0), range(96), range(96, 128)]


def test_more_ranks_than_the_model_can_use() -> None:
    with pytest.raises(ValueError, match=r"5 ranks are more than the model can use: rank \d would hold nothing"):
        ShardPlan.build(2, 1, 64, 128, [1] * 5)
    ShardPlan.build(2, 1, 64, 128, [1, 1, 0, 0, 0])  # a share of zero asks for nothing


@pytest.mark.parametrize(
    "text, message",
    [
        ("1,1,1", "has 3 entries but there are 2 ranks"),
        ("1", "has 1 entries but there are 2 ranks"),
        ("3,-1", "cannot be negative"),
        ("0,0", "at least one share must be above zero"),
        ("a,b", "expected numbers"),
        ("", "expected numbers"),
        ("1,nan", "expected numbers"),
        ("1/0,1", "expected numbers"),
    ],
)
def test_bad_shares(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_shares(text, 2)


def test_shares_are_exact() -> None:
    assert parse_shares("0.6, 1", 2) == (Fraction(3, 5), Fraction(1))
    assert parse_shares(None, 3) == (1, 1, 1)
