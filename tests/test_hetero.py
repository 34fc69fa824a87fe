"""Ranks of unequal speed: devices by flag, the emulated world's time. What the tuner does with it: test_tune.py."""

from __future__ import annotations

import json
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from distinf.comm.single import SingleGroup
from distinf.device import Device, check_gpus, device_rank, parse_devices, parse_fractions
from distinf.kernels.emulated import Rates, emulated, world_rates
from distinf.kernels.formats import FORMATS
from distinf.kernels.reference import ReferenceKernels
from distinf.kernels.routing import Router
from distinf.shard import PhaseShares, ShardPlan
from tests.conftest import ranks, run


def test_devices_of_ranks() -> None:
    assert parse_devices([], 2) == (Device(), Device())
    assert parse_devices(["emulated:speed=4,latency_us=25,link_gb_s=24"], 3)[1:] == (
        Device(),
        Device("emulated", speed=4, latency_us=25, link_gb_s=24),
    )
    assert parse_devices(["0=emulated:speed=2", "1=cpu"], 2) == (Device("emulated", speed=2), Device())
    assert parse_devices(["cuda", "0=cuda:1"], 2) == (Device("cuda", 1), Device("cuda", 0))
    for devices in (["0=emulated:speed=0.5,latency_us=3"], ["cuda:3"], []):
        once = parse_devices(devices, 2)
        assert parse_devices([f"{rank}={device}" for rank, device in enumerate(once)], 2) == once


