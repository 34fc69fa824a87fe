"""Checkpoints on disk into packed weights. A format is one reader class and one row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from distinf.kernels.formats import Format, Numbers
from distinf.weights.hf_config import read_config_json


class Checkpoint(Protocol):
    """A checkpoint seen as named tensors, whatever the file format; names are Hugging Face's.

    Several threads may read at once. What is damaged is a ValueError that names file and tensor.
    """

    @property
    def config(self) -> Mapping[str, Any]:
        """The fields of config.json."""

    @property
    def identity(self) -> str:
        """Text that differs for checkpoints that differ: names, sizes and times of the files."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises ValueError naming the file when it is missing."""

    def read(
        self, name: str, dtype: torch.dtype, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        """A slice of a tensor in `dtype`, dequantised if need be; only the bytes of the slice are read."""

    def announce(self, name: str, rows: range) -> None:
        """These rows of a tensor will be read in pieces, each once: what a reader fetches together it may keep."""

    def table(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A whole tensor: where the file has it in `dtype`, a view of the mapped file that ranks share."""

    def stored(self, name: str) -> Format | None:
        """The format of our kernels that holds a tensor's own numbers; None where it has none, or ours do not fit."""

    def numbers(self, name: str, rows: range, columns: range) -> Numbers:
        """A slice of a tensor that `stored` has a format for; columns are whole groups."""


# quantization_config.quant_method of config.json -> module and class.
_QUANTISED = {
    "gptq": ("gptq", "GPTQCheckpoint"),
    "awq": ("awq", "AWQCheckpoint"),
    "compressed-tensors": ("compressed_tensors", "CompressedTensorsCheckpoint"),
    "fp8": ("fp8", "FP8Checkpoint"),
}


def open_checkpoint(model: Path, load_format: str, config_json: Path | None, num_layers: int | None) -> Checkpoint:
    """The checkpoint at `model`: a Hugging Face directory or a GGUF file; with `dummy`, `config_json` and no weights.

    Raises ValueError naming the path when it is neither, or when config.json cannot be read.
    """
    if load_format == "dummy":
        return _reader("dummy", "DummyCheckpoint")(config_json or model / "config.json", num_layers)
    if model.is_dir():
        config = read_config_json(model / "config.json")
        quantisation = config.get("quantization_config")
        if not quantisation:
            return _reader("safetensors", "SafetensorsCheckpoint")(model, config)
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        if not isinstance(method, str) or method not in _QUANTISED:
            raise ValueError(
                f"{model / 'config.json'}: quant_method {method!r} is not supported; "
                f"expected one of {', '.join(_QUANTISED)}"
            )
        if method == "compressed-tensors" and quantisation.get("format") == "float-quantized":
            method = "fp8"
        return _reader(*_QUANTISED[method])(model, config)
    if model.suffix == ".gguf" and model.is_file():
        return _reader("gguf", "GGUFCheckpoint")(model)
    if model.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise ValueError(
            f"--model {model}: pickled weights are not read, they can run code; expected safetensors or GGUF"
        )
    raise ValueError(f"--model {model}: no such checkpoint; expected a Hugging Face directory or a .gguf file")


def _reader(module: str, name: str) -> Callable[..., Checkpoint]:
    """A reader's class, imported only when it is needed."""
    reader: Callable[..., Checkpoint] = getattr(import_module(f"distinf.weights.{module}"), name)
    return reader
