"""One check for each op: an implementation against `reference`, with a tolerance from dtype and length.

Used by test_kernels.py on every instruction set of this CPU, and in a process that emulates AMX.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from distinf.kernels.batch import Batch, LayerCache
from distinf.kernels.formats import FORMATS, Format, Numbers, quantise, quantise_activations
from distinf.kernels.reference import ReferenceKernels
from distinf.kernels.routing import Router

BF16_UNIT = 2.0**-8  # unit roundoff of bf16
FP32_UNIT = 2.0**-24  # unit roundoff of fp32

LINEAR_SHAPES = [  # m, n, k
    (1, 32, 32), (1, 576, 576), (1, 1, 2), (3, 33, 34), (4, 64, 96), (7, 100, 80), (8, 200, 64), (9, 31, 30),
    (16, 96, 128), (17, 65, 62), (31, 40, 416), (33, 96, 160), (64, 64, 64), (100, 208, 80), (270, 40, 64), (40, 70, 4130),
]  # fmt: skip


def check_linear(kernels: Any, m: int, n: int, k: int, bias: bool, out_dtype: torch.dtype) -> None:
    """Any summation order of k products errs by at most (k + 2) units of the sum of their magnitudes."""
    torch.manual_seed(m * 1000003 + n * 1009 + k)
    wide = torch.randn(m, k + 6).bfloat16()
    x, w = wide[:, 3 : 3 + k], torch.randn(n, k).bfloat16()  # rows of x are strided
    b = torch.randn(n) if bias else None
    product = x.double() @ w.double().T
    exact = product + (b.double() if b is not None else 0)
    magnitude = x.double().abs() @ w.double().abs().T + (b.double().abs() if b is not None else 0)
    tolerance = (k + 2) * FP32_UNIT * magnitude
    if _rounds_on_the_way(kernels):
        tolerance = tolerance + BF16_UNIT * (product.abs() + tolerance)
    if out_dtype == torch.bfloat16:
        tolerance = tolerance + BF16_UNIT * (exact.abs() + tolerance)
    y = kernels.linear(x, kernels.pack(w, FORMATS["bf16"]), b, out_dtype)
    assert y.shape == (m, n) and y.dtype == out_dtype
    assert ((y.double() - exact).abs() <= tolerance).all(), (m, n, k, bias, out_dtype)


def check_quantised_linear(kernels: Any, form: Format, m: int, n: int, k: int, bias: bool) -> None:
    """Against what the stored numbers and digits stand for: whole-number products are exact, so only the fp32
    sum over groups and digits errs (a few units each of the magnitudes), and the rounding of a row's scale.
    """
    torch.manual_seed(m * 1000003 + n * 1009 + k)
    wide = torch.randn(m, k + 6).bfloat16()
    x, w = wide[:, 3 : 3 + k], torch.randn(n, k).bfloat16()
    w[0, : max(form.group, 2)] = 0  # a group without a scale
    x[-1] = 0  # a row without one
    b = torch.randn(n) if bias else None
    digits, numbers = quantise_activations(x, form.digits).double(), quantise(w, form).double()
    exact = digits @ numbers.T + (b.double() if b is not None else 0)
    # Taking the middle or the offset out cancels products of up to twice the largest weight, group by group.
    largest = numbers.abs().amax() * 4
    magnitude = x.double().abs().sum(-1, keepdim=True) * largest + (b.double().abs() if b is not None else 0)
    tolerance = (8 + k // (form.group or k) + 2) * FP32_UNIT * magnitude
    # A product that falls on the middle of two digits may be rounded either way: one step of an activation, of which
    # long rows were seen to have two.
    steps = 127 if form.digits == 1 else 16256
    ties = 1 if k < 1000 else 2
    tolerance = tolerance + ties * x.double().abs().amax(-1, keepdim=True) / steps * numbers.abs().amax()
    if _expands(kernels, form, m):  # x as it is, the weight rounded to bf16, and products summed in fp32
        product = x.double() @ numbers.T
        exact = product + (b.double() if b is not None else 0)
        tolerance = (k + 2) * FP32_UNIT * magnitude + BF16_UNIT * (x.double().abs() @ numbers.abs().T)
    if _rounds_on_the_way(kernels):  # the weight to bf16, whose products it then sums, and that sum
        product = x.double() @ numbers.T
        exact = product + (b.double() if b is not None else 0)
        tolerance = k * FP32_UNIT * magnitude + BF16_UNIT * (product.abs() + x.double().abs() @ numbers.abs().T / 2)
    y = kernels.linear(x, kernels.pack(w, form), b, torch.float32)
    assert ((y.double() - exact).abs() <= tolerance).all(), (form, m, n, k, bias, (y - exact).abs().max())


QUANTISED = [
    replace(FORMATS["int8"], group=group, zero_points=zeros) for group in (0, 32, 128) for zeros in (False, True)
] + [replace(FORMATS["int4"], group=g, zero_points=z) for g in (0, 32, 64, 128) for z in (False, True)]
QUANTISED += [FORMATS["w8a8"], replace(FORMATS["w8a8"], group=64)]
QUANTISED_SHAPES = [
    (1, 32, 128),
    (2, 100, 256),
    (3, 33, 384),
    (5, 64, 128),
    (16, 40, 256),
    (17, 31, 128),
    (37, 96, 640),
    (270, 40, 2304),
]


# Checkpoints' own grids: GGUF's blocks, GPTQ with and without zero points, one scale for a channel.
OWN_GRIDS = [
    replace(FORMATS["int8"], group=32, scales=torch.float16), replace(FORMATS["int4"], group=32, scales=torch.float16),
    replace(FORMATS["int4"], group=32, scales=torch.float16, zero_points=True),
    replace(FORMATS["int4"], group=64, scales=torch.float32, zero_points=True),
    replace(FORMATS["int4"], group=0, scales=torch.float16), replace(FORMATS["w8a8"], scales=torch.float32),
]  # fmt: skip


def check_numbers(kernels: Any, form: Format) -> None:
    """Ready numbers are multiplied as they are. One-hot rows have exact digits and find the matrix again, up to a few
    fp32 roundings of the group's result, and of an offset taken out of it; with itself as its gate, its square. Where
    the weight is made bf16, up to that.
    """
    torch.manual_seed(0)
    n, k = 77, 256
    groups = k // (form.group or k)
    number = torch.randint(1 << form.bits, (n, k), dtype=torch.uint8)
    scale, offset = torch.rand(n, groups).to(form.scales).float(), torch.randn(n, groups).to(form.scales).float()
    numbers = Numbers(number, scale, offset if form.zero_points else None)
    plain, gated = kernels.packer(n, k, form), kernels.packer(2 * n, k, form, gated=True)
    for first in (64, 0, 32):  # in any order
        part = slice(first, first + 32)
        rows = Numbers(number[part], scale[part], offset[part] if form.zero_points else None)
        plain.add(first, rows)
        gated.add(first, rows, rows)
    expected, largest = numbers.dequantised(form), scale.max() * (1 << form.bits) + offset.abs().max()
    for rows in (4, k):  # at once: few, and as many as there are
        parts = torch.eye(k).bfloat16().split(rows)
        tolerance = 8 * FP32_UNIT * largest + _expands(kernels, form, rows) * BF16_UNIT * expected.abs()
        found = torch.cat([kernels.linear(x, plain.weight(), None, torch.float32) for x in parts]).T
        assert ((found - expected).abs() <= tolerance).all(), form
        found = torch.cat([kernels.linear(x, gated.weight(), None, torch.float32, "relu") for x in parts]).T
        assert ((found - expected.clamp(min=0).square()).abs() <= 2.1 * tolerance * largest).all(), form


def check_rms_norm(kernels: Any, rows: int, n: int, with_add: bool) -> None:
    torch.manual_seed(n)
    x, weight, add = torch.randn(rows, n) * 3, torch.randn(n), torch.randn(rows, n) if with_add else None
    expected_x = x.clone()
    expected = ReferenceKernels.rms_norm(_reference(torch.float32), expected_x, weight, 1e-5, add)
    y = kernels.rms_norm(x, weight, 1e-5, add)
    torch.testing.assert_close(x, expected_x, rtol=0, atol=0)
    torch.testing.assert_close(y.float(), expected, rtol=BF16_UNIT, atol=1e-6)


def check_rope(kernels: Any, rows: int, heads: int, head_dim: int, half: int) -> None:
    torch.manual_seed(rows)
    wide = torch.randn(rows, heads + 2, head_dim).bfloat16()
    angles = torch.rand(rows, half) * 6
    pairs = torch.complex(wide[:, :heads, :half].float(), wide[:, :heads, half : 2 * half].float())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = wide.float()
    expected[:, :heads, : 2 * half] = torch.cat((turned.real, turned.imag), -1)
    kernels.rope_(wide[:, :heads], angles.cos(), angles.sin())
    # Both compute in fp32 and round once; a product that cancels may round to the neighbour.
    torch.testing.assert_close(wide.float(), expected, rtol=BF16_UNIT, atol=16 * FP32_UNIT)


def check_layer_norm(kernels: Any, rows: int, n: int, with_add: bool) -> None:
    torch.manual_seed(n)
    x, add = torch.randn(rows, n) * 3 + 5, torch.randn(rows, n) if with_add else None
    weight, bias = torch.randn(n), torch.randn(n)
    expected_x = x.clone()
    expected = ReferenceKernels.layer_norm(_reference(torch.float32), expected_x, weight, bias, 1e-5, add)
    y = kernels.layer_norm(x, weight, bias, 1e-5, add)
    torch.testing.assert_close(x, expected_x, rtol=0, atol=0)
    # The mean is a sum of n numbers of which the largest is about 20, divided by n; the deviation is about 3.
    torch.testing.assert_close(y.float(), expected, rtol=BF16_UNIT, atol=n * FP32_UNIT * 20 / 3)


def check_head_norm(kernels: Any, rows: int, heads: int, head_dim: int) -> None:
    torch.manual_seed(head_dim)
    wide, weight = (torch.randn(rows, heads + 2, head_dim) * 2).bfloat16(), torch.randn(head_dim)
    expected = wide.float()
    _reference(torch.float32).head_norm_(expected[:, 1:-1], weight, 1e-6)
    kernels.head_norm_(wide[:, 1:-1], weight, 1e-6)
    torch.testing.assert_close(wide.float(), expected, rtol=BF16_UNIT, atol=0)


# One of each kernel and of each way to keep scales.
ACTIVATED_FORMS = [
    *(FORMATS[name] for name in ("bf16", "int8", "w8a8")),
    replace(FORMATS["int8"], group=32, zero_points=True),
    replace(FORMATS["int4"], zero_points=True),
    replace(FORMATS["int4"], group=128),
]
ACTIVATED_SHAPES = [(1, 33, 128), (2, 16, 256), (5, 50, 128), (19, 64, 256), (37, 95, 128)]  # m, columns, k


def check_activated_linear(kernels: Any, form: Format, act: str, gated: bool, m: int, n: int, k: int) -> None:
    """act(gate) * up against the same sums from `linear`, in fp32: a factor that was rounded to bf16 would be seen.

    An activation is x times a number up to 1 that errs by a few fp32 units of 1, and changes by at most 1.13 times what
    x does. Sums of products may be added up in another order: (k + 8) units of the magnitudes.
    """
    torch.manual_seed(m * 1009 + n)
    x, w, bias = torch.randn(m, k).bfloat16(), torch.randn(2 * n, k).bfloat16() / k**0.5, torch.randn(2 * n)
    bias[:2] = torch.tensor([200.0, -200.0])  # both ends of exp
    size = x.float().norm(dim=-1, keepdim=True) * w.float().norm(dim=-1).max() + bias.abs()
    gate, up = (
        kernels.linear(x, kernels.pack(rows, form), b, torch.float32).double()
        for rows, b in zip(w.split(n), bias.split(n), strict=True)
    )
    sum_error, up_error = ((k + 8) * FP32_UNIT * 4 * size).split(n, dim=-1)
    exact, error = EXACT_ACTS[act](gate), 4 * FP32_UNIT * gate.abs() + 1.13 * sum_error
    if gated:
        exact, error = exact * up, error * (up.abs() + up_error) + exact.abs() * up_error
    rows = 2 * n if gated else n
    weight = kernels.pack(w[:rows], form, gated)
    assert (weight.n, weight.gated) == (rows, gated)
    for out_dtype, ulp in ((torch.float32, FP32_UNIT), (torch.bfloat16, BF16_UNIT)):
        y = kernels.linear(x, weight, bias[:rows], out_dtype, act)
        assert y.shape == (m, n) and y.dtype == out_dtype
        assert ((y.double() - exact).abs() <= error + ulp * (exact.abs() + error)).all(), (form, act, gated, m, n, k)


EXACT_ACTS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


def check_softcap(kernels: Any, rows: int, n: int) -> None:
    """tanh is within a few units of 1, the cap times that of the result."""
    torch.manual_seed(n)
    x = torch.randn(rows, n) * 40
    expected = (30 * (x.double() / 30).tanh()).float()
    kernels.softcap_(x, 30.0)
    torch.testing.assert_close(x, expected, rtol=0, atol=4 * 2 * FP32_UNIT * 30)


def check_head_linear(kernels: Any, form: Format, rows: int, heads: int, n: int, k: int, tail: int) -> None:
    """A head's result is that of a linear of its own, whose rows may be added up in another order; see check_experts."""
    torch.manual_seed(rows)
    wide, weight = torch.randn(rows, heads, k + 8).bfloat16(), torch.randn(heads, n, k).bfloat16()
    x, behind = wide[..., :k], torch.randn(rows, heads * tail).bfloat16().view(rows, heads, tail)
    y = kernels.head_linear(x, kernels.pack(weight.flatten(0, 1), form), behind if tail else None)
    assert y.shape == (rows, heads, n + tail)
    tolerance = (k + 8) * FP32_UNIT * 4 * float(x.float().norm(dim=-1).max() * weight.float().norm(dim=-1).max())
    for head in range(heads):
        single = kernels.linear(x[:, head], kernels.pack(weight[head], form), None, torch.float32)
        torch.testing.assert_close(y[:, head, :n].float(), single, rtol=BF16_UNIT, atol=tolerance)
    assert torch.equal(y[..., n:], behind)


