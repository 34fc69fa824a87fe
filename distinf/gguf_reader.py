"""The gguf package's reader, three times faster to open."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np


class GGUFReader(gguf.GGUFReader):  # type: ignore[misc]
    """Reads the header through a plain array over the mapped file.

    A vocabulary makes hundreds of thousands of tiny slices, and each slice of a numpy.memmap costs
    microseconds more than one of an ndarray: 0.8 s instead of 2.3 s for SmolLM2. The file stays mapped.
    """

    data: Any

    def _get(self, *args: Any, **kwargs: Any) -> Any:
        data: Any = self.data
        if isinstance(data, np.memmap):
            self.data = data.view(np.ndarray)
        return super()._get(*args, **kwargs)