@pytest.mark.parametrize(
    "texts, message",
    [
        (["tpu"], r"--device 'tpu': expected \[RANK=\]cpu\|cuda\|emulated"),
        (["cuda:x"], "--device 'cuda:x': 'x' is no index of a GPU"),
        (["cuda:-1"], "'-1' is no index of a GPU"),
        (["0=cuda", "1=emulated"], "--device cuda and --device emulated in one job"),
        (["2=emulated"], "--device '2=emulated': there are 2 ranks, 0 to 1"),
        (["1=emulated", "emulated"], "rank 1 has a device already"),
        (["emulated:sped=1"], "'sped' is unknown; expected one of speed"),
        (["cpu:speed=1"], "'speed' is unknown; expected one of none"),
        (["emulated:speed=0"], "speed is '0', expected a number above 0"),
        (["emulated:latency_us=-1"], "latency_us is '-1', expected a number from 0"),
        (["emulated:speed=nan"], "speed is 'nan'"),
    ],
)
def test_bad_devices(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_devices(texts, 2)


def test_no_two_ranks_of_a_host_have_one_gpu() -> None:
    devices = parse_devices(["0=cuda", "1=cuda:1", "2=cuda", "3=cpu"], 4)
    check_gpus(devices, [0, 1])
    check_gpus(devices, [1, 2, 3])
    with pytest.raises(ValueError, match=r"ranks 0 and 2 of \S+ are both on cuda:0; expected .* 2=cuda:1"):
        check_gpus(devices, [0, 1, 2, 3])


def test_fractions() -> None:
    assert parse_fractions("0.3") == (Fraction(3, 10),) * 3
    assert parse_fractions("0.2, 0.5,0") == (Fraction(1, 5), Fraction(1, 2), 0)
    for text in ("1.1", "-0.1", "0.5,0.5", "a", "", "nan"):
        with pytest.raises(ValueError, match=f"--gpu-fraction '{text}': expected a number from 0 to 1"):
            parse_fractions(text)
    for devices in ([], ["0=emulated", "1=emulated"]):
        with pytest.raises(ValueError, match=f"there are {len(devices)}"):
            device_rank(parse_devices(devices, 3))


def test_a_fraction_is_the_devices_and_the_rest_goes_by_shares() -> None:
    shares = PhaseShares.of([3, 1, 5]).with_device(2, parse_fractions("0.2,0.5,0"))
    assert shares.attention == (Fraction(6, 10), Fraction(2, 10), Fraction(2, 10))
    assert shares.ffn == (Fraction(3, 8), Fraction(1, 8), Fraction(1, 2))
    assert shares.vocab == (Fraction(3, 4), Fraction(1, 4), 0)
    whole = PhaseShares.of([1, 1]).with_device(0, parse_fractions("1"))
    shard, nothing = ShardPlan.build(6, 3, 208, 199, whole).shards
    assert (len(shard.q_heads), len(shard.ffn), len(shard.vocab)) == (6, 208, 199)
    assert not (nothing.q_heads or nothing.ffn or nothing.vocab)
    with pytest.raises(ValueError, match=r"--gpu-fraction 0.5 leaves a part to other ranks"):
        PhaseShares.of([1]).with_device(0, parse_fractions("0.5"))


def test_the_fastest_rank_has_the_worlds_rates_and_others_their_part() -> None:
    fast = Device("emulated", speed=4, latency_us=25, link_gb_s=24, read_gb_s=8, tflops=0.4)
    assert world_rates([Device(), fast]) == [Rates(2, 0.1), Rates(8, 0.4, pytest.approx(25e-6), 24)]
    slow = Device("emulated", speed=0.5, read_gb_s=8, tflops=0.4)
    assert world_rates([slow, Device()]) == [Rates(4, 0.2), Rates(8, 0.4)]


def test_a_gemm_takes_what_its_bytes_or_its_operations_need() -> None:
    rates = Rates(read_gb_s=2, tflops=0.1, latency_s=1e-4, link_gb_s=1)
    weight = ReferenceKernels(torch.bfloat16, 1).pack(torch.ones(100, 200), FORMATS["bf16"])
    assert rates.gemm_s(1, weight) == pytest.approx(2 * 100 * 200 / 2e9)
    assert rates.gemm_s(1000, weight) == pytest.approx(2 * 1000 * 100 * 200 / 1e11)
    assert rates.experts_s(3, [weight] * 2) == pytest.approx(2 * rates.gemm_s(1, weight))
    assert rates.experts_s(3, []) == 0  # all are other ranks'
    assert rates.crossing_s(1000) == pytest.approx(1e-4 + 1e-6)
    assert Rates(2, 0.1).crossing_s(1000) == 0


class LateGroup(SingleGroup):
    """Notes when partial sums come."""

    def __init__(self) -> None:
        self.came_s: list[float] = []

    def all_reduce_(self, x: torch.Tensor) -> None:
        self.came_s.append(time.perf_counter())


@pytest.mark.parametrize("latency_s", [0.0, 0.03])
def test_a_phase_is_never_early_and_numbers_are_the_same(latency_s: float) -> None:
    """Partial sums leave when the GEMMs of their phase have had their time and the latency is over."""
    plain = ReferenceKernels(torch.float32, 1)
    rates = Rates(read_gb_s=1e-3, tflops=1, latency_s=latency_s)
    kernels = emulated(plain, rates)
    up, down = (kernels.pack(torch.randn(50, 50), FORMATS["fp32"]) for _ in range(2))
    nothing = kernels.pack(torch.randn(50, 0), FORMATS["fp32"])
    x, group = torch.randn(2, 50), LateGroup()
    start = time.perf_counter()
    y = kernels.partial_linear(kernels.linear(x, up), down, None, group)
    assert torch.equal(y, plain.linear(plain.linear(x, up), down))
    assert group.came_s[0] - start >= 2 * 4 * 50 * 50 / 1e6 + latency_s
    start = time.perf_counter()
    assert torch.equal(kernels.linear(x, up, None, torch.float32), plain.linear(x, up))
    assert time.perf_counter() - start >= 4 * 50 * 50 / 1e6 + latency_s
    if latency_s:  # a phase without work is not late: a device that has no share costs nothing
        pauses = [0.0] * 5
        for i in range(len(pauses)):
            start = time.perf_counter()
            kernels.partial_linear(x[:, :0], nothing, None, group)
            pauses[i] = time.perf_counter() - start
        assert min(pauses) < latency_s


def test_heads_and_experts_have_their_time_before_the_sum_and_no_step_that_of_another() -> None:
    """Three tokens choose two experts of four: all four are read. The head's 64 x 40 weight comes before."""
    plain = ReferenceKernels(torch.float32, 1)
    kernels = emulated(plain, Rates(read_gb_s=1e-3, tflops=1))
    up = kernels.pack(torch.randn(64, 40), FORMATS["fp32"])
    experts = [kernels.pack(torch.randn(50, 64), FORMATS["fp32"]) for _ in range(4)]
    x, rows, group = torch.randn(3, 2, 40), torch.randn(6, 64), LateGroup()
    routes = plain.route(torch.randn(3, 4), None, Router(top_k=2))
    start = time.perf_counter()
    heads = kernels.head_linear(x, up)
    y = kernels.expert_linear(rows, experts, routes, 50, torch.float32)
    kernels.all_reduce_(y, group)
    assert group.came_s[0] - start >= 4 * (64 * 40 + 4 * 50 * 64) / 1e6
    assert torch.equal(heads, plain.head_linear(x, up))
    assert torch.equal(y, plain.expert_linear(rows, experts, routes, 50, torch.float32))
    logits, phase_s = x[:, 0], 4 * 64 * 40 / 1e6
    kernels.linear(logits, up, None, torch.float32)  # the head's end no phase: the next step does
    step = kernels.record(lambda: kernels.linear(logits, up, None, torch.float32))
    start = time.perf_counter()
    step.replay()
    assert time.perf_counter() - start >= phase_s


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--device", "emulated", "--gpu-fraction", "1.5"], "--gpu-fraction '1.5': expected a number from 0 to 1"),
        (["--gpu-fraction", "0.5"], "--gpu-fraction is about one rank with a --device of its own; there are 0"),
        (["--device", "2=emulated"], "--device '2=emulated': there are 2 ranks, 0 to 1"),
        (["--device", "cuda:9"], "CUDA devices on this host (rank 1)"),
        (["--device", "0=cuda", "--device", "1=cuda"], "are both on cuda:0; expected another one, such as 1=cuda:1"),
    ],
)
def test_mistakes_are_one_line_and_status_2(flags: list[str], message: str) -> None:
    done = run(ranks(2, "generate", "--token-ids", "1", *flags), timeout_s=60)
    assert done.status == 2 and "Traceback" not in done.stderr
    assert [message in line for line in done.stderr.splitlines() if "distinf: error:" in line] == [True]


