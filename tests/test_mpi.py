"""Real ranks under a real launcher: the same text at every world size, mistakes, deaths and memory."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from distinf import LLM
from tests.conftest import REPO, need, ranks, run

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

# Memory of a rank that does not shrink with the number of ranks (README): Python, torch, transformers, the
# mapped checkpoint, the embedding table, buffers. MB.
RSS_CONSTANT_MB = 450


@pytest.mark.parametrize("n", [1, 2, 3])
def test_spmd_suite(n: int) -> None:
    """tests/mpi on n ranks."""
    done = run(ranks(n, "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/mpi"), timeout_s=900)
    assert done.status == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """A chat prompt whose 64-token answer is not over early."""
    return LLM(num_layers=None).tokenize("Write three sentences about the sea and the ships on it.", chat=True)


def oracle(smollm2: Path, dtype: torch.dtype) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=dtype)


def greedy(model: AutoModelForCausalLM, prompt: list[int], n: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return list(out[0, len(prompt) :].tolist())


def generate(n: int, prompt: list[int], tokens: int, *flags: object) -> list[int]:
    ids = ",".join(map(str, prompt))
    command = ranks(n, "generate", "--token-ids", ids, "--max-new-tokens", tokens, "--ignore-eos", "--json", *flags)
    return list(run(command).result["token_ids"])


def test_fp32_tokens_equal_transformers_at_every_world_size(smollm2: Path, prompt: list[int]) -> None:
    expected = greedy(oracle(smollm2, torch.float32), prompt, 64)
    for n, flags in [(1, []), (2, []), (3, []), (4, []), (2, ["--shares", "3,1"])]:
        assert generate(n, prompt, 64, "--dtype", "fp32", *flags) == expected, (n, flags)


@pytest.mark.parametrize("n, name", [(3, "shm"), (4, "mpi")])
def test_logits_are_the_same_bits_in_every_run(tiny_llama: Path, n: int, name: str) -> None:
    """Sums are formed in the ranks' order, whoever comes first."""
    digests = [run(ranks(n, "python", "tests/support/logits_digest.py", tiny_llama, name)).stdout for _ in range(2)]
    assert digests[0].split()[0] == name and len(digests[0].split()[1]) == 64
    assert digests[0] == digests[1]


def test_bf16_tokens_agree_up_to_proven_ties(smollm2: Path, prompt: list[int]) -> None:
    """All world sizes against transformers bf16, 32 tokens: the first difference, if any, must be a tie."""
    expected = greedy(oracle(smollm2, torch.bfloat16), prompt, 32)
    exact = oracle(smollm2, torch.float32)
    for n in (1, 2, 3, 4):
        tokens = generate(n, prompt, 32, "--dtype", "bf16")
        differs = [i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b]
        if differs:
            i = differs[0]
            assert_tie(exact, [*prompt, *expected[:i]], tokens[i], expected[i])


def assert_tie(exact: AutoModelForCausalLM, context: list[int], a: int, b: int) -> None:
    """The fp32 gap between two tokens' logits is within what bf16 can make of it.

    A logit is h . w. Each of about 8 roundings a layer moves an element of h by at most 2^-9 of itself, in a
    random direction: over all of them its standard deviation is 2^-9 sqrt(8 layers) of h. The gap's error is
    that of h . (w_a - w_b), with independent elements; four standard deviations are allowed on each side.
    """
    with torch.no_grad():
        hidden = exact.model(torch.tensor([context])).last_hidden_state[0, -1]
        difference = exact.lm_head.weight[a] - exact.lm_head.weight[b]
        gap = float(hidden @ difference)
    sigma = 2**-9 * (8 * exact.config.num_hidden_layers) ** 0.5 * float((hidden * difference).norm())
    assert abs(gap) < 2 * 4 * sigma, f"tokens {a} and {b} are {gap} apart, no tie (sigma {sigma})"


