"""Where a GGUF file has the tensors of a Hugging Face directory, and what llama.cpp's converter has done to them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np

from distinf.config import ModelConfig
from distinf.weights.gguf_config import Architecture
from distinf.weights.gguf_header import GGUFTensor
from distinf.weights.gguf_rope import ROPE_TENSORS

# Rows of Hugging Face's tensor -> rows of the file's.
Order = Callable[[np.ndarray], np.ndarray]

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_KV_UP = ".kv_b_proj.weight"
_CHOICE_BIAS = ".e_score_correction_bias"


@dataclass(frozen=True)
class Place:
    """A tensor of the file, which holds one of Hugging Face's."""

    tensor: GGUFTensor
    shape: tuple[int, ...]  # of Hugging Face's
    order: Order | None = None  # of rows, or of a vector's elements
    transposed: bool = False
    shift: float = 0.0  # that Hugging Face's has not

    @property
    def tensors(self) -> tuple[GGUFTensor, ...]:
        """What it is made of."""
        return (self.tensor,)


@dataclass(frozen=True)
class TwoPlaces:
    """Latent attention's second matrix of keys and values: keys [heads, rank, nope] and values [heads, v, rank]."""

    keys: GGUFTensor
    values: GGUFTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Hugging Face has a head's keys and its values one below the other, [heads * (nope + v), rank]."""
        heads, rank, nope = self.keys.shape
        return heads * (nope + self.values.shape[1]), rank

    @property
    def tensors(self) -> tuple[GGUFTensor, ...]:
        """What it is made of."""
        return self.keys, self.values


class Places:
    """Finds tensors by Hugging Face's names."""

    def __init__(
        self,
        path: Path,
        name: str,
        architecture: Architecture,
        config: ModelConfig,
        tensors: Mapping[str, GGUFTensor],
    ) -> None:
        """`name` is general.architecture, `config` what config.json's entries amount to."""
        kind = next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
        self._names = gguf.get_tensor_name_map(kind, config.n_layers)
        self._path = path
        self._architecture = architecture
        self._config = config
        self._tensors = tensors

    def find(self, name: str) -> Place | TwoPlaces:
        """Raises ValueError naming the file and the tensor when it is missing or has a shape that nothing here has."""
        known = self._known(name)
        if name.endswith(_KV_UP) and known not in self._tensors:
            return self._two_places(known)
        expert = _EXPERT.search(name)
        if expert and known not in self._tensors:  # early files do not stack them
            tensor = self._tensor(known.replace("_exps.", f".{expert[1]}."))
        else:
            tensor = self.part(self._tensor(known), int(expert[1])) if expert else self._tensor(known)
        if name.endswith(".shared_expert_gate.weight") and len(tensor.shape) == 1:
            tensor = replace(tensor, shape=(1, *tensor.shape))
        if name.endswith(self._architecture.transposed) and len(tensor.shape) == 2:
            return Place(tensor, tensor.shape[::-1], transposed=True)
        shift = self._architecture.norm_shift if name.endswith("norm.weight") else 0.0
        return Place(tensor, tensor.shape, self._order(name), shift=shift)

    def refuse_rest(self, taken: set[str]) -> None:
        """Raises ValueError for a tensor that is none of `taken`: without it another model would be computed."""
        harmless = {"output.weight", *ROPE_TENSORS}
        for name in self._tensors:
            if name not in taken | harmless and not name.endswith(".attn_rot_embd.weight"):
                raise ValueError(f"{self._path}: tensor {name!r} is unknown for model_type {self._config.model_type!r}")

    def part(self, tensor: GGUFTensor, i: int) -> GGUFTensor:
        """One matrix of a stack."""
        if len(tensor.shape) != 3 or i >= tensor.shape[0]:
            raise ValueError(
                f"{self._path}: tensor {tensor.name!r} has shape {list(tensor.shape)}; expected more than {i} matrices"
            )
        n_bytes = tensor.shape[1] * tensor.row_bytes
        return replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + i * n_bytes)

    def _known(self, name: str) -> str:
        """The file's name of a tensor, as the gguf package's tables have it."""
        plain = _EXPERT.sub(".experts.", name).replace(_CHOICE_BIAS, ".e_score_correction.bias")
        known: str | None = self._names.get_name(plain, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise ValueError(f"{self._path}: no tensor of this architecture holds {name!r}")
        return known

    def _tensor(self, known: str) -> GGUFTensor:
        if known not in self._tensors:
            raise ValueError(f"{self._path}: tensor {known!r} is missing")
        return self._tensors[known]

    def _two_places(self, known: str) -> TwoPlaces:
        keys, values = (self._tensor(known.replace("attn_kv_b", part)) for part in ("attn_k_b", "attn_v_b"))
        mla, heads = self._config.mla, self._config.n_heads
        assert mla
        for tensor, shape in ((keys, (mla.kv_rank, mla.nope_dim)), (values, (mla.v_dim, mla.kv_rank))):
            if tensor.shape != (heads, *shape):
                raise ValueError(
                    f"{self._path}: tensor {tensor.name!r} has shape {list(tensor.shape)}; expected {[heads, *shape]}"
                )
        return TwoPlaces(keys, values)

    def _order(self, name: str) -> Order | None:
        config, stem = self._config, name.rpartition(".")[0]
        if self._architecture.interleaved and stem.endswith((".q_proj", ".k_proj")):
            return lambda rows: _neighbours(rows, config.head_dim)
        if self._architecture.qkv_apart and stem.endswith(".query_key_value"):
            return lambda rows: _apart(rows, config.n_heads, config.n_kv_heads, config.head_dim)
        return None


def _neighbours(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Element i of a head's first half stands at 2 i, that of its second half at 2 i + 1."""
    head, element = np.divmod(rows, head_dim)
    half = head_dim // 2
    moved: np.ndarray = head * head_dim + element % half * 2 + element // half
    return moved


def _apart(rows: np.ndarray, n_heads: int, n_kv_heads: int, head_dim: int) -> np.ndarray:
    """Rows of groups, each its queries, a key and a value, in a tensor of all queries, all keys, all values."""
    queries = n_heads // n_kv_heads * head_dim
    group, row = np.divmod(rows, queries + 2 * head_dim)
    other, element = np.divmod(row - queries, head_dim)  # 0: a key, 1: a value
    first = (n_heads + np.maximum(other, 0) * n_kv_heads) * head_dim
    moved: np.ndarray = np.where(row < queries, group * queries + row, first + group * head_dim + element)
    return moved
