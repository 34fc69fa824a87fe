"""`--pack-cache`: the same weights from the second start, and whatever is not exactly the right entry is ignored."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distinf.comm import InputError
from distinf.comm.single import SingleGroup
from distinf.config import RunConfig
from distinf.kernels import extension
from distinf.llm import LoadedModel, load_model
from distinf.shard import PhaseShares
from distinf.weights import Checkpoint, open_checkpoint
from tests.families import make

RUN = RunConfig(dtype="int8", zero_points=True)


class Counting:
    """A checkpoint that counts the matrices read from it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.matrices = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def read(self, name: str, dtype: torch.dtype, *cut: Any) -> torch.Tensor:
        self.matrices += len(self._checkpoint.shape(name)) == 2
        return self._checkpoint.read(name, dtype, *cut)


def load(model: Path, cache: Path | None, run: RunConfig = RUN) -> tuple[dict[str, bytes], int]:
    """Packed bytes by name, and how many slices of matrices were read for them."""
    checkpoint = Counting(open_checkpoint(model, "auto", None, None))
    loaded: LoadedModel = load_model(checkpoint, run, SingleGroup(), pack_cache=cache)
    packed = {name: bytes(linear.weight.memory()) for name, linear in loaded.weights.linears.items()}
    return packed, checkpoint.matrices


@pytest.fixture(autouse=True)
def _native() -> None:
    if not extension.available_isas():
        pytest.skip("no native kernels")


def entry(cache: Path) -> Path:
    (path,) = cache.iterdir()  # nothing else is left behind
    return path


def test_the_second_start_reads_no_matrix(tiny_llama: Path, tmp_path: Path) -> None:
    expected, _ = load(tiny_llama, None)
    first, read = load(tiny_llama, tmp_path / "made/here")
    assert first == expected and read > 0
    assert load(tiny_llama, tmp_path / "made/here") == (expected, 0)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def other_key(path: Path) -> None:
    header, _, data = path.read_bytes().partition(b"\n")
    path.write_bytes(json.dumps({**json.loads(header), "key": "another"}).encode() + b"\n" + data)


DAMAGE: list[Callable[[Path], None]] = [
    lambda p: flip(p, -1),
    lambda p: flip(p, 30),
    lambda p: flip(p, len(p.read_bytes()) // 2),
    lambda p: p.write_bytes(p.read_bytes()[:-1]),
    lambda p: p.write_bytes(p.read_bytes()[:100]),
    lambda p: p.write_bytes(b""),
    lambda p: p.write_bytes(b"[]\n"),
    lambda p: p.write_bytes(b"\xff\n"),
    other_key,
]


@pytest.mark.parametrize("damage", range(len(DAMAGE)))
def test_a_damaged_or_foreign_entry_is_ignored_and_rebuilt(tiny_llama: Path, tmp_path: Path, damage: int) -> None:
    expected, _ = load(tiny_llama, tmp_path)
    path = entry(tmp_path)
    whole = path.read_bytes()
    DAMAGE[damage](path)
    found, read = load(tiny_llama, tmp_path)
    assert found == expected and read > 0
    assert entry(tmp_path) == path and path.read_bytes() == whole


def test_other_flags_shards_and_files_have_entries_of_their_own(tiny_llama: Path, tmp_path: Path) -> None:
    load(tiny_llama, tmp_path)
    load(tiny_llama, tmp_path, RunConfig(dtype="int8"))
    assert len(list(tmp_path.iterdir())) == 2
    weights = tiny_llama / "model.safetensors"
    weights.touch()
    assert load(tiny_llama, tmp_path)[1] > 0 and len(list(tmp_path.iterdir())) == 3


def test_whole_experts_are_not_taken_for_columns_of_each(tmp_path: Path) -> None:
    """The first of two ranks has half the columns of four experts, or two experts: as many bytes."""
    make("Mixtral", num_local_experts=4, num_experts_per_tok=2)(tmp_path)
    columns = RunConfig(shares=PhaseShares.of([1, 1]))
    for run in (columns, replace(columns, expert_parallel=True)):
        expected, _ = load(tmp_path, None, run)
        for read_again in (True, False):
            found, read = load(tmp_path, tmp_path / "cache", run)
            assert found == expected and bool(read) == read_again


def test_mistakes(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--pack-cache needs the native kernels, but rank 0 has reference"):
        load(tiny_llama, tmp_path, RunConfig(dtype="fp32"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        load(tiny_llama, tmp_path / "file")
