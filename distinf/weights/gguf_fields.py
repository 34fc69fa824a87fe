"""What a GGUF file's header says, each field taken by name: what is left may change the computation and is refused."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from distinf.weights.gguf_header import GGUFTensor

_REQUIRED = object()
_ANY = (bool, int, float, str)


class GGUFFields:
    """Tensors, and the fields of the file's own architecture, which are named without it: `llama.block_count` is
    `block_count`. Every method raises ValueError naming the file and the field where it is missing without a default,
    or of another kind.
    """

    def __init__(self, path: Path, fields: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]) -> None:
        """`fields` and `tensors` as read_header gives them. Raises ValueError when there is no architecture."""
        self.path = path
        self.tensors = tensors
        self._fields = fields
        self._taken: set[str] = set()
        self.architecture = ""
        parts = self.value("split.count", 1, (int,))  # the later ones have hardly any other field
        if parts > 1:
            raise ValueError(f"{path}: one of {parts} parts; expected all in one file (llama-gguf-split --merge)")
        self.architecture = str(self.value("general.architecture", kinds=(str,)))

    def name(self, key: str) -> str:
        """The whole name of a field."""
        return key if key.startswith(("general.", "tokenizer.", "split.")) else f"{self.architecture}.{key}"

    def has(self, key: str) -> bool:
        """Whether the field is there."""
        return self.name(key) in self._fields

    def value(self, key: str, default: Any = _REQUIRED, kinds: tuple[type, ...] = _ANY) -> Any:
        """A field of one of `kinds`; a number is finite."""
        name = self.name(key)
        self._taken.add(name)
        if name not in self._fields and default is not _REQUIRED:
            return default
        value = self._fields.get(name)
        if type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
            expected = " or ".join(kind.__name__ for kind in kinds)
            found = "missing" if name not in self._fields else f"{value!r}, expected {expected}"
            raise ValueError(f"{self.path}: the field {name!r} is {found}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A whole or a real number, as it is."""
        number: float = self.value(key, default, (int, float))
        return number

    def positive(self, key: str) -> float:
        """A number above 0, of a whole one 1 or more."""
        value = self.number(key)
        if value <= 0:
            raise ValueError(f"{self.path}: the field {self.name(key)!r} is {value}, expected 1 or more")
        return value

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        """A whole number of one or more."""
        value = int(self.value(key, default, (int,)))
        if value < 1:
            raise ValueError(f"{self.path}: the field {self.name(key)!r} is {value}, expected 1 or more")
        return value

    def refuse_rest(self, no_effect: Collection[str]) -> None:
        """Raises ValueError for a field of the architecture that was not taken, is set, and not one of `no_effect`."""
        known = self._taken | {self.name(key) for key in no_effect}
        for name, value in self._fields.items():
            # An array has no value here: it may hold anything.
            if name.startswith(f"{self.architecture}.") and name not in known and (value or value is None):
                raise ValueError(f"{self.path}: the field {name!r} is unknown; it may change what the model computes")
