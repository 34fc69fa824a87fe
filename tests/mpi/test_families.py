"""Every family against transformers in fp32, on every rank of the job."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distinf import LLM, Group, SamplingParams, comm
from distinf.comm import InputError
from distinf.engine import Sequence
from distinf.shard import PhaseShares
from tests.families import CASES, RECIPES, bf16_tolerance, prompt_of, steps_of

# fp32 sums of a few hundred terms, a few tens of times in a row: errors of single units grow to parts in 1e5.
FP32_RTOL = 2e-5
LENGTHS = (1, 7, 65, 300)
NEW_TOKENS = 32


@dataclass(frozen=True)
class Oracle:
    """A directory and what transformers makes of it; the model itself is rank 0's."""

    path: Path
    logits: dict[int, torch.Tensor]  # of the last token of prompt_of(n)
    model: Any = None

    def greedy_from(self, prompt: list[int], tokens: list[int]) -> bool:
        """Whether each token is the likeliest after those before it: then greedy decoding gives just these."""
        with torch.no_grad():
            logits = self.model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
        return bool(torch.equal(logits.argmax(-1), torch.tensor(tokens)))


@pytest.fixture(scope="module")
def group() -> Group:
    return comm.init()


def make_oracle(group: Group, tmp_path: Path, name: str, case: str, lengths: tuple[int, ...] = LENGTHS) -> Oracle:
    """Rank 0 writes the model and asks it, the others are told."""
    if group.rank:
        return Oracle(*group.broadcast_object(None))
    with torch.no_grad():
        model = RECIPES[name][case](tmp_path)
        logits = {n: model(torch.tensor([prompt_of(n)])).logits[0, -1].clone() for n in lengths}
    return Oracle(*group.broadcast_object((tmp_path, logits)), model)


def last_logits(llm: LLM, prompts: list[list[int]]) -> torch.Tensor:
    """The whole vocabulary's logits [B, vocab], put together from every rank's part."""
    sequences = [Sequence(i, p) for i, p in enumerate(prompts)]
    mine = llm.engine.prefill(sequences, llm.engine.new_cache([len(p) for p in prompts]))
    return torch.cat(llm.group.all_gather_object(mine), 1)


@pytest.mark.parametrize("name, case", CASES)
def test_logits_and_greedy_tokens_equal_transformers(group: Group, tmp_path: Path, name: str, case: str) -> None:
    oracle = make_oracle(group, tmp_path, name, case)
    llm = LLM(str(oracle.path), dtype="fp32", group=group)
    for lengths in ((1,), (7,), (65,), (300,), (7, 300, 65)):
        y = last_logits(llm, [prompt_of(n) for n in lengths])
        expected = torch.stack([oracle.logits[n] for n in lengths])
        torch.testing.assert_close(y, expected, rtol=0, atol=FP32_RTOL * float(expected.abs().max()))
    prompts = [prompt_of(n) for n in (7, 65, 1)]
    together = [c.token_ids for c in llm.generate(prompts, SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True))]
    if group.rank == 0:
        right = [oracle.greedy_from(p, t) for p, t in zip(prompts, together, strict=True)]
        group.broadcast_object(right)
    else:
        right = group.broadcast_object(None)
    assert right == [True] * len(prompts), together


@pytest.mark.parametrize("name", RECIPES)
def test_captured_and_eager_steps_choose_alike(group: Group, tmp_path: Path, name: str) -> None:
    oracle = make_oracle(group, tmp_path, name, next(iter(RECIPES[name])), lengths=())
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    captured, eager = (
        LLM(str(oracle.path), dtype="bf16", group=group, capture=capture).generate(
            [prompt_of(9), prompt_of(70)], params
        )
        for capture in (True, False)
    )
    assert [c.token_ids for c in captured] == [c.token_ids for c in eager]


MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"]


@pytest.mark.parametrize("name", MIXTURES)
def test_whole_experts_give_the_same_logits(
    group: Group, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, in bf16 by native kernels, and captured as eager; the first of several ranks has no expert."""
    oracle = make_oracle(group, tmp_path, name, next(iter(RECIPES[name])), lengths=(7, 90))
    equal = [1] * group.world_size
    shares = PhaseShares.of(equal) if group.world_size == 1 else replace(PhaseShares.of(equal), ffn=(0, *equal[1:]))

    def llm(dtype: str, capture: bool = True) -> LLM:
        run = {"dtype": dtype, "shares": shares, "expert_parallel": True, "capture": capture}
        return LLM(str(oracle.path), group=group, **run)

    exact, captured, eager = llm("fp32"), llm("bf16"), llm("bf16", capture=False)
    moe, experts = exact.config.moe, group.all_gather_object(exact.loaded.model.shard.experts)
    assert moe and [e for of_rank in experts for e in of_rank] == list(range(moe.n_experts))
    assert bool(experts[0]) == (group.world_size == 1)
    expected = torch.stack([oracle.logits[n] for n in (7, 90)])
    for model, tolerance in (
        (exact, FP32_RTOL * float(expected.abs().max())),
        (captured, bf16_tolerance(captured.config, expected)),
    ):
        y = last_logits(model, [prompt_of(n) for n in (7, 90)])
        torch.testing.assert_close(y, expected, rtol=0, atol=tolerance)
    a, b = steps_of(captured, monkeypatch), steps_of(eager, monkeypatch)
    assert len(a) > 1 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_model_without_experts_has_none_to_divide(group: Group, tmp_path: Path) -> None:
    oracle = make_oracle(group, tmp_path, "qwen2", "plain", lengths=())
    with pytest.raises(InputError, match="--expert-parallel: qwen2 models have no experts; expected a mixture"):
        LLM(str(oracle.path), group=group, expert_parallel=True)
