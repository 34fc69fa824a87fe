"""A rank's forward pass and the engine around it, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distinf import LLM, SamplingParams
from distinf.comm import InputError
from distinf.engine import Decoder, Sequence

# fp32 sums of a few hundred terms, a few tens of times in a row: errors of single units grow to parts in 1e5.
FP32_RTOL = 2e-5


def logits_of(llm: LLM, prompt: list[int]) -> torch.Tensor:
    """fp32 [vocab] after the prompt, through the engine's own prefill."""
    cache = llm.engine.new_cache([len(prompt)])
    return llm.engine.prefill([Sequence(0, prompt)], cache)[0]


def prompt_of(n: int, vocab: int = 199) -> list[int]:
    return [(37 * i + 11) % vocab for i in range(n)]


def test_native_bf16_logits_are_near_fp32(tiny_llama: Path) -> None:
    """Random-walk of bf16 roundings: about 8 a layer, 3 layers, half an ulp each; five sigma of it."""
    exact = logits_of(LLM(str(tiny_llama), dtype="fp32"), prompt_of(90))
    native = logits_of(LLM(str(tiny_llama), dtype="bf16"), prompt_of(90))
    assert (native - exact).abs().max() < 5 * 2**-9 * (8 * 3) ** 0.5 * exact.std()
    assert not torch.equal(native, exact)


def test_int8_cache_logits_are_near_bf16(tiny_llama: Path) -> None:
    """A stored number is off by at most half a step of its vector's largest / 127: 2^-8 of it, a bf16 rounding of
    the largest for every one. The cache is written once a layer, beside some 8 bf16 roundings: it is one more.
    """
    exact = logits_of(LLM(str(tiny_llama), dtype="fp32"), prompt_of(90))
    int8 = logits_of(LLM(str(tiny_llama), kv_dtype="int8"), prompt_of(90))
    assert (int8 - exact).abs().max() < 5 * 2**-9 * (9 * 3) ** 0.5 * 2 * exact.std()
    assert not torch.equal(int8, logits_of(LLM(str(tiny_llama)), prompt_of(90)))


def test_int8_cache_needs_bf16_activations(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="--kv-dtype int8 and --dtype fp32"):
        LLM(str(tiny_llama), dtype="fp32", kv_dtype="int8")


def test_a_batch_gives_what_each_prompt_gives_alone(tiny_llama: Path) -> None:
    llm = LLM(str(tiny_llama), dtype="fp32")
    prompts = [prompt_of(5), prompt_of(70), prompt_of(1)]
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    together = [c.token_ids for c in llm.generate(prompts, params)]
    assert together == [llm.generate([p], params)[0].token_ids for p in prompts]


def test_a_long_prompt_goes_in_parts(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(tiny_llama), dtype="fp32")
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    prompts = [prompt_of(100), prompt_of(30), prompt_of(64)]
    whole = [c.token_ids for c in llm.generate(prompts, params)]
    monkeypatch.setattr("distinf.engine.PREFILL_ROWS", 48)
    assert [c.token_ids for c in llm.generate(prompts, params)] == whole


@pytest.mark.parametrize("dtype", ["bf16", "int8", "w8a8", "int4", "fp32"])
def test_captured_and_eager_steps_are_the_same_bits(make_llama: Callable[..., Path], dtype: str) -> None:
    """Three sequences that end at different tokens, so that three batch sizes are captured."""
    path = make_llama(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=192)
    prompts = [prompt_of(5), prompt_of(70), prompt_of(2)]
    results = []
    for capture in (True, False):
        llm = LLM(str(path), dtype=dtype, capture=capture)
        ends = llm.generate(prompts, SamplingParams(max_new_tokens=9, ignore_eos=True))
        object.__setattr__(llm.config, "eos_ids", (ends[0].token_ids[3], ends[1].token_ids[6]))
        steps: list[torch.Tensor] = []
        decode = Decoder.__call__

        def keep(self: Decoder, running: list[Sequence], steps: list = steps, decode: Any = decode) -> torch.Tensor:
            steps.append(decode(self, running).clone())
            return steps[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Decoder, "__call__", keep)
            results.append((llm.generate(prompts, SamplingParams(max_new_tokens=30)), steps))
    (captured, captured_logits), (eager, eager_logits) = results
    assert [c.token_ids for c in captured] == [c.token_ids for c in eager]
    assert len({len(c.token_ids) for c in eager}) > 1, "no sequence ended before another"
    assert len(captured_logits) == len(eager_logits)
    assert all(torch.equal(a, b) for a, b in zip(captured_logits, eager_logits, strict=True))


