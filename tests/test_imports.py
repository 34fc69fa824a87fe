"""Who may import whom, as DESIGN has it: read from the source, so that a shortcut is seen at once."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "distinf"

# Room -> rooms that it may import besides itself. A room is a file or folder directly under distinf/.
ALLOWED: dict[str, set[str]] = {
    "device": set(),
    "shard": set(),
    "config": {"device", "shard"},
    "topology": set(),
    "cgroup": {"topology"},
    "binding": {"topology", "cgroup"},
    "placement": {"topology", "binding", "comm", "kernels"},
    "memory": set(),
    "stdio": set(),
    "comm": {"stdio", "kernels"},  # for its native all-reduce, which steps contain
    "kernels": {"stdio", "device"},
    "gguf_reader": set(),
    "tokenizer": {"gguf_reader"},
    "kv_cache": {"kernels"},
    "sampling": {"comm"},
    "stats": {"comm", "kernels"},
    "layers": {"kernels", "comm", "kv_cache"},
    "models": {"layers", "config", "kernels", "comm", "kv_cache", "shard"},
    "weights": {"models", "layers", "shard", "kernels", "config", "gguf_reader"},
    "engine": {"sampling", "kv_cache", "models", "kernels", "comm"},
    "plan": {"config", "engine", "kernels", "kv_cache", "memory", "models", "shard", "weights"},
    "llm": {
        "engine",
        "plan",
        "weights",
        "models",
        "kernels",
        "comm",
        "config",
        "device",
        "shard",
        "sampling",
        "tokenizer",
        "placement",
        "memory",
    },
    "hetero": {
        "llm",
        "plan",
        "placement",
        "kernels",
        "comm",
        "config",
        "device",
        "models",
        "shard",
        "sampling",
        "stats",
        "weights",
    },
    "info": {"comm", "config", "kernels", "topology", "placement"},
    "cli": {
        "hetero",
        "device",
        "llm",
        "engine",
        "info",
        "comm",
        "config",
        "memory",
        "plan",
        "sampling",
        "shard",
        "stats",
        "tokenizer",
        "weights",
    },
    "__init__": {"comm", "llm", "sampling"},
    "__main__": {"cli"},
}


def imported_rooms(path: Path) -> set[str]:
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "distinf":
            names = [f"distinf.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("distinf.")}
    return {room for room in rooms if (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").exists()}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_stay_in_their_rooms(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert imported_rooms(path) - {room} <= ALLOWED[room]


def test_only_the_command_line_prints_or_parses_flags() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name != "cli.py":
            text = path.read_text()
            assert "print(" not in text and "argparse" not in text, path
