"""The entries of a config.json, each taken by name: what is left and may change the computation is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from distinf.config import ModelConfig

# Entries that do not change what a forward pass computes: where the file comes from, how the model was trained,
# what generation and other heads than the language model's default to. quantization_config is the readers'.
_NO_EFFECT = {
    "architectures", "auto_map", "dtype", "model_type", "name_or_path", "torch_dtype", "transformers_version",
    "tokenizer_class", "quantization_config", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "output_router_logits", "bos_token_id", "pad_token_id", "sep_token_id", "unk_token_id",
    "decoder_start_token_id", "is_decoder", "is_encoder_decoder", "attn_implementation", "attention_dropout",
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "hidden_dropout", "layerdrop", "classifier_dropout",
    "initializer_range", "init_std", "pretraining_tp", "gradient_checkpointing", "router_aux_loss_coef",
    "router_jitter_noise", "input_jitter_noise", "aux_loss_alpha", "seq_aux", "z_loss_weight",
    "chunk_size_feed_forward", "id2label", "label2id", "task_specific_params", "problem_type",
    "cross_attention_hidden_size", "keys_to_ignore_at_inference", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "reorder_and_upcast_attn", "cache_implementation",
    "num_nextn_predict_layers", "ep_size", "max_length", "temperature", "top_k", "top_p", "do_sample",
    "repetition_penalty", "model_max_length", "prefix", "finetuning_task", "torchscript",
    "attention_probs_dropout_prob",
}  # fmt: skip
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
# What is divided by, or counted: one or more.
_SIZES = {
    "hidden_size", "n_embd", "num_attention_heads", "n_head", "head_dim", "decoder_sparse_step", "n_group",
    "query_pre_attn_scalar", "rope_ratio", "ffn_hidden_size",
}  # fmt: skip
_REQUIRED = object()


class Fields:
    """A config.json whose entries are marked as they are read."""

    def __init__(self, hf: Mapping[str, Any]) -> None:
        self._hf = hf
        self._taken: set[str] = set()

    def get(self, *names: str, default: Any = _REQUIRED) -> Any:
        """The first of these entries that is there and not null, else `default`.

        Raises ValueError naming the entry when there is none and no default.
        """
        self._taken |= set(names)
        for name in names:
            if self._hf.get(name) is not None:
                return self._hf[name]
        if default is _REQUIRED:
            raise ValueError(f"config: {names[0]!r} is missing")
        return default

    def integer(self, *names: str, default: Any = _REQUIRED) -> int:
        """A whole number; see get."""
        return int(self._number(Integral, *names, default=default))

    def number(self, *names: str, default: Any = _REQUIRED) -> float:
        """A number; see get."""
        return float(self._number(Real, *names, default=default))

    def _number(self, kind: Any, *names: str, default: Any) -> Any:
        value = self.get(*names, default=default)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"config: {names[0]!r} is {value!r}, expected a number")
        if names[0] in _SIZES and not value > 0:
            raise ValueError(f"config: {names[0]!r} is {value!r}, expected a number above 0")
        return value

    def entries(self, *names: str) -> dict[str, Any]:
        """An object in config.json, {} where there is none; see get."""
        return dict(self._of(dict, *names, default={}))

    def items(self, name: str, default: Any) -> list[Any]:
        """A list; see get."""
        return list(self._of(list, name, default=default))

    def _of(self, kind: type, *names: str, default: Any) -> Any:
        value = self.get(*names, default=default)
        if not isinstance(value, kind):
            raise ValueError(f"config: {names[0]!r} is {value!r}, expected {'a list' if kind is list else 'an object'}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """A truth value; see get."""
        return bool(self.get(name, default=default))

    def eos_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids: there is none, one or a list."""
        value = self.get("eos_token_id", default=[])
        ids = value if isinstance(value, list) else [value]
        if any(type(i) is not int for i in ids):
            raise ValueError(f"config: 'eos_token_id' is {value!r}, expected a token or a list of them")
        return tuple(ids)

    def activation(self, *names: str, default: str = "silu") -> str:
        """The name of an activation in Kernels.linear. Raises ValueError for one that is not known."""
        value = self.get(*names, default=default)
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            expected = ", ".join(map(repr, _ACTIVATIONS))
            raise ValueError(f"config: {names[0]} {value!r} is not supported; expected one of {expected}")
        return _ACTIVATIONS[value]

    def expect(self, name: str, *supported: Any) -> None:
        """Raises ValueError when the entry is there, not null, and none of the values that are supported."""
        value = self.get(name, default=None)
        if value is not None and value not in supported:
            expected = " or ".join(repr(v) for v in supported)
            raise ValueError(f"config: {name} {value!r} is not supported; expected {expected}")

    def rest(self) -> list[str]:
        """Entries that were not taken and that are set to something."""
        known = self._taken | _NO_EFFECT
        return [k for k, v in self._hf.items() if v and k not in known and not k.startswith("_")]


def read_config(hf: Mapping[str, Any], read: Callable[[Fields], ModelConfig]) -> ModelConfig:
    """What `read` makes of a config.json.

    Raises ValueError naming an entry that is missing, not supported, or that nobody read: it may ask for
    something that we do not compute.
    """
    fields = Fields(hf)
    config = read(fields)
    if rest := fields.rest():
        raise ValueError(
            f"config: {rest[0]!r} is unknown for model_type {config.model_type!r}; remove it from config.json if it "
            "does not change what the model computes"
        )
    return config
