"""What tests share: tiny checkpoints that transformers makes, the real model, and starting ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from distinf.comm.ccl import LIBRARY
from distinf.tokenizer import DEFAULT_MODEL, find_model

REPO = Path(__file__).resolve().parent.parent
CPUS = os.sched_getaffinity(0)
UNDER_LAUNCHER = "PMI_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ
FAKE_TORCH_CCL = str(REPO / "tests/support/fake_torch_ccl")

# SPMD tests: only under a launcher, which tests/test_mpi.py is.
collect_ignore = [] if UNDER_LAUNCHER else ["mpi"]


@pytest.fixture(autouse=True)
def all_cpus() -> None:
    """Kernels pin the thread that makes them; commands that later tests start would inherit that one core."""
    if not UNDER_LAUNCHER:  # ranks stay where they are bound
        os.sched_setaffinity(0, CPUS)


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object on the last line of stdout."""
        assert self.status == 0, self.stderr
        return dict(json.loads(self.stdout.strip().splitlines()[-1]))


def run(command: list[str], timeout_s: float = 240) -> Finished:
    """Run a command in the repository; a rank that hangs fails the test instead of stopping it."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=REPO)
    return Finished(done.returncode, done.stdout, done.stderr)


def distinf(*args: object) -> list[str]:
    """Command line of one process without a launcher."""
    return [sys.executable, "-m", "distinf", *map(str, args)]


def ranks(n: int, *args: object) -> list[str]:
    """Command line of `distinf` on n ranks; with "python" first, of a script."""
    words = list(map(str, args))
    program = words if words[0] == "python" else ["python", "-m", "distinf", *words]
    return [str(REPO / "launch/mpirun.sh"), "-n", str(n), "--", *program]


def need(backend: str) -> None:
    """Skip the test of a backend of --comm whose library is not installed; put a fake in the place of torch-ccl's."""
    if backend == "torch-ccl" and FAKE_TORCH_CCL not in sys.path:
        sys.path.insert(0, FAKE_TORCH_CCL)
    if backend == "ccl" and not (Path(sys.prefix) / "lib" / LIBRARY).exists():
        pytest.skip(f"{LIBRARY} of oneccl-cpu is not installed")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """Where every read of a checkpoint's files lies, in bytes, from here on."""
    found: list[range] = []
    original = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        size = original(fd, buffers, offset)
        found.append(range(offset, offset + size))
        return size

    monkeypatch.setattr(os, "preadv", preadv)
    return found


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model's GGUF file."""
    return find_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama directory with odd head counts (6 query, 3 KV), widths that are no whole tile, and biases."""
    return make_tiny(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_llama(field=value, ...) -> a tiny directory with those config fields."""
    return lambda **fields: make_tiny(tmp_path_factory.mktemp("llama"), **fields)


def make_tiny(directory: Path, **fields: Any) -> Path:
    """Save a random tiny Llama, all norms and biases non-trivial, as one safetensors file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "hidden_size": 120, "intermediate_size": 208, "num_hidden_layers": 3, "num_attention_heads": 6,
            "num_key_value_heads": 3, "head_dim": 20, "vocab_size": 199, "max_position_embeddings": 512,
            "attention_bias": True, "mlp_bias": True, "rope_theta": 10000.0, "eos_token_id": 198,
            "tie_word_embeddings": False, **fields,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2 if parameter.dim() == 1 else 0.1)
    model.save_pretrained(directory)
    return directory
