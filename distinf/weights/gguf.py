"""GGUF files of the llama family: names and head order as Hugging Face's, blocks dequantised as they are read."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize

from distinf.gguf_reader import GGUFReader

# Rows are dequantised (to fp32) this many bytes at a time, so that loading needs no second copy of a tensor.
_CHUNK_BYTES = 8 << 20

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class GGUFCheckpoint:
    """See distinf.weights.Checkpoint."""

    def __init__(self, path: Path) -> None:
        """Maps the file and reads its header. Raises ValueError naming it when it is damaged or of another family."""
        self._path = path
        try:
            self._reader = GGUFReader(path)
        except Exception as error:  # the reader raises whatever numpy meets in a damaged header
            raise ValueError(f"{path}: damaged or truncated GGUF file ({type(error).__name__}: {error})") from None
        self._tensors = {t.name: t for t in self._reader.tensors}
        self.config = self._hf_config()
        self._head_dim = int(self.config["head_dim"])

    def _hf_config(self) -> dict[str, Any]:
        architecture = str(self._field("general.architecture"))
        if architecture != "llama":
            raise ValueError(f"{self._path}: GGUF architecture {architecture!r} is not supported; expected 'llama'")
        hidden, heads = self._field("llama.embedding_length"), self._field("llama.attention.head_count")
        return {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_hidden_layers": self._field("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._field("llama.attention.head_count_kv", heads),
            "head_dim": self._field("llama.attention.key_length", hidden // heads),
            "vocab_size": self._tensor("token_embd.weight").shape[1],
            "max_position_embeddings": self._field("llama.context_length"),
            "rms_norm_eps": self._field("llama.attention.layer_norm_rms_epsilon"),
            "rope_theta": self._field("llama.rope.freq_base"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id", None),
        }

    def _field(self, key: str, *default: Any) -> Any:
        field = self._reader.get_field(key)
        if field is not None:
            return field.contents()
        if default:
            return default[0]
        raise ValueError(f"{self._path}: the field {key!r} is missing")

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise ValueError(f"{self._path}: tensor {name!r} is missing")
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensor(_gguf_name(name)).shape))

    def read(
        self, name: str, dtype: torch.dtype, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        tensor = self._tensor(_gguf_name(name))
        shape = self.shape(name)
        if len(shape) == 1:
            return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).to(dtype)
        rows = rows if rows is not None else range(shape[0])
        columns = columns if columns is not None else range(shape[1])
        block, block_bytes = GGML_QUANT_SIZES[tensor.tensor_type]
        first, last = columns.start // block, -(-columns.stop // block)  # whole blocks around the columns
        packed = tensor.data.view(np.uint8).reshape(shape[0], -1)[:, first * block_bytes : last * block_bytes]
        out = torch.empty(len(rows), len(columns), dtype=dtype)
        if not out.numel():
            return out
        step = self._rows_at_a_time(name, shape[1])
        for start in range(0, len(rows), step):
            stop = min(start + step, len(rows))
            part = dequantize(np.ascontiguousarray(packed[rows.start + start : rows.start + stop]), tensor.tensor_type)
            part = self._reorder(name)(part)
            out[start:stop] = torch.from_numpy(part[:, columns.start - first * block :][:, : len(columns)])
        return out

    def _rows_at_a_time(self, name: str, width: int) -> int:
        """Whole heads, since their rows are reordered together."""
        heads = max(1, math.ceil(_CHUNK_BYTES / (4 * width * self._head_dim)))
        return heads * self._head_dim

    def _reorder(self, name: str) -> Callable[[Any], Any]:
        """GGUF's llama keeps the two halves of each rotated head interleaved; Hugging Face one behind the other."""
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            return lambda rows: rows
        half = self._head_dim // 2
        return lambda rows: rows.reshape(-1, half, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[rest]}.{kind}"
