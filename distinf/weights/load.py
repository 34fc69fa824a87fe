"""Each rank's slices of a checkpoint into packed weights: nobody reads or holds the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from distinf.config import ModelConfig, RunConfig
from distinf.kernels import Kernels, Packer
from distinf.kernels.formats import FORMATS, Format, Numbers, parse_format, stacked
from distinf.layers import LinearWeight
from distinf.models.params import Cut, Param, Source, Weights, by_layer
from distinf.shard import Shard
from distinf.weights import Checkpoint
from distinf.weights.jobs import Job, run_jobs
from distinf.weights.pack_cache import PackCache
from distinf.weights.sources import read_bias, read_rows, stack

# What a thread reads and packs at once, in act_dtype: small enough to stay in the caches between the two, large
# enough for the disk and to make Python's part small.
_CHUNK_BYTES = 2 << 20
_PANEL = 32  # rows that are packed together: Packer.add


@dataclass(frozen=True)
class Loader:
    """What this rank loads and how."""

    checkpoint: Checkpoint
    params: Sequence[Param]
    cuts: Cuts
    rank: int
    kernels: Kernels
    formats: dict[str, Format]  # of each linear
    cores: Sequence[int] = ()  # where the reading threads run; (): wherever this one does
    cache: PackCache | None = None


def load_weights(loader: Loader, progress: bool) -> Weights:
    """Read and pack this rank's part of every weight. Biases of row-parallel linears go to rank 0 alone.

    One thread more than the rank has cores reads and packs, each a few rows at a time, so that reading and packing
    overlap and a weight is never in memory twice. Raises ValueError naming the tensor when it is missing or its shape
    is not the config's. `progress` shows a bar on stderr.
    """
    check_shapes(loader.checkpoint, loader.params)
    linears = [p for p in loader.params if p.kind == "linear"]
    packers = {p.name: _packer(loader, p) for p in linears}

    def run(jobs: Sequence[Job]) -> None:
        run_jobs(jobs, loader.kernels.threads + 1, loader.cores, progress)

    memory = {name: packer.weight().memory() for name, packer in packers.items()} if loader.cache else {}
    if loader.cache is None or not loader.cache.load(memory, run):
        _announce(loader, linears)
        run([job for p in linears for job in _pack_jobs(loader, p, packers[p.name])])
        if loader.cache:
            loader.cache.save(memory)
    loader.kernels.arrange([[packers[p.name].weight() for p in group] for group in by_layer(linears)])
    weights = Weights()
    for p in linears:
        weights.linears[p.name] = LinearWeight(packers[p.name].weight(), _bias(loader, p), p.use)
    for p in loader.params:
        if p.kind != "linear":
            weights.tensors[p.name] = _tensor(loader, p)
    return weights


def _announce(loader: Loader, linears: Sequence[Param]) -> None:
    """Tell the checkpoint which rows of its tensors follow, but of those whose heads may be read twice."""
    for source in (source for param in linears for source in param.sources):
        if not (source.transposed or source.across or source.pairs):
            for rows in source.tensor_rows(loader.cuts.rows(source)):
                loader.checkpoint.announce(source.name, rows)


def _packer(loader: Loader, param: Param) -> Packer:
    rows = sum(len(loader.cuts.rows(source)) for source in param.sources)
    return loader.kernels.packer(rows, len(loader.cuts.columns(param)), loader.formats[param.name], param.gated)


def _pack_jobs(loader: Loader, param: Param, packer: Packer) -> Iterator[Job]:
    """One for each few rows of the stacked sources, or of both halves of a gated weight."""
    form, k = loader.formats[param.name], len(loader.cuts.columns(param))
    halves = [(source,) for source in param.sources] if param.gated else [param.sources]
    n = sum(len(loader.cuts.rows(source)) for source in halves[0])
    row_bytes = max(1, len(halves) * k * loader.kernels.act_dtype.itemsize)
    step = max(_PANEL, _CHUNK_BYTES // row_bytes // _PANEL * _PANEL)
    for first in range(0, n, step):
        chunk = range(first, min(first + step, n))

        def work(chunk: range = chunk) -> None:
            packer.add(chunk.start, *(_read(loader, param, half, chunk) for half in halves))

        yield Job(work, form.nbytes(len(chunk) * len(halves), k))


def _read(loader: Loader, param: Param, sources: Sequence[Source], chunk: range) -> torch.Tensor | Numbers:
    """Rows `chunk` of a linear's stacked sources: in act_dtype, or the checkpoint's own numbers where they are kept."""
    checkpoint, columns = loader.checkpoint, loader.cuts.columns(param)
    pieces = list(_pieces(loader, sources, chunk))
    if loader.formats[param.name] == stored_format(checkpoint, param):
        parts = [(source.name, part) for source, rows in pieces for part in source.tensor_rows(rows)]
        return stacked([checkpoint.numbers(name, part, columns) for name, part in parts])
    return stack([read_rows(checkpoint, source, loader.kernels.act_dtype, rows, columns) for source, rows in pieces])


def _pieces(loader: Loader, sources: Sequence[Source], chunk: range) -> Iterator[tuple[Source, range]]:
    """The rows of each source that the rows `chunk` of the stack come from."""
    start = 0
    for source in sources:
        rows = loader.cuts.rows(source)
        first, last = max(chunk.start - start, 0), min(chunk.stop - start, len(rows))
        if first < last:
            yield source, rows[first:last]
        start += len(rows)


def _bias(loader: Loader, param: Param) -> torch.Tensor | None:
    """fp32 [n_local]"""
    if not param.bias or (param.columns is not None and loader.rank != 0):
        return None
    bias = stack([read_bias(loader.checkpoint, s, loader.cuts.rows(s)) for s in param.sources])
    return bias.contiguous().to(loader.kernels.device)


def _tensor(loader: Loader, param: Param) -> torch.Tensor:
    source, act_dtype = param.sources[0], loader.kernels.act_dtype
    if param.kind == "vector":
        vector = loader.checkpoint.read(source.name, torch.float32).contiguous().to(loader.kernels.device)
        return vector + param.shift if param.shift else vector
    if source == Source(source.name, source.shape):
        return loader.checkpoint.table(source.name, act_dtype)
    rows, columns = (range(n) for n in source.features)
    return read_rows(loader.checkpoint, source, act_dtype, rows, columns).contiguous()


def stored_format(checkpoint: Checkpoint, param: Param) -> Format | None:
    """The format that keeps a linear's own numbers: all its sources are in the same one, and used as they are."""
    if any(s.transposed or s.across or s.pairs or s.unit_rows for s in param.sources):
        return None
    first, *others = (checkpoint.stored(source.name) for source in param.sources)
    return first if all(other == first for other in others) else None