@pytest.mark.parametrize(
    "n, flags, message",
    [
        (2, ["--shares", "1,1,1"], "--shares '1,1,1' has 3 entries but there are 2 ranks"),
        (2, ["--dtype", "fp7"], "--dtype 'fp7' is unknown"),
        (2, ["--model", "nowhere"], "--model 'nowhere': no such file or directory"),
        (2, ["--max-new-tokens", "9999"], "exceed the model's context"),
        (4, ["--load-format", "dummy", "--config", "tests/support/two_units.json"], "4 ranks are more than the model can use"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_status_2_on_many_ranks(n: int, flags: list[str], message: str) -> None:
    start = time.monotonic()
    done = run(ranks(n, "generate", "--token-ids", "1,2", *flags), timeout_s=60)
    lines = [line for line in done.stderr.splitlines() if "distinf: error:" in line]
    assert done.status == 2, done.stderr
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < 30


def test_a_checkpoint_that_one_rank_cannot_read_ends_all(tiny_llama: Path, tmp_path: Path) -> None:
    """Rank 1's slices lie in a file that is missing on its node: every rank leaves, and rank 0 says whose it was."""
    script = (
        "from distinf import cli, comm; from distinf.weights.raw import RawFile\n"
        "def fail(file, *where): raise OSError(f'{file.path}: disk on fire')\n"
        "if comm.launched_rank() == 1: RawFile.read = fail\n"
        f"cli.main(['generate', '--model', {str(tiny_llama)!r}, '--token-ids', '1'])"
    )
    (tmp_path / "script.py").write_text(script)
    done = run(ranks(2, "python", tmp_path / "script.py"), timeout_s=60)
    assert done.status == 2
    assert "disk on fire (rank 1)" in done.stderr and "Traceback" not in done.stderr


def rank_processes(root: psutil.Process) -> dict[int, psutil.Process]:
    """Ranks below a launcher by PMI_RANK; the launcher's own helpers have none."""
    found = {}
    for process in root.children(recursive=True):
        try:
            rank = process.environ().get("PMI_RANK")
            if rank is not None and "python" in process.name():
                found[int(rank)] = process
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("n, victim, comm", [(2, 1, "mpi"), (2, 0, "mpi"), (3, 2, "mpi"), (2, 1, "ccl")])
def test_killing_a_rank_ends_the_job_and_names_it(n: int, victim: int, comm: str) -> None:
    need(comm)
    prompt = ["--prompt", "Once upon a time", "--max-new-tokens", 4000, "--ignore-eos"]
    command = ranks(n, "generate", *prompt, "--comm", comm)
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPO)
    try:
        assert job.stdout is not None
        assert job.stdout.read(40), "no text came"  # generating
        processes = rank_processes(psutil.Process(job.pid))
        assert sorted(processes) == list(range(n))
        os.kill(processes[victim].pid, signal.SIGKILL)
        start = time.monotonic()
        out, err = job.communicate(timeout=10)
        assert job.returncode != 0
        said = rf"^(?!distinf: rank \d+  ).*rank {victim}\b"  # not the line that tells where it was placed
        assert re.search(said, (out + err).decode(), re.IGNORECASE | re.MULTILINE), out + err
        _, alive = psutil.wait_procs(processes.values(), timeout=10 - (time.monotonic() - start))
        assert not alive
    finally:
        job.kill()


def test_an_error_on_one_rank_ends_the_job_and_names_it(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import torch; from distinf import cli, comm; from distinf.engine import Decoder\n"
        "decode = Decoder.__call__\n"
        "def broken(self, *args):\n"
        "    if comm.launched_rank() == 1: raise RuntimeError('cosmic ray')\n"
        "    return decode(self, *args)\n"
        "Decoder.__call__ = broken\n"
        "cli.main(['generate', '--prompt', 'x'])\n"
    )
    done = run(ranks(2, "python", tmp_path / "script.py"), timeout_s=60)
    assert done.status not in (0, 2)
    assert re.search(r"distinf: rank 1 on \S+ failed: RuntimeError: cosmic ray", done.stderr)


def test_memory_of_a_rank_shrinks_with_the_ranks() -> None:
    config = ["--load-format", "dummy", "--config", "perf/models/lab-1b.json", "--token-ids", "1,2,3", "--json"]
    one = run(ranks(1, "generate", *config, "--max-new-tokens", 4)).result["peak_rss_mb"]
    two = run(ranks(2, "generate", *config, "--max-new-tokens", 4)).result["peak_rss_mb"]
    assert len(one) == 1 and len(two) == 2
    assert max(two) <= 0.6 * one[0] + RSS_CONSTANT_MB, (one, two)


FIELDS = """ttft_ms tpot_ms prefill_tok_s decode_tok_s weight_bytes_per_token read_gb_s roofline_read_gb_s roofline
prefill_tflops amx_peak_tflops amx_fraction batch input_len output_len world_size threads dtype isa model load_s
peak_rss_mb"""


def test_latency_benchmark_prints_its_fields() -> None:
    done = run(
        ranks(2, "python", "perf/latency.py", "--load-format", "dummy", "--config", "perf/models/lab-1b.json",
              "--num-layers", 1, "--batch", 2, "--input-len", 8, "--output-len", 4, "--runs", 2)
    )  # fmt: skip
    result = done.result
    for field in FIELDS.split():
        assert field in result
    assert result["model"] == "lab-1b" and result["world_size"] == 2 and len(result["peak_rss_mb"]) == 2
    layer = 2 * (2048 * (2048 + 2 * 512) + 2048 * 2048 + 3 * 2048 * 8192)
    assert result["weight_bytes_per_token"] == layer + 2 * 2048 * 49152


def test_perplexity_is_the_same_on_two_ranks() -> None:
    """A score errs by at most twice a logit, and SmolLM2's logits stay below 32: fp32 parts in 1e5 of that."""
    flags = ("python", "perf/perplexity.py", "--tokens", 256, "--window", 128, "--dtype")
    one = run(ranks(1, *flags, "bf16", "--against", "fp32")).result
    two = run(ranks(2, *flags, "fp32")).result
    assert one["tokens"] == two["tokens"] == 2 * 127 and one["against"]["dtype"] == "fp32"
    assert two["loss"] == pytest.approx(one["against"]["loss"], abs=2 * 2e-5 * 32)
    assert one["increase_percent"] == pytest.approx(
        100 * (one["perplexity"] / one["against"]["perplexity"] - 1), abs=1e-3
    )
