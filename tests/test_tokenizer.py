"""A checkpoint is data: a tokenizer that is code is neither run nor asked about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distinf import LLM, SamplingParams
from distinf.cli import main
from tests.families import RECIPES


@pytest.fixture
def chatglm(tmp_path: Path) -> Path:
    """A directory as ChatGLM3's are, whose code leaves a file behind when it runs."""
    RECIPES["chatglm"]["plain"](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    code = {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": code}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "tokenizer_class": "ChatGLMTokenizer"}))
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    for name in ("tokenization_chatglm.py", "configuration_chatglm.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')\n")
    return tmp_path


def test_code_of_a_checkpoint_is_named_and_not_run(chatglm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--model", str(chatglm), "--prompt", "x"])
    out, err = capsys.readouterr()
    assert not out, "somebody was asked"
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert (
        f"{chatglm}: no usable tokenizer (tokenizer_config.json asks for tokenization_chatglm.ChatGLMTokenizer" in line
    )
    assert "expected a tokenizer.json" in line and not (chatglm / "it ran").exists()


def test_a_damaged_vocabulary_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokenizers package raises a bare Exception for a merge of tokens that are not in the vocabulary."""
    RECIPES["llama"][next(iter(RECIPES["llama"]))](tmp_path)
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["~", "#"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--model", str(tmp_path), "--prompt", "a"])
    assert f"{tmp_path}: no usable tokenizer (" in capsys.readouterr().err


def test_token_ids_need_none(chatglm: Path) -> None:
    (completion,) = LLM(str(chatglm)).generate([[5, 6, 7]], SamplingParams(max_new_tokens=3, ignore_eos=True))
    assert len(completion.token_ids) == 3 and not completion.text and not (chatglm / "it ran").exists()