@pytest.mark.mpi
@pytest.mark.slow
def test_the_sweep_prints_its_fields() -> None:
    device = "emulated:speed=2,latency_us=25,link_gb_s=24,read_gb_s=4,tflops=1"
    model = ["--load-format", "dummy", "--config", "tests/support/two_units.json", "--device", device]
    result = run(
        ranks(2, "python", "perf/hetero.py", *model, "--tokens", 4, "--steps", 2, "--json"), timeout_s=120
    ).result
    assert [point["fraction"] for point in result["sweep"]] == [0, 0.5, 1]
    for point in (*result["sweep"], result["auto"], result["equal"]):
        assert point["tpot_ms"] > 0 and isinstance(point["predicted_ms"], float)
    assert 0 <= result["auto"]["fraction"] <= 1
    assert result["device"] == ["cpu", device]


@pytest.mark.slow
def test_the_gpus_measurement_prints_its_fields() -> None:
    """With an emulated rank in the GPU's place; nothing is streamed then."""
    device = "emulated:speed=2,latency_us=25,link_gb_s=24,read_gb_s=4,tflops=1"
    flags = ["--configs", "tests/support/two_units.json", "--layers", "1", "--input-len", "4", "--output-len", "4"]
    result = run([sys.executable, "perf/hetero_gpu.py", *flags, "--device", device], timeout_s=120).result
    (model,) = result["models"]
    (point,) = model["points"]
    assert result["device"] == device and model["stream_all"] is None and model["cpu_only_ms"] > 0
    assert point["cap_gb"] is None and set(point["fractions"]) == {"attention", "ffn", "vocab"}
    assert point["tpot_ms"] > 0 and point["tok_s"] > 0 and point["predicted_ms"] > 0 and point["chosen"]


@pytest.mark.mpi
@pytest.mark.slow
def test_what_was_tuned_is_kept_and_used(tmp_path: Path) -> None:
    """One load of the second job, with the shares that the first one found."""
    device = ["--device", "emulated:speed=8,latency_us=20000,read_gb_s=4,tflops=1"]
    model = ["--load-format", "dummy", "--config", "tests/support/two_units.json", "--token-ids", "1", "--json"]
    command = ranks(
        2, "generate", *model, *device, "--max-new-tokens", 2, "--gpu-fraction", "auto", "--tune-cache", tmp_path
    )
    first = run(command, timeout_s=120).result
    assert first["shares"][1] == first["attention_shares"][1] == 0 < first["shares"][0]  # 20 ms a phase
    (kept,) = tmp_path.iterdir()
    text = kept.read_text()
    assert "measured_ms" in text
    shares = json.loads(text)
    shares["shares"]["vocab"] = ["1", "1"]
    kept.write_text(json.dumps(shares))
    assert run(command, timeout_s=120).result["vocab_shares"] == [1, 1]
