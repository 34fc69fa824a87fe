"""Shares from times. The times are made up, so that what is right can be computed; perf/hetero.py takes real ones."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from distinf import LLM
from distinf.comm.single import SingleGroup
from distinf.config import ModelConfig, MoeConfig, RopeConfig
from distinf.device import Device
from distinf.hetero.profile import measure, one_shard, phase_bytes
from distinf.hetero.solve import (
    Line,
    Lines,
    Room,
    best_shares,
    fill_units,
    fit,
    streamed,
    streamed_shares,
    token_s,
    water_fill,
    width,
)
from distinf.hetero.tune import Candidate, candidates, choose, judge, read, write
from distinf.kernels.emulated import Rates, emulated
from distinf.shard import TILE, PhaseShares
from tests.families import RECIPES

# Seconds that a plain rank takes for the whole of a phase: the lab model on one core that reads 20 GB/s.
WHOLE_S = {"attention": 1.05e-3, "ffn": 5e-3, "vocab": 10e-3}
UNLIMITED = Room({"attention": 1, "ffn": 1, "vocab": 1}, [float("inf")] * 2)


def config(n_heads: int = 32, n_kv_heads: int = 8, ffn: int = 8192, vocab: int = 49152) -> ModelConfig:
    return ModelConfig("llama", 2048, ffn, 16, n_heads, n_kv_heads, 64, vocab, 4096, 1e-5, RopeConfig(1e4, 64))


def lines_of(speed: float, latency_us: float = 0, scale: float = 1) -> Lines:
    """A plain rank, and one that is `speed` times as fast and late by a latency."""
    return {p: [Line(0, scale * t), Line(1e-6 * latency_us, scale * t / speed)] for p, t in WHOLE_S.items()}


def test_a_line_is_found_again_and_never_below_zero() -> None:
    exact = Line(3e-5, 2e-3)
    found = fit([(w, exact(w)) for w in (0.25, 0.5, 1)])
    assert (found.fixed_s, found.whole_s) == (pytest.approx(3e-5), pytest.approx(2e-3))
    assert fit([(0.5, 1.0), (1, 2.5)]) == Line(0, pytest.approx(2.4))  # least squares through the origin
    assert fit([(0.5, 2.0), (1, 1.0)]) == Line(1.5, 0)
    assert fit([(0.5, 2.0)]) == Line(0, 4.0)
    assert exact(0) == 0


WORLDS = list(itertools.product([1, 2, 8], [0, 25, 100]))


@pytest.mark.parametrize("speed, latency_us", WORLDS)
def test_two_ranks_finish_together_as_the_formula_has_it(speed: float, latency_us: float) -> None:
    for host, device in lines_of(speed, latency_us).values():
        (w_host, w_device), time_s = water_fill([host, device], [1, 1])
        expected = (host.whole_s - device.fixed_s) / (host.whole_s + device.whole_s)
        assert w_device == pytest.approx(expected) and w_host == pytest.approx(1 - expected)
        assert host(w_host) == pytest.approx(time_s) and device(w_device) == pytest.approx(time_s)


def test_caps_are_kept_and_the_others_share_the_rest() -> None:
    same = [Line(0, 1.0)] * 3
    assert water_fill(same, [0.1, 1, 1])[0] == pytest.approx([0.1, 0.45, 0.45])
    assert water_fill([Line(2.0, 1.0), *same[1:]], [1, 1, 1])[0] == pytest.approx([0, 0.5, 0.5])
    with pytest.raises(ValueError, match=r"the ranks have room for 0.90 of the model"):
        water_fill(same, [0.3, 0.3, 0.3])
    with pytest.raises(ValueError, match="the ranks have room for 6 of 10 units"):
        fill_units(same, 10, [0.2, 0.2, 0.2])


@pytest.mark.parametrize("caps", [[1, 1, 1], [0.3, 1, 1]])
def test_no_other_split_into_units_is_faster(caps: list[float]) -> None:
    lines, n = [Line(0.1, 3.0), Line(0.4, 1.0), Line(0, 2.0)], 12

    def slowest(counts: tuple[int, ...]) -> float:
        return max(line(c / n) for line, c in zip(lines, counts, strict=True))

    every = [c for c in itertools.product(range(n + 1), repeat=3) if sum(c) == n and c[0] <= caps[0] * n]
    found = fill_units(lines, n, caps)
    assert tuple(found) in every and slowest(tuple(found)) == min(map(slowest, every))


@pytest.mark.parametrize("speed, latency_us", WORLDS)
def test_shares_are_the_best_of_an_exhaustive_sweep_and_a_unit_from_the_formula(
    speed: float, latency_us: float
) -> None:
    model, lines = config(), lines_of(speed, latency_us)
    shares = best_shares(model, lines, UNLIMITED)
    best = token_s(model, lines, shares)
    for phase, n, unit in (("attention", 8, 1), ("ffn", 8192 // TILE, 1), ("vocab", 49152 // TILE, 1)):
        for count in range(n + 1):
            other = replace(shares, **{phase: (Fraction(n - count), Fraction(count))})
            assert best <= token_s(model, lines, other) + 1e-12, (phase, count)
        exact = water_fill(lines[phase], [1, 1])[0][1]
        of_phase = getattr(shares, phase)
        assert abs(of_phase[1] / sum(of_phase) - Fraction(exact)) <= Fraction(unit, n), phase


@pytest.mark.parametrize("multiple", [TILE, 128])
def test_experts_are_split_by_their_own_columns(multiple: int) -> None:
    moe = MoeConfig(layers=(True,) * 16, n_experts=8, top_k=2, ffn=1408, shared_ffn=2816)
    model, lines = replace(config(), moe=moe), lines_of(3, latency_us=50)
    shares = best_shares(model, lines, UNLIMITED, multiple)
    best, n = token_s(model, lines, shares, 0.0, multiple), 1408 // multiple
    for count in range(n + 1):
        other = replace(shares, ffn=(Fraction(n - count), Fraction(count)))
        assert best <= token_s(model, lines, other, 0.0, multiple) + 1e-12, count
    assert sum(shares.ffn) == n and shares.ffn[1] > shares.ffn[0] > 0


def test_what_is_measured_is_a_layer_with_experts_and_latent_attention(tmp_path: Path) -> None:
    """8 experts of 40 columns and a shared one of 80, 3 for a token; 3 heads; 3 layers, hidden 96."""
    RECIPES["deepseek_v2"]["groups"](tmp_path)
    loaded = LLM(str(tmp_path), dtype="fp32", group=SingleGroup()).loaded
    ffn, head = 96 * 3 * (8 * 40 + 80), 199 * 96
    attention = 3 * (32 * 48 + 64 * 20 + 32 * 64 + 96 * 32)
    assert phase_bytes(loaded.plan) == {"attention": 12 * attention, "ffn": 12 * ffn, "vocab": 4 * head}
    half = one_shard(loaded.plan, Fraction(1, 2))
    used = 3 * len(half.expert_ffn) + len(half.shared_ffn)
    assert width(loaded.plan.config, half, "ffn") == used / (3 * 40 + 80)
    found = measure(loaded.plan, SingleGroup(), lambda: emulated(loaded.kernels, Rates(0.1, 1)), (1, 4))
    for rows, experts in ((1, 3), (4, 8)):
        (line,) = found.lines[rows]["ffn"]
        assert line(1) >= 0.9 * 4 * 96 * 3 * (experts * 40 + 80) / 1e8  # a fit: not every point is on it


def test_a_model_too_small_to_gain_stays_off_the_device() -> None:
    """Its whole FFN takes a plain rank 5 us: less than the latency."""
    shares = best_shares(config(), lines_of(8, latency_us=100, scale=1e-3), UNLIMITED)
    assert all(of_ranks[1] == 0 for of_ranks in vars(shares).values())


def test_ranks_throttled_two_to_one_reach_the_bound_which_equal_shares_miss_by_a_third() -> None:
    model, lines = config(), lines_of(2)
    bound_s = sum(n * water_fill(lines[p], [1, 1])[1] for p, n in (("attention", 16), ("ffn", 16), ("vocab", 1)))
    assert bound_s / token_s(model, lines, best_shares(model, lines, UNLIMITED)) >= 0.97
    assert bound_s / token_s(model, lines, PhaseShares.of([1, 1])) == pytest.approx(2 / 3, abs=1e-3)


def test_memory_is_not_exceeded_and_attention_gives_way_first() -> None:
    sizes = {"attention": 30, "ffn": 100, "vocab": 20}
    shares = best_shares(config(), lines_of(8), Room(sizes, [float("inf"), 100.0]))
    taken = sum(size * float(getattr(shares, p)[1] / sum(getattr(shares, p))) for p, size in sizes.items())
    assert 95 < taken <= 100
    assert shares.attention[1] == 0 < shares.ffn[1]
    with pytest.raises(ValueError, match="room for"):
        best_shares(config(), lines_of(8), Room(sizes, [10.0, 100.0]))


def test_what_a_device_has_no_room_for_is_streamed_when_the_link_pays() -> None:
    """Bytes W are those that the plain rank reads in its time at 10 GB/s. With room for a part m of them and a link of
    L GB/s, a fast device and the plain rank finish together after (1 - m) W / (10 + L).
    """
    model, lines, inf = config(), lines_of(8), float("inf")
    sizes = {p: round(1e10 * of_ranks[0].whole_s * (1 if p == "vocab" else 16)) for p, of_ranks in lines.items()}
    alone_s = token_s(model, lines, PhaseShares.of([1, 0]))
    for link_gb_s in (5.0, 20.0):
        room = Room(sizes, [inf, 0.2 * sum(sizes.values())], [0.0, link_gb_s])
        shares = streamed_shares(model, lines, room)
        found_s = token_s(model, streamed(model, lines, room, shares), shares)
        assert found_s == pytest.approx(0.8 * alone_s / (1 + link_gb_s / 10), rel=0.03), link_gb_s
        assert "partly streamed" in dict(candidates(model, lines, room, (Device(), Device("cuda"))))
    times = []
    for part in (0.001, 0.01, 0.2, 0.5, 0.95):
        room = Room(sizes, [inf, part * sum(sizes.values())], [0.0, 5.0])
        shares = streamed_shares(model, lines, room)
        times.append(token_s(model, streamed(model, lines, room, shares), shares))
    assert times == sorted(times, reverse=True)
    assert times[-1] == pytest.approx(token_s(model, lines, best_shares(model, lines, UNLIMITED)), rel=0.01)
    assert streamed(model, lines, UNLIMITED, PhaseShares.of([1, 1])) is lines


def test_all_and_nothing_are_candidates_where_they_fit() -> None:
    devices = (Device(), Device("emulated"))
    names = dict(candidates(config(), lines_of(4), UNLIMITED, devices))
    assert {"balanced", "no device", "device only"} <= set(names) and len(names) == 5
    assert all(share[1] == 0 for share in vars(names["no device"]).values())
    assert all(share[0] == 0 for share in vars(names["device only"]).values())
    small = Room({"attention": 3, "ffn": 10, "vocab": 2}, [float("inf"), 5.0])
    assert "device only" not in dict(candidates(config(), lines_of(4), small, devices))
    assert [name for name, _ in candidates(config(), lines_of(2), UNLIMITED, (Device(), Device()))] == ["balanced"]
    useless = candidates(config(), lines_of(8, latency_us=1e6), UNLIMITED, devices)
    assert [name for name, _ in useless] == ["no device", "device only"]  # no shares twice


def test_the_prediction_holds_unless_another_is_clearly_faster() -> None:
    shares = PhaseShares.of([1, 1])
    best, near, far = (
        Candidate(name, shares, predicted, measured)
        for name, predicted, measured in (("best", 10, 11), ("near", 12, 10.9), ("far", 20, 19))
    )
    assert choose([far, near, best]) is best
    assert choose([far, replace(near, measured_ms=10), best]).name == "near"
    assert choose([far]) is far


def test_one_disturbed_trial_does_not_shift_the_predictions() -> None:
    options = [(name, PhaseShares.of([1, i])) for i, name in enumerate(("given", "best", "near", "untried"))]
    found, rest_ms = judge(options, [10.0, 8.0, 9.0, 20.0], [14.5, 9.0, 10.0])
    assert rest_ms == 1
    assert [c.predicted_ms for c in found] == [11, 9, 10, 21]
    assert [c.measured_ms for c in found] == [14.5, 9, 10, None]
    assert [(c.name, c.shares) for c in found] == options


def test_the_cache_is_for_one_key_and_survives_damage(tmp_path: Path) -> None:
    path, key = tmp_path / "new" / "file.json", {"hosts": [("a", 1)], "batch": 1}
    assert read(path, key) is None
    write(path, key, Candidate("balanced", PhaseShares.of([Fraction(1, 3), 2]), 1.0, 2.0))
    assert read(path, key) == {phase: ["1/3", "2"] for phase in ("attention", "ffn", "vocab")}
    assert read(path, {**key, "batch": 2}) is None
    assert list(path.parent.iterdir()) == [path]
    for text in ("", "{", "[]", "{}", '{"key": 1, "shares": 2}'):
        path.write_text(text)
        assert read(path, key) is None
