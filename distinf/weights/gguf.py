"""GGUF files of the llama family: names and head order as Hugging Face's, blocks dequantised or kept as they are."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from distinf.config import RopeConfig
from distinf.kernels.formats import FORMATS, Format, Numbers
from distinf.models.rope import Rotary
from distinf.weights.gguf_header import GGUFTensor, read_header
from distinf.weights.raw import RawFile

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

_LLAMA3_FACTORS = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

_Q = GGMLQuantizationType
# Block types whose numbers our kernels multiply as they are: blocks of 32 with scales (and offsets) in fp16.
_KEPT = {
    _Q.Q8_0: replace(FORMATS["int8"], group=32, scales=torch.float16),
    _Q.Q4_0: replace(FORMATS["int4"], group=32, scales=torch.float16),
    _Q.Q4_1: replace(FORMATS["int4"], group=32, scales=torch.float16, zero_points=True),
}


class GGUFCheckpoint:
    """See distinf.weights.Checkpoint."""

    def __init__(self, path: Path) -> None:
        """Reads the header. Raises ValueError naming the file when it is damaged or of another family."""
        self._path = path
        self._file = RawFile(path)
        self._fields, self._tensors = read_header(self._file)
        self.config = self._hf_config()
        self._head_dim = int(self.config["head_dim"])

    @property
    def identity(self) -> str:
        return f"{self._file.identity} {hashlib.sha256(repr((self.config, self._tensors)).encode()).hexdigest()}"

    def _hf_config(self) -> dict[str, Any]:
        architecture = self._field(str, "general.architecture")
        if architecture != "llama":
            raise ValueError(f"{self._path}: GGUF architecture {architecture!r} is not supported; expected 'llama'")
        hidden, heads = self._count("llama.embedding_length"), self._count("llama.attention.head_count")
        layers = self._count("llama.block_count")
        if layers > len(self._tensors):
            raise ValueError(f"{self._path}: {layers} layers (llama.block_count), but {len(self._tensors)} tensors")
        head_dim = self._count("llama.attention.key_length", hidden // heads)
        theta = self._field(float, "llama.rope.freq_base")
        return {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": self._count("llama.feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self._count("llama.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "vocab_size": self.shape("model.embed_tokens.weight")[0],
            "max_position_embeddings": self._count("llama.context_length"),
            "rms_norm_eps": self._field(float, "llama.attention.layer_norm_rms_epsilon"),
            "rope_theta": theta,
            "rope_scaling": self._rope_scaling(head_dim, theta),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "eos_token_id": self._field(int, "tokenizer.ggml.eos_token_id", None),
        }

    def _rope_scaling(self, head_dim: int, theta: float) -> dict[str, Any] | None:
        """`rope_scaling` of config.json. Raises ValueError for rotations that are not ours."""
        rotated = self._count("llama.rope.dimension_count", head_dim)
        kind = self._field(str, "llama.rope.scaling.type", "none")
        if rotated != head_dim or kind not in ("none", "linear"):
            raise ValueError(
                f"{self._path}: rotation of {rotated} of {head_dim} elements, scaling {kind!r}, is not supported"
            )
        if kind == "linear":
            return {"rope_type": "linear", "factor": self._field(float, "llama.rope.scaling.factor")}
        tensor = self._tensors.get(_LLAMA3_FACTORS)
        if tensor is None:
            return None
        if head_dim < 2 or tensor.shape != (head_dim // 2,):
            raise self._wrong(tensor, f"has shape {list(tensor.shape)}; expected {[head_dim // 2]}")
        # Llama 3.1 and later: the file has what the frequencies are divided by, Hugging Face the rule that it is from.
        divisors = self._values(tensor, range(1), range(head_dim // 2))[0]
        scaling = {"rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA3}
        ropes = (Rotary(RopeConfig(theta, head_dim, s)) for s in (None, scaling))
        plain, scaled = (rope.frequencies(torch.ones(1, dtype=torch.int32))[0] for rope in ropes)
        if not torch.allclose(plain / scaled, divisors, rtol=1e-4):
            raise self._wrong(tensor, "is not Llama 3's scaling, which is expected")
        return scaling

    def _field(self, kind: type, key: str, *default: Any) -> Any:
        """A field's value. Raises ValueError naming the file and the field when it is missing, or of another type."""
        if key not in self._fields and default:
            return default[0]
        value = self._fields.get(key)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            found = "missing" if key not in self._fields else f"{value!r}, expected {kind.__name__}"
            raise ValueError(f"{self._path}: the field {key!r} is {found}")
        return value

    def _count(self, key: str, *default: int) -> int:
        """A field that is a whole number of one or more."""
        value = int(self._field(int, key, *default))
        if value < 1:
            raise ValueError(f"{self._path}: the field {key!r} is {value}, expected 1 or more")
        return value

    def _tensor(self, name: str) -> GGUFTensor:
        known = _gguf_name(name)
        if known not in self._tensors:
            raise ValueError(f"{self._path}: tensor {known!r} is missing")
        return self._tensors[known]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def read(
        self, name: str, dtype: torch.dtype, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        tensor = self._tensor(name)
        height, width = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        rows, columns = rows if rows is not None else range(height), columns if columns is not None else range(width)
        shape = (len(rows), len(columns)) if len(tensor.shape) == 2 else tensor.shape
        if not len(rows) or not len(columns):
            return torch.empty(shape, dtype=dtype)
        return self._values(tensor, self._source_rows(name, rows), columns).reshape(shape).to(dtype)

    def _values(self, tensor: GGUFTensor, rows: Sequence[int], columns: range) -> torch.Tensor:
        """fp32 [rows, columns]"""
        blocks, skipped = self._blocks(tensor, rows, columns)
        try:
            with np.errstate(invalid="ignore", over="ignore"):  # found below
                values = torch.from_numpy(dequantize(blocks.numpy(), tensor.kind))
        except NotImplementedError:
            raise self._wrong(tensor, f"has the type {tensor.kind.name}, which cannot be read") from None
        if not values.isfinite().all():
            raise self._wrong(tensor, "has values that are not finite")
        return values[:, skipped : skipped + len(columns)]

    def table(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        height, width = self.shape(name)
        out = torch.empty(height, width, dtype=dtype)
        step = max(1, (8 << 20) // (4 * width))  # rows of 8 MB in fp32, so that no second copy of all is needed
        for start in range(0, height, step):
            out[start : start + step] = self.read(name, dtype, range(start, min(start + step, height)))
        return out

    def stored(self, name: str) -> Format | None:
        return _KEPT.get(self._tensor(name).kind)

    def numbers(self, name: str, rows: range, columns: range) -> Numbers:
        tensor = self._tensor(name)
        form = _KEPT[tensor.kind]
        blocks, skipped = self._blocks(tensor, self._source_rows(name, rows), columns)
        assert not skipped and len(columns) % form.group == 0, columns
        header = 4 if form.zero_points else 2
        blocks = blocks.reshape(len(rows), len(columns) // form.group, header + form.group * form.bits // 8)
        scales = blocks[..., :header].contiguous().view(torch.float16).float()
        if not scales.isfinite().all():
            raise self._wrong(tensor, "has scales that are not finite")
        data = blocks[..., header:]
        # Signed to unsigned; of 4-bit numbers the first half of a block is in the low nibbles.
        number = data ^ 128 if form.bits == 8 else torch.cat((data & 15, data >> 4), -1)
        offset = scales[..., 1] if form.zero_points else None
        return Numbers(number.reshape(len(rows), len(columns)), scales[..., 0], offset)

    def _blocks(self, tensor: GGUFTensor, rows: Sequence[int], columns: range) -> tuple[torch.Tensor, int]:
        """Whole blocks around `columns` of each row, uint8, and how many elements too many are in front."""
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        first, last = columns.start // block, -(-columns.stop // block)
        n = (last - first) * block_bytes
        data = self._file.read(tensor.offset, tensor.row_bytes, rows, first * block_bytes, n)
        return data, columns.start - first * block

    def _source_rows(self, name: str, rows: range) -> Sequence[int]:
        """GGUF's llama keeps the two halves of each rotated head interleaved; Hugging Face one behind the other."""
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            return rows
        head, element = np.divmod(np.asarray(rows), self._head_dim)
        half = self._head_dim // 2
        source: list[int] = (head * self._head_dim + element % half * 2 + element // half).tolist()
        return source

    def _wrong(self, tensor: GGUFTensor, problem: str) -> ValueError:
        return ValueError(f"{self._path}: tensor {tensor.name!r} {problem}")


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[rest]}.{kind}"
