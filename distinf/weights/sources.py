"""A Source's slice of the checkpoint as plain rows: parts of fused tensors, transposed ones, rotated pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from distinf.models.params import Source, bias_name
from distinf.weights import Checkpoint


def read_rows(checkpoint: Checkpoint, source: Source, dtype: torch.dtype, rows: range, columns: range) -> torch.Tensor:
    """Rows (output features) and columns (input features) of the part: [len(rows), len(columns)] in `dtype`."""

    def read(piece: range, columns: range) -> torch.Tensor:
        if source.transposed:
            return checkpoint.read(source.name, dtype, columns, piece).T.contiguous()
        return checkpoint.read(source.name, dtype, piece, columns)

    if source.across:
        return _read_across(read, source, rows, columns)
    heads = _whole(rows, source.head_dim)
    x = stack([read(piece, columns) for piece in source.tensor_rows(heads)])
    x = halves(x, source)[rows.start - heads.start :][: len(rows)]
    return torch.nn.functional.normalize(x.float()).to(dtype) if source.unit_rows else x


def _read_across(
    read: Callable[[range, range], torch.Tensor], source: Source, rows: range, columns: range
) -> torch.Tensor:
    """Each block's part, [len(part), in], transposed."""
    assert source.part
    width, size = source.shape[1], len(source.part)
    blocks = _whole(rows, width)
    kept = source.tensor_rows(range(blocks.start // width * size, blocks.stop // width * size))
    x = stack([read(piece, range(width)) for piece in kept])
    turned: torch.Tensor = x.unflatten(0, (-1, size)).transpose(1, 2).flatten(0, 1).contiguous()
    return turned[rows.start - blocks.start :][: len(rows), columns.start : columns.stop]


def _whole(rows: range, unit: int) -> range:
    """The rows and those beside them that make up whole units; `unit` 0 or 1: just the rows."""
    unit = max(unit, 1)
    return range(rows.start // unit * unit, -(-rows.stop // unit) * unit)


def read_bias(checkpoint: Checkpoint, source: Source, rows: range) -> torch.Tensor:
    """The same rows of the bias beside the weight, fp32."""
    whole = checkpoint.read(bias_name(source.name), torch.float32)
    return halves(stack([whole[piece.start : piece.stop] for piece in source.tensor_rows(rows)]), source)


def stack(parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts behind one another; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def halves(x: torch.Tensor, source: Source) -> torch.Tensor:
    """Rows of heads that rotate in pairs of neighbours, put where `rope_` has them: i beside i + half.

    Queries and keys change places alike, so their products stay.
    """
    if not source.pairs:
        return x
    order = torch.arange(source.head_dim)
    order[: source.pairs] = order[: source.pairs].view(-1, 2).T.flatten()
    reordered: torch.Tensor = x.unflatten(0, (-1, source.head_dim))[:, order].flatten(0, 1)
    return reordered
