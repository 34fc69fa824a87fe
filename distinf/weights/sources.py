"""A Source's slice of the checkpoint as plain rows: parts of fused tensors, transposed ones, rotated pairs."""

from __future__ import annotations

import torch

from distinf.models.params import Source, bias_name
from distinf.weights import Checkpoint


def read_rows(checkpoint: Checkpoint, source: Source, dtype: torch.dtype, rows: range, columns: range) -> torch.Tensor:
    """Rows (output features) and columns (input features) of the part: [len(rows), len(columns)] in `dtype`."""

    def read(piece: range) -> torch.Tensor:
        if source.transposed:
            return checkpoint.read(source.name, dtype, columns, piece).T.contiguous()
        return checkpoint.read(source.name, dtype, piece, columns)

    x = halves(stack([read(piece) for piece in source.tensor_rows(rows)]), source)
    return torch.nn.functional.normalize(x.float()).to(dtype) if source.unit_rows else x


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
