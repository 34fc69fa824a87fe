"""The ops through intel-extension-for-pytorch, as far as it has them; the rest is `reference`'s.

Its last release is 2.8, for torch 2.8. Nothing here is imported from it before `IpexKernels` is constructed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from distinf.kernels.batch import Batch, LayerCache
from distinf.kernels.formats import Format, Numbers, quantised
from distinf.kernels.reference import ReferenceKernels, RowPacker, activated
from distinf.stdio import stdout_to_stderr

PACKAGE = "intel-extension-for-pytorch"
DTYPES = ("bf16", "int8", "int4")
MODULE = "intel_extension_for_pytorch"
INSTALL = f'in an environment of its own: pip install "torch==2.8.*" "{PACKAGE}==2.8.*"'


def missing() -> str:
    """Why the package cannot be imported, found out without importing it; "" when it can."""
    if importlib.util.find_spec(MODULE) is None:
        return f"{PACKAGE} is not installed"
    # On another torch its import prints a message and fails on a function that does not exist.
    wants, found = importlib.metadata.version(PACKAGE), torch.__version__
    if wants.split(".")[:2] != found.split(".")[:2]:
        return f"{PACKAGE} {wants} does not run on torch {found}"
    return ""


def check_dtype(dtype: str) -> None:
    """Raises ValueError for a format that is not computed here."""
    if dtype not in DTYPES:
        raise ValueError(f"--kernels ipex cannot run {dtype}; expected --dtype and --head-dtype {', '.join(DTYPES)}")


@dataclass(frozen=True)
class IpexWeight:
    """A [n, k] weight in the package's own order."""

    n: int
    k: int
    form: Format
    context: Any  # its op context, which owns the memory; None: an empty shard
    gated: bool

    @property
    def nbytes(self) -> int:
        return self.n * self.k * self.form.bits // 8


@dataclass(frozen=True)
class _WholePacker(RowPacker):
    """Keeps the rows until all are there: the package packs a weight as a whole, and quantises none by itself."""

    kernels: IpexKernels = field(kw_only=True)

    def _keep(self, row: int, rows: torch.Tensor | Numbers) -> None:
        assert not isinstance(rows, Numbers), "--dtype auto is refused"
        self.data[row : row + len(rows)] = rows

    def weight(self) -> Any:
        return self.kernels.pack(self.data, self.form, self.gated)


