"""Parts of fused, transposed and rotated tensors: any slice equals the same rows of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distinf.models.params import Source
from distinf.weights import open_checkpoint
from distinf.weights.sources import read_rows

SOURCES = [
    Source("plain.weight", (48, 10)),
    Source("plain.weight", (48, 10), part=range(16, 40)),
    Source("plain.weight", (48, 10), blocks=3, part=range(4, 12)),
    Source("plain.weight", (48, 10), blocks=3, part=range(4, 12), pairs=4, head_dim=8),
    Source("plain.weight", (48, 10), blocks=3, part=range(4, 12), across=True),
    Source("plain.weight", (48, 10), transposed=True),
    Source("plain.weight", (48, 10), transposed=True, blocks=2, part=range(1, 4)),
]


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_slices_of_a_source_equal_the_whole(source: Source, tmp_path: Path) -> None:
    """Whichever rows are asked for: heads and blocks may be cut."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"plain.weight": torch.randn(48, 10)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path, "auto", None, None)
    rows, columns = (range(n) for n in source.features)
    whole = read_rows(checkpoint, source, torch.float32, rows, columns)
    assert whole.shape == source.features
    for part in (rows[:10], rows[:3], rows[3:7], rows[5:], rows[7:7]):
        for kept in (columns, columns[2:5]):
            x = read_rows(checkpoint, source, torch.float32, part, kept)
            assert torch.equal(x, whole[part.start : part.stop, kept.start : kept.stop])
            assert x.stride(1) == 1 or not x.numel(), "not as Kernels.pack takes it"


def test_what_a_part_is(tmp_path: Path) -> None:
    """Two heads of a fused tensor, whose keys rotate as pairs of neighbours."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tensor = torch.arange(36.0).view(18, 2)  # heads of 9 rows: 3 queries, 4 of a key, 2 of a value
    save_file({"plain.weight": tensor}, tmp_path / "model.safetensors")
    key = Source("plain.weight", (18, 2), blocks=2, part=range(3, 7), pairs=4, head_dim=4)
    x = read_rows(open_checkpoint(tmp_path, "auto", None, None), key, torch.float32, range(8), range(2))
    assert torch.equal(x, tensor[[3, 5, 4, 6, 12, 14, 13, 15]])
    value = Source("plain.weight", (18, 2), blocks=2, part=range(7, 9), across=True)
    x = read_rows(open_checkpoint(tmp_path, "auto", None, None), value, torch.float32, range(4), range(2))
    assert torch.equal(x, torch.cat((tensor[7:9].T, tensor[16:18].T)))