@pytest.mark.parametrize("dtype, bits, unit", [("int8", 8, 2**-9), ("w8a8", 8, 2**-7), ("int4", 4, 2**-9)])
def test_quantised_logits_are_near_fp32(make_llama: Callable[..., Path], dtype: str, bits: int, unit: float) -> None:
    """Native against reference kernels of the same format: only roundings to bf16 differ (see the bf16 test).

    In w8a8 such a difference can move an activation to the next of its 127 steps, which is `unit` of it.
    """
    path = make_llama(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=192)
    native, reference = (
        logits_of(LLM(str(path), dtype=dtype, kernels=k, head_dtype="bf16"), prompt_of(40))
        for k in ("native", "reference")
    )
    assert (native - reference).abs().max() < 5 * unit * (8 * 3) ** 0.5 * reference.std()
    exact = logits_of(LLM(str(path), dtype="fp32"), prompt_of(40))
    assert 0 < (native - exact).std() < 8 * 2.0**-bits * exact.std() * (7 * 3) ** 0.5


def test_groups_that_do_not_divide_are_refused_before_reading(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match=r"--group-size 64 does not divide the input features 0 .. 120 of"):
        LLM(str(tiny_llama), dtype="int4", group_size=64)
    with pytest.raises(InputError, match=r"--group-size 48: expected one of 0, 32, 64, 128"):
        LLM(str(tiny_llama), dtype="int8", group_size=48)
    with pytest.raises(InputError, match=r"--head-dtype fp32 and --dtype int8"):
        LLM(str(tiny_llama), dtype="int8", head_dtype="fp32")


def test_scores_equal_transformers(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log probability is a logit less a log-sum-exp; neither errs by more than the worst logit does."""
    ids = torch.tensor([prompt_of(300)])
    with torch.no_grad():
        oracle = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)(ids, labels=ids)
    expected = oracle.logits[0, :-1].double().log_softmax(1).gather(1, ids[0, 1:, None])[:, 0]
    tolerance = 2 * FP32_RTOL * float(oracle.logits.abs().max())
    engine = LLM(str(tiny_llama), dtype="fp32").engine
    for rows in (1024, 48):
        monkeypatch.setattr("distinf.engine.PREFILL_ROWS", rows)
        scores = engine.score(ids[0].tolist())
        torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)
        assert abs(-float(scores.mean()) - float(oracle.loss)) < tolerance


def test_stops_at_the_end_of_sequence_and_at_the_length(tiny_llama: Path) -> None:
    llm = LLM(str(tiny_llama), dtype="fp32")
    free = llm.generate([prompt_of(9)], SamplingParams(max_new_tokens=20, ignore_eos=True))[0]
    assert (free.finish_reason, len(free.token_ids)) == ("length", 20)
    end = free.token_ids[6]
    object.__setattr__(llm.config, "eos_ids", (end,))
    stopped = llm.generate([prompt_of(9)], SamplingParams(max_new_tokens=20))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(end) + 1]


def test_prompts_that_the_model_cannot_take(tiny_llama: Path) -> None:
    llm = LLM(str(tiny_llama), dtype="fp32")
    for prompt, message in [
        ([], "the prompt is empty"),
        (prompt_of(500), "exceed the model's context of 512 tokens"),
        ([3, 199], "token id 199 is outside the vocabulary of 199"),
        ([-1], "token id -1 is outside"),
    ]:
        with pytest.raises(InputError, match=message):
            llm.generate([prompt], SamplingParams(max_new_tokens=13))
