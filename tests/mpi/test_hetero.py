"""A rank that is emulated computes the same numbers, whatever its part of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from distinf import LLM, Group, SamplingParams, comm, llm
from distinf.comm.single import SingleGroup
from distinf.config import RunConfig
from distinf.device import Device
from distinf.engine import Sequence
from distinf.hetero.tune import tune, tune_cached
from distinf.kernels import Placement
from distinf.kernels.cuda import CudaKernels
from distinf.shard import PhaseShares
from tests.conftest import make_tiny
from tests.support.host_gpu import HostGpu

PROMPTS = [[5, 6, 7], list(range(100, 140))]
PARAMS = SamplingParams(max_new_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def group() -> Group:
    return comm.init()


@pytest.fixture(scope="module")
def path(group: Group, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that rank 0 writes."""
    directory = make_tiny(tmp_path_factory.mktemp("hetero")) if group.rank == 0 else None
    return Path(group.broadcast_object(directory))


def test_tuned_shares_are_the_same_everywhere_and_kept(group: Group, path: Path, tmp_path_factory: Any) -> None:
    loads = []

    def load(shares: PhaseShares | None, devices: tuple[Device, ...] | None) -> LLM:
        loads.append(shares)
        given = devices or ["emulated:speed=2,read_gb_s=1,tflops=1"]
        return LLM(str(path), dtype="fp32", shares=shares, devices=given, group=group)

    tuning = tune(load, (1,))
    assert tuning.chosen in tuning.candidates and tuning.chosen.measured_ms
    assert set(tuning.profile.lines[1]) == {"attention", "ffn", "vocab"}
    assert all(other == tuning.chosen for other in group.all_gather_object(tuning.chosen))
    directory = group.broadcast_object(str(tmp_path_factory.mktemp("cache")))
    first = tune_cached(load, {"model": str(path)}, group, directory)
    loads.clear()
    assert tune_cached(load, {"model": str(path)}, group, directory) == first and not loads


def tokens(llm: LLM) -> list[list[int]]:
    return [c.token_ids for c in llm.generate(PROMPTS, PARAMS)]


def test_greedy_tokens_do_not_depend_on_the_fraction(group: Group, path: Path) -> None:
    """With fp32 weights and sums: no rounding of bf16 that a different order of the sums would tip."""
    device = "emulated:speed=4,latency_us=5,link_gb_s=24,read_gb_s=1,tflops=1"
    alone = tokens(LLM(str(path), dtype="fp32", group=SingleGroup(), threads=1))
    for fraction in ["1"] if group.world_size == 1 else ["0", "0.25", "0.5", "0.75", "1", "0.4,0.9,0"]:
        llm = LLM(str(path), dtype="fp32", devices=[device], gpu_fraction=fraction, group=group)
        assert tokens(llm) == alone, fraction


@pytest.fixture
def host_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks with a GPU have one of host memory: what they compute comes by way of graphs with the host's parts."""
    plain = llm.rank_kernels

    def on_host_gpu(run: RunConfig, rank: int, placement: Placement) -> Any:
        if run.devices[rank].kind == "cpu":
            return plain(run, rank, placement)
        act_dtype = torch.float32 if run.dtype == "fp32" else torch.bfloat16
        return CudaKernels(cast(Any, HostGpu()), act_dtype, 1, None, run.gpu_stream_all)

    monkeypatch.setattr(llm, "rank_kernels", on_host_gpu)


def test_greedy_tokens_do_not_depend_on_a_gpus_fraction(group: Group, path: Path, host_gpus: None) -> None:
    alone = tokens(LLM(str(path), dtype="fp32", group=SingleGroup(), threads=1))
    fractions = ["1"] if group.world_size == 1 else ["0", "0.25", "0.5", "0.75", "1", "0.4,0.9,0"]
    for i, fraction in enumerate(fractions):
        how = {"devices": ["cuda"], "gpu_fraction": fraction, "gpu_stream_all": i % 2 == 1}
        assert tokens(LLM(str(path), dtype="fp32", group=group, **how)) == alone, how


def test_native_ranks_and_a_gpus_add_up(group: Group, path: Path, host_gpus: None) -> None:
    """bf16 on both, within what its roundings make of fp32: see test_families.test_bf16."""

    def logits(model: LLM) -> torch.Tensor:
        sequences = [Sequence(i, p) for i, p in enumerate(PROMPTS)]
        mine = model.engine.prefill(sequences, model.engine.new_cache([len(p) for p in PROMPTS]))
        return torch.cat(model.group.all_gather_object(mine), 1)

    exact = logits(LLM(str(path), dtype="fp32", group=SingleGroup(), threads=1))
    mixed = LLM(str(path), group=group, devices=["cuda"])
    assert (logits(mixed) - exact).abs().max() < 5 * 2**-9 * (16 * mixed.config.n_layers) ** 0.5 * exact.std()
    assert len({str(t) for t in group.all_gather_object(tokens(mixed))}) == 1


@pytest.mark.parametrize("capture", [True, False])
def test_waiting_changes_no_bit(group: Group, path: Path, capture: bool) -> None:
    """The same shares without emulation, on the kernels that a run has by default."""
    devices = ["0=emulated:speed=0.5,latency_us=5,read_gb_s=1,tflops=1"]
    plain = tokens(LLM(str(path), capture=capture, group=group))
    assert tokens(LLM(str(path), devices=devices, capture=capture, group=group)) == plain
