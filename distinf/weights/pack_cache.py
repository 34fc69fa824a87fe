"""Packed shards on disk, so that a second start neither converts nor packs.

An entry is one rank's linears: a line of JSON (what it was made of, and a CRC-32 of every chunk) and the packed bytes.
Its file is named after what it was made of. Whatever is not exactly what was asked for is ignored and written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distinf.weights.jobs import Job

_CHUNK_BYTES = 8 << 20


class PackCache:
    """One rank's entry in a directory."""

    def __init__(self, directory: Path, key: str) -> None:
        """`key` says all that the packed bytes depend on. Makes the directory; raises OSError when it cannot."""
        directory.mkdir(parents=True, exist_ok=True)
        self._key = hashlib.sha256(key.encode()).hexdigest()
        self._path = directory / f"{self._key[:32]}.packed"

    def load(self, weights: dict[str, memoryview], run: Callable[[Sequence[Job]], None]) -> bool:
        """Fill the memory of every weight, by jobs that `run` carries out. False when the entry is missing or is not
        exactly for these weights, or is damaged; the memory then holds anything.
        """
        try:
            with open(self._path, "rb") as file:
                header = json.loads(file.readline())
                if header != {**self._header(weights), "crc": header.get("crc")}:
                    return False
                run(_read_jobs(file.fileno(), file.tell(), weights, header["crc"]))
                return True
        except (OSError, ValueError, TypeError, AttributeError, IndexError, KeyError):
            return False

    def save(self, weights: dict[str, memoryview]) -> None:
        """Written aside and renamed: another process finds a whole entry or none. Raises OSError."""
        aside = self._path.with_suffix(f".{os.getpid()}.tmp")
        crc = {name: [zlib.crc32(memory[i:j]) for i, j in _chunks(memory)] for name, memory in weights.items()}
        try:
            with open(aside, "wb") as file:
                file.write(json.dumps({**self._header(weights), "crc": crc}).encode() + b"\n")
                for memory in weights.values():
                    file.write(memory)
            aside.replace(self._path)
        finally:
            aside.unlink(missing_ok=True)

    def _header(self, weights: dict[str, memoryview]) -> dict[str, Any]:
        return {"key": self._key, "nbytes": {name: len(memory) for name, memory in weights.items()}}


def _chunks(memory: memoryview) -> list[tuple[int, int]]:
    return [(i, min(i + _CHUNK_BYTES, len(memory))) for i in range(0, len(memory), _CHUNK_BYTES)]


def _read_jobs(fd: int, start: int, weights: dict[str, memoryview], crc: dict[str, list[int]]) -> list[Job]:
    jobs = []
    for name, memory in weights.items():
        for (i, j), expected in zip(_chunks(memory), crc[name], strict=True):

            def work(part: memoryview = memory[i:j], offset: int = start + i, expected: int = expected) -> None:
                if os.preadv(fd, [part], offset) != len(part) or zlib.crc32(part) != expected:
                    raise ValueError("damaged")

            jobs.append(Job(work, j - i))
        start += len(memory)
    return jobs
