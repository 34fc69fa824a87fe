"""Every family on one rank: bf16 by native kernels, captured and eager. In fp32 on many ranks: tests/mpi."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distinf import LLM, SamplingParams
from distinf.engine import Decoder, Sequence
from distinf.models import families, family
from distinf.weights.hf_config import read_config_json
from tests.families import CASES, RECIPES, prompt_of

PARAMS = SamplingParams(max_new_tokens=8, ignore_eos=True)


def test_every_family_has_a_recipe() -> None:
    assert sorted(RECIPES) == families()


def steps_of(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Logits of the decode steps of two sequences."""
    steps: list[torch.Tensor] = []
    decode = Decoder.__call__

    def keep(self: Decoder, running: list[Sequence]) -> torch.Tensor:
        steps.append(decode(self, running).clone())
        return steps[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "__call__", keep)
        llm.generate([prompt_of(5), prompt_of(70)], PARAMS)
    return steps


@pytest.mark.parametrize("name, case", CASES)
def test_bf16(name: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured steps have the eager ones' bits, and both are near fp32.

    A random walk of bf16 roundings: at most 16 a layer, half an ulp each, and five sigma of it; the scores of these
    models are of the size of 1, so that an error in one is as large in its weight.
    """
    RECIPES[name][case](tmp_path)
    captured, eager = (LLM(str(tmp_path), dtype="bf16", capture=capture) for capture in (True, False))
    a, b = steps_of(captured, monkeypatch), steps_of(eager, monkeypatch)
    assert len(a) == len(b) == PARAMS.max_new_tokens - 1
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    exact, native = (
        llm.engine.prefill([Sequence(0, prompt_of(90))], llm.engine.new_cache([90]))[0]
        for llm in (LLM(str(tmp_path), dtype="fp32"), captured)
    )
    assert (native - exact).abs().max() < 5 * 2**-9 * (16 * captured.config.n_layers) ** 0.5 * exact.std()


@pytest.mark.parametrize("name, case", [("llama", "dynamic"), ("phi3", "longrope")])
def test_ropes_that_depend_on_the_length(name: str, case: str, tmp_path: Path) -> None:
    """Beyond the trained 128 tokens the angles of a new token are those of the length that it makes."""
    oracle, prompt = RECIPES[name][case](tmp_path), prompt_of(130)
    ids = torch.tensor([prompt])
    out = oracle.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, eos_token_id=None
    )
    params = SamplingParams(max_new_tokens=10, ignore_eos=True)
    assert LLM(str(tmp_path), dtype="fp32").generate([prompt], params)[0].token_ids == out[0, 130:].tolist()


@pytest.mark.parametrize("name", families())
def test_entries_that_nobody_knows_are_refused(name: str, tmp_path: Path) -> None:
    RECIPES[name][next(iter(RECIPES[name]))](tmp_path)
    config = read_config_json(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"'clever_new_trick' is unknown for model_type"):
        family(name).config_from_hf({**config, "clever_new_trick": 3})
    with pytest.raises(ValueError, match=r"config: 'vocab_size' is missing"):
        family(name).config_from_hf({k: v for k, v in config.items() if k != "vocab_size"})
