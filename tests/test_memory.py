"""What is refused before loading, with its numbers."""

from __future__ import annotations

import pytest

from distinf.memory import MemoryNeed, available_bytes, check_memory

GB = 10**9


def test_ranks_of_one_machine_are_added_up() -> None:
    needs = [MemoryNeed(6 * GB, 2 * GB, 100), MemoryNeed(5 * GB, GB, 100)]
    check_memory(needs, 14 * GB)
    message = r"2 ranks on \S+ need 11.0 GB for weights and 3.0 GB for a KV cache of 100 tokens, but 13.0 GB"
    with pytest.raises(ValueError, match=message):
        check_memory(needs, 13 * GB)


def test_this_machine_has_some_memory() -> None:
    assert 0 < available_bytes() < 1 << 50