ROUTERS = [
    (8, Router(top_k=2, normalise=True)),
    (60, Router(top_k=4)),
    (5, Router(top_k=5, scale=2.5)),
    (24, Router(top_k=6, groups=4, top_groups=2, scale=16.0)),
    (32, Router(top_k=4, sigmoid=True, normalise=True, scale=2.5, groups=8, top_groups=3, group_best=2)),
]


def check_route(kernels: Any, experts: int, router: Router, rows: int, biased: bool) -> None:
    """The same choice; weights within a few units of their own size, which exp and a sum of `experts` numbers cost."""
    torch.manual_seed(experts + rows)
    logits = torch.randn(rows, experts) * 2
    bias = torch.randn(experts) / 4 if biased else None
    expected, routes = (k.route(logits, bias, router) for k in (_reference(torch.float32), kernels))
    assert torch.equal(routes.ids, expected.ids)
    torch.testing.assert_close(routes.weights, expected.weights, rtol=(experts + 8) * FP32_UNIT, atol=0)
    assert torch.equal(routes.place, expected.place) and torch.equal(routes.starts, expected.starts)


def check_experts(kernels: Any, form: Format, rows: int, n: int, k: int, gated: bool) -> None:
    """A token's result is the weighted sum of single linears, whichever experts it and its neighbours chose.

    Each product's row is what `linear` gives for it alone, so only the sum of top_k numbers errs; AMX and the other
    kernels may add a row's products in another order when it stands among others: (k + 2) units of the magnitudes.
    With a gate the error of one factor, 1.13 times as large behind the activation, is multiplied by the other factor.
    """
    torch.manual_seed(rows)
    router, x = Router(top_k=3, normalise=True), torch.randn(rows, k).bfloat16()
    every = kernels.route(torch.randn(rows, 7) * 3 - torch.arange(7.0) * 2, None, router)  # the last ones hardly chosen
    matrices = [torch.randn(n * (1 + gated), k).bfloat16() / k**0.5 for _ in range(7)]
    weights, act = [kernels.pack(w, form, gated) for w in matrices], "silu" if gated else None
    plus, gate = torch.randn(rows, n), torch.randn(rows, 1)
    singles = torch.stack([kernels.linear(x, w, None, torch.float32, act) for w in weights], 1)  # [rows, experts, n]
    chosen = singles.gather(1, every.ids.long()[..., None].expand(-1, -1, n)) * every.weights[..., None]
    size = float(x.float().norm(dim=1).max())
    largest = max(float(w.float().norm(dim=1).max()) for w in matrices)
    tolerance = (k + 8) * FP32_UNIT * 4 * size
    if _expands(kernels, form, rows):  # and an expert's few rows perhaps not
        tolerance += BF16_UNIT * size * largest
    if gated:
        tolerance *= 2 * 1.13 * size * largest
    for experts in (range(7), range(1, 4), range(5, 5)):  # all, a rank's own, a rank's that has none
        routes = replace(every, experts=experts)
        mine = slice(int(routes.bounds[0]), int(routes.bounds[-1]))
        grouped = kernels.expert_rows(x, routes)
        y = kernels.expert_linear(grouped, weights[experts.start : experts.stop], routes, n, torch.float32, act)
        y[: mine.start] = y[mine.stop :] = math.nan  # nobody wrote them
        here = ((every.ids >= experts.start) & (every.ids < experts.stop))[..., None]
        for shared, weighted in ((None, None), (plus, None), (plus, gate)):
            expected = (chosen * here).sum(1)
            if shared is not None:
                expected = expected + shared * (1 if weighted is None else weighted.sigmoid())
            total = kernels.expert_sum(y, routes, shared, weighted)
            torch.testing.assert_close(total, expected, rtol=0, atol=tolerance)


