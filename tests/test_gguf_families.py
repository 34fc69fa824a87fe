"""GGUF files of every family: the tensors and the logits of the directory that they were made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from distinf import LLM
from distinf.config import RunConfig
from distinf.engine import Sequence
from distinf.models.params import Param
from distinf.plan import Plan
from distinf.tokenizer import Tokenizer
from distinf.weights import Checkpoint, open_checkpoint
from distinf.weights.gguf_config import ARCHITECTURES
from tests import checkpoint_files as files
from tests.families import prompt_of
from tests.gguf_families import CASES, write

# fp32 sums of a few hundred terms, a few tens of times in a row: errors of single units grow to parts in 1e5.
FP32_RTOL = 2e-5


def test_every_architecture_has_a_case() -> None:
    assert {architecture for architecture, _ in CASES.values()} == set(ARCHITECTURES)


def last_logits(path: Path) -> torch.Tensor:
    """After a prompt that is longer than any window and any trained context here."""
    llm = LLM(str(path), dtype="fp32")
    prompt = prompt_of(150)
    return llm.engine.prefill([Sequence(0, prompt)], llm.engine.new_cache([len(prompt)]))[0]


def params_of(checkpoint: Checkpoint) -> list[Param]:
    return list(Plan.of(checkpoint, RunConfig(dtype="auto")).params)


@pytest.mark.parametrize("case", CASES)
def test_tensors_and_logits_are_the_directorys(case: str, tmp_path: Path) -> None:
    """Tensors to the bit, but for norms that have been given 1 and lost it again."""
    directory, path = write(case, tmp_path)
    theirs, ours = (open_checkpoint(p, "auto", None, None) for p in (directory, path))
    for name, shape in {k: v for p in params_of(theirs) for k, v in p.shapes().items()}.items():
        expected = theirs.read(name, torch.float32)
        rounding = 2**-23 if name.endswith("norm.weight") and case.startswith("gemma") else 0.0
        assert ours.shape(name) == shape
        torch.testing.assert_close(ours.read(name, torch.float32), expected, rtol=0, atol=rounding)
        if len(shape) == 2:  # heads and blocks are cut
            rows, columns = range(shape[0])[3:-7], range(7, shape[1] - 5)
            assert torch.equal(ours.read(name, torch.float32, rows), expected[3:-7]), name
            assert torch.equal(ours.read(name, torch.float32, rows, columns), expected[3:-7, 7:-5]), name
    expected = last_logits(directory)
    torch.testing.assert_close(last_logits(path), expected, rtol=0, atol=FP32_RTOL * float(expected.abs().max()))


@pytest.mark.parametrize("case", ["mixtral", "gptneox", "gpt2", "deepseek2"])
def test_kept_numbers_are_what_is_read(case: str, tmp_path: Path) -> None:
    """Of stacked experts and of rows in another order; a transposed tensor keeps none."""
    checkpoint = open_checkpoint(write(case, tmp_path, Kind.Q8_0)[1], "auto", None, None)
    kept = 0
    for name, shape in {k: v for p in params_of(checkpoint) for k, v in p.shapes().items()}.items():
        form = checkpoint.stored(name)
        if form is not None:
            rows, columns = range(1, shape[0]), range(32, shape[1])
            numbers = checkpoint.numbers(name, rows, columns).dequantised(form)
            assert torch.equal(numbers, checkpoint.read(name, torch.float32, rows, columns)), name
            kept += 1
    assert kept > 5 or case == "gpt2"


EXTRA = np.ones((3, 96), np.float32)
REFUSED: list[tuple[str, Callable[[gguf.GGUFWriter], None], str]] = [
    ("qwen2", lambda w: w.add_logit_scale(0.5), r"the field 'qwen2.logit_scale' is unknown; it may change"),
    ("qwen2", lambda w: w.add_array("qwen2.head_scale", [1, 2]), r"the field 'qwen2.head_scale' is unknown"),
    ("qwen2", lambda w: w.add_tensor("blk.1.attn_q_norm.weight", EXTRA), r"tensor 'blk.1.attn_q_norm.weight' is unknown"),
    ("qwen2", lambda w: w.add_tensor("blk.9.attn_q.weight", EXTRA), r"tensor 'blk.9.attn_q.weight' is unknown"),
    ("qwen2", lambda w: w.add_uint16("split.count", 3), r"model.gguf: one of 3 parts; expected all in one file"),
    ("qwen2", lambda w: w.add_causal_attention(False), r"qwen2.attention.causal False is not supported"),
    ("qwen2", lambda w: w.add_expert_count(8), r"8 experts \(qwen2.expert_count\), but no in the tensors"),
    ("qwen2", lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), r"the scaling 'longrope' is not supported"),
    ("qwen2", lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), r"'qwen2.rope.scaling.factor' is missing"),
    ("qwen2", lambda w: w.add_head_count(0), r"the field 'qwen2.attention.head_count' is 0, expected 1 or more"),
    ("llama", lambda w: w.add_rope_dimension_count(10), r"rotation of 10 of 20 elements, values of 20, is not supported"),
    ("qwen3moe", lambda w: w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID), r"expert_gating_func 2 is not"),
    ("qwen3moe", lambda w: w.add_expert_count(5), r"5 experts \(qwen3moe.expert_count\), but 6 in the tensors"),
    ("deepseek2", lambda w: w.add_key_length_mla(8), r"rotation of 12 elements of keys of 8 is not supported"),
    ("deepseek2", lambda w: w.add_value_length_mla(64), r"'blk.0.attn_v_b.weight' has shape \[3, 32, 64\]; expected \[3, 64, 64\]"),
]  # fmt: skip


@pytest.mark.parametrize("case, more, message", REFUSED, ids=[message for *_, message in REFUSED])
def test_what_would_be_another_model_is_refused(
    tmp_path: Path, case: str, more: Callable[[gguf.GGUFWriter], None], message: str
) -> None:
    _, path = write(case, tmp_path, more=more)
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(path, "auto", None, None)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_architecture_is_named_with_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    files.write_gguf(path, Kind.F32)
    path.write_bytes(path.read_bytes().replace(b"llama", b"bloom", 1))
    with pytest.raises(ValueError, match=r"model.gguf: GGUF architecture 'bloom' is not supported; .* llama, qwen2, "):
        open_checkpoint(path, "auto", None, None)


def test_a_vocabulary_that_lacks_its_last_token_is_named(tmp_path: Path) -> None:
    _, path = write("qwen2", tmp_path)
    with pytest.raises(ValueError, match=r"model.gguf: no usable tokenizer \("):
        Tokenizer(path)
