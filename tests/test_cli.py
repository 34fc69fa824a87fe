"""The command line as a user meets it: results on stdout, one line for each mistake, exit status 2."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from distinf.topology import parse_cpu_list
from tests.conftest import REPO, distinf, run

FIELDS = {
    "text": str, "token_ids": list, "prompt_tokens": int, "new_tokens": int, "ttft_ms": float, "tpot_ms": dict,
    "decode_tok_s": float, "prefill_tok_s": float, "read_gb_s": float, "roofline_read_gb_s": float, "roofline": float,
    "world_size": int, "shares": list, "dtype": str, "isa": str, "comm": str, "kernels": str, "load_s": float,
    "peak_rss_mb": list,
}  # fmt: skip


def test_json_is_the_last_line_of_stdout(tiny_llama: Path) -> None:
    done = run(
        distinf(
            "generate", "--model", tiny_llama, "--token-ids", "3,1,4", "--max-new-tokens", 5, "--ignore-eos", "--json"
        )
    )
    result = done.result
    assert {k: type(result[k]) for k in FIELDS} == FIELDS
    assert set(result["tpot_ms"]) == {"p50", "p90", "p99"}
    assert result["new_tokens"] == len(result["token_ids"]) == 5 and result["prompt_tokens"] == 3
    assert result["roofline"] > 0 and len(result["peak_rss_mb"]) == 1


def test_one_new_token_has_no_time_per_token(tiny_llama: Path) -> None:
    result = run(distinf("generate", "--model", tiny_llama, "--token-ids", "3", "--max-new-tokens", 1, "--json")).result
    assert result["tpot_ms"] == {} and result["decode_tok_s"] is None and result["ttft_ms"] > 0


def test_random_weights_of_any_shape() -> None:
    config = REPO / "perf/models/lab-1b.json"
    done = run(
        distinf("generate", "--load-format", "dummy", "--config", config, "--num-layers", 1, "--token-ids", "1 2 3",
                "--max-new-tokens", 3, "--json")
    )  # fmt: skip
    assert done.result["new_tokens"] == 3 and done.result["text"] == ""


@pytest.mark.slow
def test_the_real_model_answers_from_a_file_and_streams(tmp_path: Path) -> None:
    (tmp_path / "question.txt").write_text("What is the capital of France?")
    done = run(distinf("generate", "--chat", "--prompt-file", tmp_path / "question.txt", "--json"))
    assert done.result["text"] == "The capital of France is Paris."
    assert done.stdout.splitlines()[0] == "The capital of France is Paris."
    assert re.search(r"TTFT .* ms .*\n.* ms/token .* GB/s read = \d+ % of this machine's .* GB/s", done.stderr)


def test_info_as_text_and_as_json() -> None:
    text = run(distinf("info")).stdout
    for word in ("rank 0", "host", "cpu", "machine", "isa", "cores", "numa_nodes", "memory", "comm", "torch 2."):
        assert word in text
    ranks = json.loads(run(distinf("info", "--json", "--threads", 1)).stdout)["ranks"]
    assert len(ranks) == 1 and ranks[0]["threads"] == 1 and ranks[0]["pinned"]
    assert len(parse_cpu_list(ranks[0]["cores"])) == len(ranks[0]["numa_nodes"]) == 1


MISTAKES = [
    (
        ["generate", "--prompt", "x", "--shares", "auto", "--expert-parallel"],
        "--expert-parallel: shares of whole experts are not tuned; expected --shares as numbers",
    ),
    (["generate", "--prompt", "x", "--dtype", "fp7"], "--dtype 'fp7' is unknown; expected one of auto, fp32, bf16"),
    (["generate", "--prompt", "x", "--shares", "1,1"], "--shares '1,1' has 2 entries but there are 1 ranks"),
    (["generate", "--prompt", "x", "--shares", "-1"], "a share cannot be negative"),
    (["generate", "--prompt", ""], "the prompt is empty"),
    (["generate", "--token-ids", ""], "the prompt is empty"),
    (["generate", "--token-ids", "1,x"], "--token-ids '1,x': expected whole numbers"),
    (["generate", "--prompt", "x", "--model", "nowhere"], "--model 'nowhere': no such file or directory"),
    (["generate", "--prompt-file", "nowhere"], "--prompt-file nowhere: No such file or directory"),
    (["generate", "--prompt", "x", "--comm", "pigeon"], "--comm 'pigeon' is unknown"),
    (["generate", "--prompt", "x", "--isa", "mmx"], "--isa 'mmx' is unknown"),
    (["generate", "--prompt", "x", "--temperature", "-1"], "--temperature -1.0"),
    (["generate", "--prompt", "x", "--max-new-tokens", "9999"], "exceed the model's context of"),
    (["generate", "--prompt", "x", "--threads", "-2"], "--threads -2"),
    (["generate", "--load-format", "dummy", "--config", "nowhere.json", "--token-ids", "1"], "nowhere.json: No such file"),
    (["generate", "--load-format", "dummy", "--config", "perf/models/lab-1b.json", "--num-layers", "0", "--token-ids", "1"],
     "--num-layers 0: expected 1 or more"),
    (["generate", "--load-format", "dummy", "--config", "perf/models/lab-1b.json", "--num-layers", "1", "--prompt", "x"],
     "random weights have no tokenizer"),
    (["generate", "--load-format", "dummy", "--config", "tests/support/long_context.json", "--token-ids", "1",
      "--max-new-tokens", "2000000000"], "GB for a KV cache of 2000000001 tokens, but"),
    (["generate", "--prompt", "x", "--dtype", "int4", "--group-size", "128"],
     "--group-size 128 does not divide the input features 0 .. 576 of 'model.embed_tokens.weight'"),
    (["generate"], "one of the arguments --prompt --prompt-file --token-ids is required"),
    (["generate", "--prompt", "x", "--top-k", "many"], "invalid int value: 'many'"),
    (["dance"], "invalid choice: 'dance'"),
]  # fmt: skip


@pytest.mark.parametrize("args, message", MISTAKES, ids=[" ".join(a) or "nothing" for a, _ in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(args: list[str], message: str) -> None:
    done = run(distinf(*args))
    assert done.status == 2
    assert done.stdout == ""
    # What is found out only after loading comes below the rank's placement.
    lines = [line for line in done.stderr.splitlines() if not line.startswith("distinf: rank 0 ")]
    assert len(lines) == 1 and lines[0].startswith("distinf: error: ") and message in lines[0], done.stderr