EXPERT_FORMS = [FORMATS["bf16"], FORMATS["int8"], FORMATS["int4"]]


def check_add(kernels: Any, rows: int, n: int, dtype: torch.dtype) -> None:
    x, y = torch.randn(rows, n), torch.randn(rows, n).to(dtype)
    expected = x + y.float()
    kernels.add_(x, y)
    assert torch.equal(x, expected)


def check_embedding(kernels: Any) -> None:
    table = torch.randn(50, 36).bfloat16()
    ids = torch.tensor([0, 49, 7, 7], dtype=torch.int32)
    assert torch.equal(kernels.embedding(ids, table), table[ids.long()].float())
    assert torch.equal(kernels.embedding(ids, table, 9.5), table[ids.long()].float() * 9.5)


def check_kv_append(kernels: Any, head_dim: int) -> None:
    """The int8 cache holds what the reference would: both divide in fp32 and round ties to even."""
    torch.manual_seed(head_dim)
    cache, expected = (new_cache(3, 2, head_dim, torch.int8) for _ in range(2))
    batch = step_of([(p, 0) for p in range(60, 70)], torch.tensor([[2, 0]], dtype=torch.int32))
    kv = torch.randn(10, 4, head_dim).mul_(torch.logspace(-30, 30, 10)[:, None, None]).bfloat16()
    kv[3, 1] = 0  # no largest magnitude to divide by
    kv[4] = torch.arange(head_dim) - 127.0  # halves of a step: 127 is the largest, 63.5 the tie below
    kv[4, :, -1] = 254.0
    for implementation, into in ((kernels, cache), (_reference(torch.float32), expected)):
        implementation.kv_append_(kv[:, :2], kv[:, 2:], into, batch)
    for a, b in zip(vars(cache).values(), vars(expected).values(), strict=True):
        assert torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))


