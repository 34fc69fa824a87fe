"""The benchmarks that run without a launcher: what they print, and mistakes. Figures are not judged here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO, Finished, ranks, run

FAST = ("--num-layers", "2", "--rounds", "1")


def gemm(*flags: str) -> Finished:
    return run([sys.executable, "perf/gemm.py", *flags])


@pytest.mark.slow
def test_gemm_times_every_layer_of_a_shard_beside_torch() -> None:
    result = gemm("--tp", "8", "--rows", "2,128", *FAST).result
    shapes = {"qkv": ((4 + 2) * 64, 2048), "o": (2048, 4 * 64), "gate_up": (2 * 1024, 2048), "down": (2048, 1024)}
    shapes["head"] = (49152 // 8, 2048)
    assert [(c["rows"], c["layer"], c["n"], c["k"]) for c in result["cases"]] == [
        (rows, layer, n, k) for rows in (2, 128) for layer, (n, k) in shapes.items()
    ]
    for case in result["cases"]:
        assert case["weight_bytes"] == 2 * case["n"] * case["k"]
        assert case["tflops"] == pytest.approx(2e-6 * case["rows"] * case["n"] * case["k"] / case["us"], abs=2e-4)
        assert case["ratio"] == pytest.approx(case["torch_us"] / case["us"], abs=2e-3)
    assert result["busy_cores"].keys() == {"bf16", "torch"}
    assert 0 < result["ratio"]["bf16"]["many_rows_worst"] <= result["ratio"]["bf16"]["many_rows_geomean"]


def test_load_reports_time_bytes_and_memory(tiny_llama: Path, tmp_path: Path) -> None:
    flags = "--dir", tiny_llama, "--dtype", "int8", "--pack-cache", tmp_path
    result = run(ranks(2, "python", "perf/load.py", *flags)).result
    assert result["file_bytes"] == (tiny_llama / "model.safetensors").stat().st_size
    assert result["second_load_s"] > 0 and result["load_s"] > 0 and result["peak_over_final_rss"] >= 1
    assert len(list(tmp_path.iterdir())) == 2


def test_load_makes_what_is_missing_and_wants_an_empty_cache(tmp_path: Path) -> None:
    config = {**json.loads((REPO / "perf/models/lab-1b.json").read_text()), "num_hidden_layers": 1, "vocab_size": 64}
    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
    (tmp_path / "small.json").write_text(json.dumps({**config, **small}))
    flags = [sys.executable, "perf/load.py", "--dir", str(tmp_path / "made"), "--config", str(tmp_path / "small.json")]
    done = run([*flags, "--pack-cache", str(tmp_path)])
    assert done.status == 2 and "expected a directory without entries" in done.stderr
    assert (tmp_path / "made/model.safetensors").is_file()


def test_llama_cpp_takes_turns_with_us(tmp_path: Path) -> None:
    """A stand-in for the other Python: what is started, and what is made of its figures."""
    stand_in = tmp_path / "python"
    figures = {"version": "1", "system": "none", "ttft_ms": 1e6, "tpot_ms": 1e6}
    stand_in.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/started\necho '{json.dumps(figures)}'\n")
    stand_in.chmod(0o755)
    short = ["--input-len", "4", "--output-len", "3", "--runs", "1", "--rounds", "1"]
    done = run([sys.executable, "perf/beside_llama_cpp.py", "--llama-python", str(stand_in), *short])
    assert len(done.result["distinf"]["tpot_ms"]) == len(done.result["llama.cpp"]["tpot_ms"]) == 1
    assert 0 < done.result["distinf"]["tpot_ms"][0] < 1e6 and done.result["llama.cpp"]["ttft_ms"] == [1e6]
    started = (tmp_path / "started").read_text()
    assert ".gguf" in started and "--input-len=4 --output-len=3 --runs=1" in started


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--llama-python", "/nowhere/python"], "/nowhere/python"),
        (["--llama-python", "true", "--model", "nowhere.gguf"], "--model 'nowhere.gguf'"),
        (["--llama-python", "true", "--rounds", "0"], "--rounds 0: expected 1 or more"),
        (["--llama-python", "true", "--output-len", "1"], "--output-len 1: expected 2 or more"),
        (["--llama-python", "true"], "no figures, and status 0"),
        (["--llama-python", sys.executable], "No module named 'llama_cpp'"),
    ],
)
def test_llama_cpp_mistakes_are_one_line(flags: list[str], message: str) -> None:
    done = run([sys.executable, "perf/beside_llama_cpp.py", *flags])
    assert done.status == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rows", "1,0"], "--rows '1,0': expected numbers of 1 or more"),
        (["--tp", "0"], "--tp 0: expected 1 or more"),
        (["--dtypes", "fp7"], "--dtype 'fp7' is unknown"),
        (["--config", "nowhere.json"], "nowhere.json"),
    ],
)
def test_gemm_mistakes_are_one_line(flags: list[str], message: str) -> None:
    done = gemm(*flags, *FAST)
    assert done.status == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "flags", [["--window", "1"], ["--tokens", "100"], ["--tokens", "9000000"], ["--window", "9000"]]
)
def test_perplexity_mistakes_are_one_line(flags: list[str]) -> None:
    done = run([sys.executable, "perf/perplexity.py", *flags])
    assert done.status == 2 and flags[0] in done.stderr and "Traceback" not in done.stderr
