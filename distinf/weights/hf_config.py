"""config.json from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_config_json(path: Path) -> dict[str, Any]:
    """Fields of a config.json. Raises ValueError naming the file when it is missing or no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path}: expected a JSON object with 'model_type'")
    return config