def check_attention(
    kernels: Any,
    lengths: list[int],
    new: list[int],
    heads: int,
    group: int,
    offset: int,
    head_dim: int,
    window: int,
    kv_dtype: torch.dtype,
    scale: float | None = None,
    softcap: float = 0.0,
    slope: float = 0.0,
) -> None:
    """Sequences of `lengths` tokens, the last `new` of each being this step's rows; the earlier ones are cached.

    There are `heads` query heads, the first one `offset` into its group. `slope` is the last head's, and a part of it
    each other one's. What was never written is NaN and may not be seen.
    """
    torch.manual_seed(sum(lengths) + head_dim)
    kv_heads = (offset + heads - 1) // group + 1
    blocks = [-(-n // 64) for n in lengths]
    cache = new_cache(sum(blocks) + 1, kv_heads, head_dim, kv_dtype)
    # Blocks in no order, so that a kernel that ignores the table is seen.
    order = torch.randperm(sum(blocks) + 1)[: sum(blocks)].int().tolist()
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    for i, n in enumerate(blocks):
        table[i, :n] = torch.tensor([order.pop() for _ in range(n)], dtype=torch.int32)

    def step(starts: list[int], stops: list[int]) -> Batch:
        pairs = enumerate(zip(starts, stops, strict=True))
        return step_of([(p, i) for i, (a, b) in pairs for p in range(a, b)], table)

    starts = [n - m for n, m in zip(lengths, new, strict=True)]
    batches = [step([0] * len(lengths), starts)] if any(starts) else []
    for batch in [*batches, step(starts, lengths)]:
        qkv = torch.randn(len(batch.positions), heads + 2 * kv_heads, head_dim).bfloat16()
        kernels.kv_append_(qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :], cache, batch)
    q = qkv[:, :heads]
    how = group, offset, window, scale, softcap, torch.linspace(0, slope, heads + 1)[1:] if slope else None
    expected = _reference(torch.float32).attention(q.float(), cache, batch, *how)
    y = kernels.attention(q, cache, batch, *how)
    tolerance = BF16_UNIT * expected.abs() + attention_error(q, cache, max(lengths), window, scale, slope)
    rounding = _rounding_of_weights(kernels, max(new) * min(group, heads))
    if rounding:
        sizes = replace(cache, v=cache.v.abs())
        tolerance += rounding * _reference(torch.float32).attention(q.float(), sizes, batch, *how)
    assert ((y.float() - expected).abs() <= tolerance).all(), (y.float() - expected).abs().max()
    assert torch.equal(kernels.attention(q, cache, batch, *how), y), "not the same twice"


def attention_error(
    q: torch.Tensor, cache: LayerCache, length: int, window: int, scale: float | None, slope: float
) -> float:
    """Fp32 error of a mean of values, weighted by e^score, in any order of summation; for each of two results.

    A score is a sum of head_dim products: (head_dim + 2) units of |q| |k| times the scale, by Cauchy and Schwarz
    above the sum of the products' magnitudes. It moves its weight by as much, relatively, and the mean of values
    by at most twice that of the largest |v|; exp, the sums over keys and the factors of each block's running
    maximum add a few units a key. A soft cap is a tanh whose error is a few units of the cap, which is below the
    largest score where it matters. A slope times a distance is rounded, and so is the sum.
    """
    k, v = (
        torch.nan_to_num(x.float() if scale is None else x * scale[..., None])
        for x, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
    )
    head_dim, keys = q.shape[-1], min(length, window or length)
    score = float(q.float().norm(dim=-1).max() * k.norm(dim=-1).max()) * (scale or 1 / math.sqrt(head_dim))
    units = 2 * (head_dim + 2) * score + 3 * keys + 2 * 2 * slope * length
    return 2 * units * FP32_UNIT * float(v.abs().max())


def check_causality(kernels: Any, kv_dtype: torch.dtype) -> None:
    """A row's result does not depend, to the last bit, on what later positions of its block hold."""
    torch.manual_seed(1)
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    batch, q = step_of([(p, 0) for p in range(100)], table), torch.randn(100, 6, 64).bfloat16()
    kv = torch.randn(100, 4, 64).bfloat16()
    results = []
    for _ in range(2):
        cache = new_cache(2, 2, 64, kv_dtype)
        kernels.kv_append_(kv[:, :2], kv[:, 2:], cache, batch)
        results.append(kernels.attention(q, cache, batch, 3, 0, 40))
        kv[70:] = 1e38  # times a weight of exactly zero
    assert torch.equal(results[0][:70], results[1][:70])
    assert not torch.equal(results[0][70:], results[1][70:])


def new_cache(blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> LayerCache:
    """A cache that nobody has written: NaN, in int8 the scales and the largest numbers."""
    shape = (blocks, kv_heads, 64, head_dim)
    if dtype == torch.int8:
        full = torch.full(shape, -128, dtype=torch.int8)
        return LayerCache(full, full.clone(), *(torch.full(shape[:3], math.nan) for _ in "kv"))
    return LayerCache(*(torch.full(shape, math.nan, dtype=dtype) for _ in "kv"))


def step_of(rows: list[tuple[int, int]], table: torch.Tensor) -> Batch:
    """A batch of (position, sequence) rows."""
    positions, sequence = (torch.tensor(x, dtype=torch.int32) for x in zip(*rows, strict=True))
    return Batch(positions, sequence, table, torch.empty(0), torch.empty(0))


def _rounds_on_the_way(kernels: Any) -> bool:
    """Whether sums and probabilities are rounded to bf16 even where the result is fp32, or is rounded again."""
    return bool(kernels.name == "ipex")


def _expands(kernels: Any, form: Format, rows: int) -> bool:
    """Whether a quantised weight is made bf16 first: csrc/gemm_quantised.inl and csrc/isa_amx.cpp."""
    if kernels.name != "native" or form.digits != 2:
        return False
    enough = form.group > 0 and 2 * rows >= form.group
    known = {
        "amx": enough,
        "avx512_bf16": enough and form.group <= 64,
        "avx512": rows >= 13,
        "avx2": rows >= (13 if form.group else 32),
    }
    return known[kernels.isa]


def _rounding_of_weights(kernels: Any, queries: int) -> float:
    """What attention changes a softmax weight by, relatively, on its way to the product with the values.

    `queries` of a sequence share a KV head. AMX tiles (csrc/attention_amx.cpp) round to the nearest bf16, which errs by
    half a unit on average.
    """
    if kernels.isa == "amx" and queries > 8:
        return BF16_UNIT / 2
    return BF16_UNIT if _rounds_on_the_way(kernels) else 0.0


def _reference(dtype: torch.dtype) -> ReferenceKernels:
    return ReferenceKernels(dtype, threads=1)


ATTENTION_CASES: list[dict[str, Any]] = [
    dict(lengths=[1], new=[1], heads=1, group=1, offset=0, head_dim=64, window=0),
    dict(lengths=[65], new=[1], heads=9, group=3, offset=0, head_dim=64, window=0),
    dict(lengths=[130], new=[130], heads=4, group=3, offset=2, head_dim=64, window=0),
    dict(lengths=[70, 3, 200], new=[1, 1, 1], heads=5, group=3, offset=1, head_dim=20, window=0),
    dict(lengths=[70, 3, 200], new=[7, 3, 1], heads=2, group=1, offset=0, head_dim=80, window=0),
    dict(lengths=[150, 64], new=[40, 64], heads=8, group=4, offset=0, head_dim=128, window=33),
    dict(lengths=[300], new=[100], heads=2, group=2, offset=0, head_dim=256, window=0),
    # One tile: its keys are divided among the threads, and a short one leaves some without work.
    dict(lengths=[1000], new=[1], heads=4, group=4, offset=0, head_dim=64, window=0),
    dict(lengths=[1000], new=[1], heads=3, group=4, offset=1, head_dim=96, window=333),
    dict(lengths=[65], new=[1], heads=1, group=1, offset=0, head_dim=128, window=0),
    # Heads that are no whole vectors or pairs, and the longest.
    dict(lengths=[90], new=[30], heads=2, group=2, offset=0, head_dim=33, window=0),
    dict(lengths=[70], new=[5], heads=2, group=1, offset=0, head_dim=576, window=0),
    # A group with more queries than a tile, cut within a row; a prompt's later part; decode beside prefill.
    dict(lengths=[140], new=[3], heads=71, group=71, offset=0, head_dim=32, window=0),
    dict(lengths=[500], new=[200], heads=6, group=3, offset=0, head_dim=64, window=100),
    # Gemma's.
    dict(lengths=[150, 64], new=[40, 1], heads=4, group=2, offset=0, head_dim=48, window=33, scale=0.3, softcap=5.0),
    dict(lengths=[400, 90, 9, 130], new=[1, 80, 1, 130], heads=5, group=4, offset=3, head_dim=64, window=0),
    # Slopes of heads that begin within a group, in a prompt's later part and beside it; a token's long history.
    dict(lengths=[150, 64], new=[40, 1], heads=5, group=3, offset=2, head_dim=48, window=0, slope=0.3),
    dict(lengths=[700], new=[1], heads=3, group=1, offset=0, head_dim=64, window=500, slope=0.01),
    # Most queries that attention_amx.cpp leaves to vectors, and fewest that it does not.
    dict(lengths=[100], new=[8], heads=1, group=1, offset=0, head_dim=64, window=0),
    dict(lengths=[100], new=[9], heads=1, group=1, offset=0, head_dim=64, window=40),
]
KV_DTYPES = [torch.bfloat16, torch.int8]


def check_linears(kernels: Any) -> None:
    """Every case, for a process of its own."""
    for m, n, k in LINEAR_SHAPES:
        check_linear(kernels, m, n, k, bias=False, out_dtype=torch.float32)
        check_linear(kernels, m, n, k, bias=True, out_dtype=torch.bfloat16)
    for form in QUANTISED:
        for m, n, k in QUANTISED_SHAPES:
            check_quantised_linear(kernels, form, m, n, k, bias=m % 2 == 0)
    for form in OWN_GRIDS:
        check_numbers(kernels, form)
    for form in EXPERT_FORMS:
        for gated in (False, True):
            check_experts(kernels, form, rows=40, n=48, k=96, gated=gated)
            check_activated_linear(kernels, form, "silu", gated, 37, 95, 128)
        check_head_linear(kernels, form, rows=40, heads=3, n=64, k=96, tail=8)


def check_attentions(kernels: Any) -> None:
    """Every case, for a process of its own."""
    for kv_dtype in KV_DTYPES:
        for case in ATTENTION_CASES:
            check_attention(kernels, **case, kv_dtype=kv_dtype)
        check_causality(kernels, kv_dtype)
