"""The rotation that a GGUF file asks for, as config.json has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from distinf.config import RopeConfig
from distinf.models.rope import Rotary
from distinf.weights.gguf_fields import GGUFFields
from distinf.weights.gguf_header import GGUFTensor

_THETA = 10000.0  # where the file has none
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA3_DIVISORS = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
# Tensors that only say how heads rotate.
ROPE_TENSORS = (_LLAMA3_DIVISORS, _LONG, _SHORT)

# Values of a tensor in fp32: [elements].
Read = Callable[[GGUFTensor], torch.Tensor]


def rope_entries(file: GGUFFields, rotated: int, head_dim: int, read: Read) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling`, and `partial_rotary_factor` where `rotated` is only a part of `head_dim`.

    Raises ValueError for a scaling that is not ours.
    """
    theta = float(file.number("rope.freq_base", _THETA))
    entries: dict[str, Any] = {"rope_theta": theta, "rope_scaling": _scaling(file, rotated, theta, read)}
    if rotated != head_dim:
        entries["partial_rotary_factor"] = math.nextafter(
            rotated / head_dim, 1
        )  # times head_dim it is cut to `rotated`
    return entries


def _scaling(file: GGUFFields, rotated: int, theta: float, read: Read) -> dict[str, Any] | None:
    kind = file.value("rope.scaling.type", "none", (str,))
    if _LONG in file.tensors:
        return _longrope(file, rotated, read)
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.positive("rope.scaling.factor")}
    if kind == "yarn":
        return _yarn(file)
    if kind != "none":
        raise ValueError(f"{file.path}: rotation with the scaling {kind!r} is not supported")
    return _llama3(file, rotated, theta, read) if _LLAMA3_DIVISORS in file.tensors else None


def _yarn(file: GGUFFields) -> dict[str, Any]:
    if file.number("rope.scaling.yarn_ext_factor", 1.0) != 1:
        raise ValueError(f"{file.path}: {file.name('rope.scaling.yarn_ext_factor')} is not supported; expected 1")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": file.positive("rope.scaling.factor"),
        "original_max_position_embeddings": file.count("rope.scaling.original_context_length"),
    }
    optional = {"attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
    for entry, name in optional.items():
        if file.has(f"rope.scaling.yarn_{name}"):
            scaling[entry] = file.positive(f"rope.scaling.yarn_{name}")
    if multiplier := file.number("rope.scaling.yarn_log_multiplier", 0.0):
        # DeepSeek's: a tenth of mscale_all_dim; that mscale is the same is taken for granted.
        scaling["mscale"] = scaling["mscale_all_dim"] = round(10 * multiplier, 6)
    return scaling


def _longrope(file: GGUFFields, rotated: int, read: Read) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "original_max_position_embeddings": file.count("rope.scaling.original_context_length"),
    }
    for entry, name in (("long_factor", _LONG), ("short_factor", _SHORT)):
        scaling[entry] = _pairs(file, name, rotated, read).tolist()
    if file.has("rope.scaling.attn_factor"):
        scaling["attention_factor"] = file.positive("rope.scaling.attn_factor")
    return scaling


def _llama3(file: GGUFFields, rotated: int, theta: float, read: Read) -> dict[str, Any]:
    """Llama 3.1 and later: the file has what the frequencies are divided by, Hugging Face the rule that it is from."""
    divisors = _pairs(file, _LLAMA3_DIVISORS, rotated, read)
    scaling = {"rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA3}
    ropes = (Rotary(RopeConfig(theta, rotated, s)) for s in (None, scaling))
    plain, scaled = (rope.frequencies(torch.ones(1, dtype=torch.int32))[0] for rope in ropes)
    if not torch.allclose(plain / scaled, divisors, rtol=1e-4):
        raise ValueError(f"{file.path}: tensor {_LLAMA3_DIVISORS!r} is not Llama 3's scaling, which is expected")
    return scaling


def _pairs(file: GGUFFields, name: str, rotated: int, read: Read) -> torch.Tensor:
    """One number for each pair that rotates."""
    tensor = file.tensors.get(name)
    if tensor is None:
        raise ValueError(f"{file.path}: tensor {name!r} is missing")
    if rotated < 2 or tensor.shape != (rotated // 2,):
        raise ValueError(f"{file.path}: tensor {name!r} has shape {list(tensor.shape)}; expected {[rotated // 2]}")
    return read(tensor)