class IpexKernels(ReferenceKernels):
    """See distinf.kernels.Kernels for shapes. Overridden are the ops that the package has kernels for.

    Its linears sum in fp32 and give bf16: an fp32 out_dtype, a bias and an activation come after that rounding. Its
    attention over several rows of a sequence rounds the probabilities to bf16. Weight-only int8 and int4 are multiplied
    in bf16, by its packed kernels where the CPU has AVX512-FP16; elsewhere it expands the weight at each call, which is
    slow.
    """

    name = "ipex"

    def __init__(self, threads: int) -> None:
        """Raises ValueError when the package, or bf16 on this CPU, cannot be had."""
        super().__init__(torch.bfloat16, threads)
        if reason := missing():
            raise ValueError(f"--kernels ipex: {reason}; {INSTALL}")
        try:
            with stdout_to_stderr():  # it prints each rank's number
                extension = importlib.import_module(f"{MODULE}._C")
        except ImportError as error:
            raise ValueError(f"--kernels ipex: {PACKAGE} does not load ({error}); {INSTALL}") from None
        self.isa = str(extension._get_current_isa_level()).lower()
        ops: Any = torch.ops
        if not ops.mkldnn._is_mkldnn_bf16_supported():
            raise ValueError(f"--kernels ipex computes in bf16, for which it needs AVX-512; this CPU has {self.isa}")
        self._ops, self._prepack = ops.torch_ipex, ops.ipex_prepack
        self._none = torch.empty(0)
        self._first_row = torch.tensor(0)

    def packer(self, n: int, k: int, form: Format, gated: bool = False) -> Any:
        check_dtype(form.name)
        return _WholePacker(torch.empty(n, k, dtype=torch.bfloat16), form, gated, kernels=self)

    def pack(self, weight: torch.Tensor, form: Format, gated: bool = False) -> Any:
        n, k = weight.shape
        check_dtype(form.name)
        if not weight.numel():
            return IpexWeight(n, k, form, None, gated)
        if form.bits == 16:
            plain = weight.bfloat16().contiguous()
            return IpexWeight(n, k, form, self._prepack.linear_prepack(plain, None, None), gated)
        if form.zero_points:
            raise ValueError(
                "--kernels ipex takes zero points that are whole numbers, ours are not: leave --zero-points out"
            )
        number, scale, _ = (x.flatten(1) for x in quantised(weight, form))
        if form.bits == 8:  # it takes signed numbers here, and pairs of unsigned ones, the even one low, below
            number, code = (number - 128).to(torch.int8), 1
        else:
            pairs = number.to(torch.uint8).unflatten(1, (-1, 2))
            number, code = pairs[..., 0] | pairs[..., 1] << 4, 2
        if not form.group:
            scale = scale[:, 0]
        context = self._prepack.weight_only_qlinear_prepack(
            number.contiguous(), code, [n, k], scale, None, None, None, None,
            form.group or -1, _LOWP_NONE, _ACTIVATIONS_AS_THEY_ARE, False,
        )  # fmt: skip
        return IpexWeight(n, k, form, context, gated)

    def linear(
        self,
        x: torch.Tensor,
        weight: Any,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        act: str | None = None,
    ) -> torch.Tensor:
        y: torch.Tensor
        if weight.context is None:
            y = torch.zeros(len(x), weight.n)
        elif weight.form.bits == 16:
            y = self._ops.ipex_linear(x, self._none, None, weight.context.get_data_handle(), weight.n)
        else:
            y = self._ops.ipex_woq_linear(x.contiguous(), weight.context.get_data_handle())
        return activated(y if bias is None else y + bias, act, weight.gated).to(out_dtype or self.act_dtype)

    def head_linear(self, x: torch.Tensor, weight: Any, tail: torch.Tensor | None = None) -> torch.Tensor:
        # Its weights cannot be cut: each head is multiplied by all of them.
        n = weight.n // x.shape[1]
        heads = [self.linear(x[:, i], weight)[:, i * n : (i + 1) * n] for i in range(x.shape[1])]
        y = torch.stack(heads, 1)
        return y if tail is None else torch.cat((y, tail), 2)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, add_: torch.Tensor | None = None
    ) -> torch.Tensor:
        into_x = True  # the sum, which is the residual stream
        added = (add_, x, weight, eps, into_x)
        y: torch.Tensor = self._ops.rmsnorm(x, weight, eps) if add_ is None else self._ops.add_rmsnorm(*added)
        return y.to(self.act_dtype)

    def rope_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        _, heads, head_dim = x.shape
        half = cos.shape[1]
        table = torch.cat((sin, cos), 1)  # of these rows, in order: row 0 of x turns by row 0
        turned, _, _ = self._ops.rotary_position_embedding(
            x[None], table, self._first_row, heads, head_dim, half, 2 * half
        )
        x.copy_(turned[0])

    def kv_append_(self, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, batch: Batch) -> None:
        if cache.k_scale is not None:  # of small caches it knows fp8 only
            return super().kv_append_(k, v, cache, batch)
        size = cache.k.shape[2]
        slot = batch.block_table[batch.sequence, batch.positions // size] * size + batch.positions % size
        self._ops.reshape_and_cache(k, v, cache.k, cache.v, slot, "auto", 1.0, 1.0)

    def attention(
        self,
        q: torch.Tensor,
        cache: LayerCache,
        batch: Batch,
        group: int,
        group_offset: int,
        window: int = 0,
        scale: float | None = None,
        softcap: float = 0.0,
        slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # Its kernel for several rows takes a window of one for none at all.
        if cache.k_scale is not None or window == 1 or softcap or slopes is not None:
            return super().attention(q, cache, batch, group, group_offset, window, scale, softcap, slopes)
        out = torch.empty(q.shape, dtype=self.act_dtype)
        sequences, rows = batch.sequence.unique_consecutive(return_counts=True)
        table = batch.block_table[sequences]
        last = rows.cumsum(0)
        lengths = batch.positions[last - 1] + 1
        longest, most_rows = int(lengths.max()), int(rows.max())
        scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
        starts, key_starts = (torch.cat((self._first_row[None], x.cumsum(0))).int() for x in (rows, lengths))
        for heads, kv_heads in whole_groups(q.shape[1], group, group_offset):
            k, v = cache.k[:, kv_heads], cache.v[:, kv_heads]
            if most_rows == 1:
                # Never "no window": it then takes sequences that share their first block for beams of one search,
                # and from four of them on chooses a kernel that refuses to run without a window.
                self._ops.single_query_cached_kv_attention(
                    out[:, heads], q[:, heads], k, v, self._none, scale, table, lengths, k.shape[2], longest, None,
                    window or longest, 1.0, 1.0, -1.0,
                )  # fmt: skip
            else:
                self._ops.flash_attn_varlen_func(
                    out[:, heads], q[:, heads], k, v, starts, key_starts, most_rows, longest, scale, True, table, None,
                    window - 1 if window else -1, -1, "auto", 1.0, 1.0, -1.0,
                )  # fmt: skip
        return out


_LOWP_NONE = 0  # multiply in the dtype of x
_ACTIVATIONS_AS_THEY_ARE = -1


def whole_groups(heads: int, group: int, offset: int) -> Iterator[tuple[slice, slice]]:
    """Runs of local query heads, and their local KV heads, that share them evenly, as the package's kernels want it.

    A shard may begin and end within a group: at most three runs.
    """
    start = 0
    while start < heads:
        kv, inside = divmod(offset + start, group)
        whole = 0 if inside else (heads - start) // group
        stop = start + whole * group if whole else min(start + group - inside, heads)
        yield slice(start, stop), slice(kv, kv + max(whole, 1))
        start = stop
