"""Sharded equals unsharded, through the Python API, on every rank of the job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distinf import LLM, Group, SamplingParams, comm
from distinf.comm import InputError
from distinf.comm.single import SingleGroup
from distinf.engine import Sequence
from tests.conftest import make_tiny, need

PROMPTS = [[(37 * i + 11) % 199 for i in range(n)] for n in (1, 7, 65)]


@pytest.fixture(scope="module")
def group() -> Group:
    return comm.init()


@pytest.fixture(scope="module")
def path(group: Group, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that rank 0 writes."""
    directory = make_tiny(tmp_path_factory.mktemp("sharded")) if group.rank == 0 else None
    return Path(group.broadcast_object(directory))


def last_logits(llm: LLM, prompts: list[list[int]]) -> torch.Tensor:
    """The whole vocabulary's logits [B, vocab], put together from every rank's part."""
    sequences = [Sequence(i, p) for i, p in enumerate(prompts)]
    mine = llm.engine.prefill(sequences, llm.engine.new_cache([len(p) for p in prompts]))
    return torch.cat(llm.group.all_gather_object(mine), 1)


SHARES: dict[int, list[str | None]] = {1: [None], 2: [None, "3,1", "0,1"], 3: [None, "1,0,2", "5,1,1"]}


@pytest.mark.parametrize("dtype, rtol", [("fp32", 2e-5), ("bf16", 2**-9 * (8 * 3) ** 0.5 * 5)])
def test_logits_equal_those_of_one_rank(group: Group, path: Path, dtype: str, rtol: float) -> None:
    alone = last_logits(LLM(str(path), dtype=dtype, group=SingleGroup(), threads=1), PROMPTS)
    for shares in SHARES.get(group.world_size, [None]):
        together = last_logits(LLM(str(path), dtype=dtype, shares=shares, group=group), PROMPTS)
        torch.testing.assert_close(together, alone, rtol=0, atol=rtol * float(alone.abs().max()))


def test_scores_equal_those_of_one_rank(group: Group, path: Path) -> None:
    ids = PROMPTS[-1]
    single = LLM(str(path), dtype="fp32", group=SingleGroup(), threads=1)
    alone = single.engine.score(ids)
    largest = float(last_logits(single, PROMPTS).abs().max())
    for shares in SHARES.get(group.world_size, [None]):
        together = LLM(str(path), dtype="fp32", shares=shares, group=group).engine.score(ids)
        torch.testing.assert_close(together, alone, rtol=0, atol=2 * 2e-5 * largest)
        assert all(torch.equal(other, together) for other in group.all_gather(together))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=32, ignore_eos=True),
        SamplingParams(max_new_tokens=32, ignore_eos=True, temperature=1.0, seed=5),
        SamplingParams(max_new_tokens=32, ignore_eos=True, temperature=1.0, top_k=20, top_p=0.9, seed=6),
    ],
    ids=["greedy", "sampled", "limited"],
)
def test_tokens_equal_those_of_one_rank(group: Group, path: Path, params: SamplingParams) -> None:
    alone = LLM(str(path), dtype="fp32", group=SingleGroup(), threads=1).generate(PROMPTS, params)
    together = LLM(str(path), dtype="fp32", group=group).generate(PROMPTS, params)
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    everyone: list[Any] = group.all_gather_object([c.token_ids for c in together])
    assert all(tokens == everyone[0] for tokens in everyone)


@pytest.mark.parametrize("backend", ["ccl", "torch-ccl"])
def test_tokens_are_the_same_over_every_backend(path: Path, backend: str) -> None:
    need(backend)
    params = SamplingParams(max_new_tokens=32, ignore_eos=True)
    alone = LLM(str(path), dtype="fp32", group=SingleGroup(), threads=1).generate(PROMPTS, params)
    together = LLM(str(path), dtype="fp32", group=comm.init(backend)).generate(PROMPTS, params)
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


def test_captured_and_eager_steps_choose_alike(group: Group, path: Path) -> None:
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    for shares in SHARES.get(group.world_size, [None]):
        captured, eager = (
            LLM(str(path), dtype="bf16", shares=shares, group=group, capture=c).generate(PROMPTS, params)
            for c in (True, False)
        )
        assert [c.token_ids for c in captured] == [c.token_ids for c in eager]


def test_no_rank_holds_the_whole_model(group: Group, path: Path) -> None:
    whole = LLM(str(path), dtype="bf16", group=SingleGroup(), threads=1).loaded.weights.bytes_per_token
    mine = LLM(str(path), dtype="bf16", group=group).loaded.weights.bytes_per_token
    assert mine <= whole * (1 / group.world_size + 0.15)  # tiles and heads are coarse in a tiny model


def test_ranks_that_were_started_differently_are_refused(group: Group, path: Path) -> None:
    if group.world_size == 1:
        pytest.skip("one rank cannot differ from itself")
    threads = 2 if group.rank == group.world_size - 1 else 1
    with pytest.raises(InputError, match=rf"ranks disagree on threads: 1 on rank 0, 2 on rank {group.world_size - 1}"):
        LLM(str(path), threads=threads, group=group)
