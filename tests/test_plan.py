"""`distinf plan`: what a rank will hold is known before anything is loaded, and it is what loading then takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distinf.cli import main
from distinf.comm.single import SingleGroup
from distinf.config import RunConfig
from distinf.llm import load_model
from distinf.plan import Plan, report
from distinf.shard import PhaseShares
from distinf.weights import open_checkpoint
from distinf.weights.load import weight_bytes
from tests.conftest import REPO, distinf, run
from tests.test_published_configs import COMMON, PUBLISHED

QWEN2_72B = REPO / "perf/models/qwen2-72b.json"


def plan_of(config_json: Path, run_config: RunConfig) -> Plan:
    return Plan.of(open_checkpoint(Path(), "dummy", config_json, None), run_config)


def test_qwen2_72b_on_eight_ranks() -> None:
    """145.4 GB of bf16 are 18.2 GB a rank; 29568 columns are 924 panels, which eight ranks cannot share evenly."""
    ranks = run(distinf("plan", "--model", QWEN2_72B, "--world-size", 8, "--memory-gb", 100, "--json")).result["ranks"]
    assert {round(r["weights"] / 1e9, 1) for r in ranks} == {18.1, 18.2}
    assert sum(r["weights"] for r in ranks) == pytest.approx(2 * 72.7e9, rel=1e-3)
    assert {r["ffn"][1] - r["ffn"][0] for r in ranks} == {3712, 3680} and ranks[-1]["ffn"][1] == 29568


def test_yes_or_no_with_both_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", "--model", str(QWEN2_72B), "--world-size", "8", "--context", "100", "--memory-gb"]
    main([*flags, "18.5"])
    assert capsys.readouterr().out.endswith("yes: rank 0 needs 18.3 GB of 18.5 GB\n")
    with pytest.raises(SystemExit, match="1"):
        main([*flags, "10"])
    out = capsys.readouterr().out
    assert out.endswith("no: rank 0 needs 18.3 GB of 10.0 GB\n") and "0 .. 3711 (3712)" in out


def test_kv_cache_and_shares() -> None:
    shares = PhaseShares.of([3, 1])
    ranks = report(plan_of(QWEN2_72B, RunConfig(shares=shares)), kv_tokens=1000, table_ranks=2)
    assert [len(r.shard.kv_heads) for r in ranks] == [6, 2]
    assert [r.kv_cache for r in ranks] == [1000 * 80 * n * 2 * 128 * 2 for n in (6, 2)]


def test_ffn_ranges_are_whole_groups() -> None:
    """Panels of 32 would cut a group of 128 in two."""
    plan = plan_of(QWEN2_72B, RunConfig(dtype="int4", group_size=128, shares=PhaseShares.of([1] * 8)))
    assert all(s.ffn.start % 128 == 0 for s in plan.shards) and plan.shards[-1].ffn.stop == 29568


def test_whole_experts_on_three_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """128 experts of 768 columns in 48 layers; a rank's own take what they would take of one rank."""
    hf = {**COMMON, **PUBLISHED["Qwen3-30B-A3B"][0]}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    plan = plan_of(tmp_path / "config.json", RunConfig(shares=PhaseShares.of([1] * 3), expert_parallel=True))
    assert [s.experts for s in plan.shards] == [range(43), range(43, 85), range(85, 128)]
    experts = [p for p in plan.params_of(0) if p.expert is not None]
    assert weight_bytes(experts, plan.cuts(0), plan.formats, torch.bfloat16) == 43 * 48 * 3 * 768 * 2048 * 2
    flags = ["--model", str(tmp_path / "config.json"), "--expert-parallel"]
    main(["plan", "--world-size", "3", "--memory-gb", "99", *flags])
    assert "43 .. 84 (42)  0 .. 767 (768)" in capsys.readouterr().out


@pytest.mark.parametrize("dtype, head_dtype", [("bf16", None), ("int8", None), ("int4", "bf16")])
def test_the_plan_is_what_loading_takes(tmp_path: Path, dtype: str, head_dtype: str | None) -> None:
    """To the byte where no panel is padded."""
    config = json.loads((REPO / "perf/models/lab-1b.json").read_text())
    small = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({**config, **small, "vocab_size": 1024}))
    checkpoint = open_checkpoint(tmp_path, "dummy", None, 1)
    run_config = RunConfig(dtype=dtype, head_dtype=head_dtype, load_format="dummy")
    loaded = load_model(checkpoint, run_config, SingleGroup())
    tables = sum(t.numel() for t in loaded.weights.tensors.values()) * torch.bfloat16.itemsize
    planned = Plan.of(checkpoint, run_config).need(0, 0, torch.bfloat16).weights
    assert planned == loaded.weights.bytes_per_token + tables


def test_workspace_grows_with_the_prompt_up_to_a_chunk() -> None:
    plan = plan_of(QWEN2_72B, RunConfig())
    small, chunk, large = (plan.workspace_bytes(0, n, torch.bfloat16) for n in (1, 1024, 4096))
    assert chunk == large == 1024 * small


def test_several_ranks_have_two_slots_each_for_sums() -> None:
    alone, one_of_two = (plan_of(QWEN2_72B, RunConfig(shares=PhaseShares.of(s))) for s in ([1], [1, 0]))
    a, b = (plan.workspace_bytes(0, 1, torch.bfloat16) for plan in (alone, one_of_two))
    assert b - a == 5 * 1024 * 8192 * 4 // 2


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--world-size", 0], "--world-size 0: expected 1 or more"),
        (["--context", 40000], "--context 40000 exceeds the model's 32768 tokens"),
        (["--shares", "1,1"], "--shares '1,1' has 2 entries but there are 1 ranks"),
        (["--dtype", "fp7"], "--dtype 'fp7' is unknown"),
        (["--world-size", 3000], "3000 ranks are more than the model can use"),
        (["--expert-parallel"], "--expert-parallel: qwen2 models have no experts"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], flags: list[object], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--model", str(QWEN2_72B), *map(str, flags)])
    assert capsys.readouterr().err.startswith(f"distinf: error: {message}")