def formats_of(run: RunConfig, params: Sequence[Param], checkpoint: Checkpoint) -> dict[str, Format]:
    """The format of each linear, from the flags; with `auto` the checkpoint's own, or bf16 where it has none.

    Raises ValueError naming a flag that is wrong.
    """

    def form(param: Param) -> Format:
        dtype = run.head if param.name == "head" else run.dtype
        if dtype == "auto":
            form = stored_format(checkpoint, param) or FORMATS["bf16"]
        else:
            form = parse_format(dtype, run.group_size, run.zero_points)
        return FORMATS["bf16"] if param.exact and form.bits < 16 else form

    return {param.name: form(param) for param in params if param.kind == "linear"}


def check_groups(params: Sequence[Param], cuts: Cuts, formats: dict[str, Format]) -> None:
    """Raises ValueError when the input features of a linear on this rank are not whole groups of its format."""
    for param in params:
        if param.kind == "linear":
            formats[param.name].check_k(param.sources[0].name, cuts.columns(param))


def weight_bytes(params: Sequence[Param], cuts: Cuts, formats: dict[str, Format], act_dtype: torch.dtype) -> int:
    """Bytes that this rank's weights take in memory, the padding of packed panels left out."""
    total = 0
    for param in params:
        if param.kind == "linear":
            rows = sum(len(cuts.rows(source)) for source in param.sources)
            total += formats[param.name].nbytes(rows, len(cuts.columns(param)))
        else:
            total += math.prod(param.sources[0].shape) * act_dtype.itemsize
    return total


def check_shapes(checkpoint: Checkpoint, params: Sequence[Param]) -> None:
    """Raises ValueError naming a tensor that is missing, or whose shape is not the config's."""
    for param in params:
        for name, expected in param.shapes().items():
            if checkpoint.shape(name) != expected:
                raise ValueError(
                    f"tensor {name!r} has shape {list(checkpoint.shape(name))} but the config asks for {list(expected)}"
                )


@dataclass(frozen=True)
class Cuts:
    """This rank's ranges of a checkpoint tensor's rows and columns."""

    config: ModelConfig
    shard: Shard

    def rows(self, source: Source) -> range:
        """Output features, counted in the source's part of its tensor."""
        return self._range(source.rows, source.features[0])

    def columns(self, param: Param) -> range:
        """Input features."""
        return self._range(param.columns, param.sources[0].features[1])

    def _range(self, cut: Cut | None, size: int) -> range:
        """This rank's part of `size` features, which are as many for each head, column or token of the cut."""
        if cut is None:
            return range(size)
        config = self.config
        whole = {"q_heads": config.n_heads, "kv_heads": config.n_kv_heads, "ffn": config.ffn, "vocab": config.vocab}
        if config.moe:
            whole |= {"expert_ffn": config.moe.ffn, "shared_ffn": config.moe.shared_ffn}
        unit, mine = size // whole[cut], getattr(self.shard, cut)
        return range(mine.start * unit, mine.stop * unit)
