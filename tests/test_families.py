"""Every family on one rank: bf16 by native kernels, captured and eager. In fp32 on many ranks: tests/mpi."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from distinf import LLM, SamplingParams
from distinf.engine import Sequence
from distinf.models import families, family
from distinf.models.alibi import slopes
from distinf.weights.hf_config import read_config_json
from tests.families import CASES, NEW_TOKENS, RECIPES, bf16_tolerance, prompt_of, steps_of


def test_every_family_has_a_recipe() -> None:
    assert sorted(RECIPES) == families()


@pytest.mark.parametrize("name, case", CASES)
def test_bf16(name: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured steps have the eager ones' bits, and both are near fp32."""
    RECIPES[name][case](tmp_path)
    captured, eager = (LLM(str(tmp_path), dtype="bf16", capture=capture) for capture in (True, False))
    a, b = steps_of(captured, monkeypatch), steps_of(eager, monkeypatch)
    assert len(a) == len(b) == NEW_TOKENS - 1
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    exact, native = (
        llm.engine.prefill([Sequence(0, prompt_of(90))], llm.engine.new_cache([90]))[0]
        for llm in (LLM(str(tmp_path), dtype="fp32"), captured)
    )
    assert (native - exact).abs().max() < bf16_tolerance(captured.config, exact)


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


def test_slopes_of_any_number_of_heads() -> None:
    """Of eight as in the paper; transformers' are rounded to bf16."""
    assert slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    for n in range(1, 73):
        theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), n, torch.float32)[:, 0, 1]
        torch.testing.assert_close(slopes(n), theirs, rtol=2**-8, atol=0)


WRONG: list[Any] = [None, 0, -1, 3, 1.5, float("nan"), True, "x", [], [0], {}, {"rope_type": "yarn"}, {"rope_type": 3}]


@pytest.mark.parametrize("name, case", CASES)
def test_entries_that_are_unknown_or_wrong_are_refused(name: str, case: str, tmp_path: Path) -> None:
    """By name; a value of another kind is a ValueError too, where it is not understood."""
    RECIPES[name][case](tmp_path)
    config = read_config_json(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"'clever_new_trick' is unknown for model_type"):
        family(name).config_from_hf({**config, "clever_new_trick": 3})
    size = "padded_vocab_size" if name == "chatglm" else "vocab_size"
    with pytest.raises(ValueError, match=rf"config: '{size}' is missing"):
        family(name).config_from_hf({k: v for k, v in config.items() if k != size})
    for entry, value in itertools.product(config.keys() - {"model_type"}, WRONG):
        with contextlib.suppress(ValueError):
            family(name).params(family(name).config_from_hf({**config, entry: value}))
