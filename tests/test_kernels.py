"""Every op of every implementation against `reference`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distinf.kernels import ACTS, Placement, extension, ipex, load, native
from distinf.kernels.formats import FORMATS, Format
from distinf.kernels.reference import ReferenceKernels
from distinf.kernels.routing import Router
from tests import kernel_cases as cases

LEVELS = ["avx2", "avx512", "avx512_bf16", "amx"]


@pytest.fixture(scope="module", params=["reference", *LEVELS, "ipex"])
def kernels(request: pytest.FixtureRequest) -> Any:
    if request.param == "reference":
        return ReferenceKernels(torch.bfloat16, threads=1)
    if request.param == "ipex":
        if ipex.missing():
            pytest.skip(ipex.missing())
        return ipex.IpexKernels(threads=2)
    if request.param not in extension.available_isas():
        pytest.skip(f"this CPU has no {request.param}")
    return native.NativeKernels(
        request.param, [-1, -1, -1], oversubscribed=True
    )  # more threads than some work has parts


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("m, n, k", cases.LINEAR_SHAPES)
def test_linear(kernels: Any, m: int, n: int, k: int, bias: bool, out_dtype: torch.dtype) -> None:
    cases.check_linear(kernels, m, n, k, bias, out_dtype)


@pytest.mark.parametrize("m, n, k", [*cases.QUANTISED_SHAPES, (4, 50, 30), (35, 50, 30)])
@pytest.mark.parametrize("form", cases.QUANTISED, ids=lambda f: f"{f.name}-{f.group}{'-zero' * f.zero_points}")
def test_quantised_linear(kernels: Any, form: Format, m: int, n: int, k: int) -> None:
    if kernels.name == "ipex" and form.zero_points:
        pytest.skip("ipex takes zero points that are whole numbers")
    if form.group and k % form.group:
        pytest.skip("not whole groups: refused before loading")
    if kernels.name == "ipex" and form.name not in ipex.DTYPES:
        pytest.skip("refused, see test_choices_that_do_not_go_together")
    cases.check_quantised_linear(kernels, form, m, n, k, bias=m % 2 == 0)


@pytest.mark.parametrize("form", cases.OWN_GRIDS, ids=lambda f: f"{f.name}-{f.group}-{f.scales}")
def test_numbers_of_a_checkpoint(kernels: Any, form: Format) -> None:
    if kernels.name == "ipex":
        pytest.skip("refused, see test_choices_that_do_not_go_together")
    cases.check_numbers(kernels, form)


@pytest.mark.parametrize("rows, n", [(1, 576), (3, 80), (5, 7), (2, 2048)])
@pytest.mark.parametrize("with_add", [False, True])
def test_rms_norm(kernels: Any, rows: int, n: int, with_add: bool) -> None:
    cases.check_rms_norm(kernels, rows, n, with_add)


@pytest.mark.parametrize("rows, heads, head_dim, half", [(1, 12, 64, 32), (5, 3, 20, 10), (4, 2, 80, 16)])
def test_rope(kernels: Any, rows: int, heads: int, head_dim: int, half: int) -> None:
    cases.check_rope(kernels, rows, heads, head_dim, half)


@pytest.mark.parametrize("rows, n", [(1, 576), (3, 80), (5, 7), (2, 2048)])
@pytest.mark.parametrize("with_add", [False, True])
def test_layer_norm(kernels: Any, rows: int, n: int, with_add: bool) -> None:
    cases.check_layer_norm(kernels, rows, n, with_add)


@pytest.mark.skipif(not extension.AVAILABLE, reason="the native extension is not built")
@pytest.mark.parametrize("n", [24, 300, 576, 2048])
def test_norms_do_not_depend_on_the_number_of_threads(n: int) -> None:
    """Ranks of unequal size have to send a token to the same experts."""
    isa, (x, add), weight = extension.resolve_isa("auto"), torch.randn(2, 3, n), torch.randn(n)
    found = []
    for threads in (1, 2, 3, 5):
        kernels = native.NativeKernels(isa, [-1] * threads, oversubscribed=True)
        found.append([kernels.rms_norm(x.clone(), weight, 1e-5, add), kernels.layer_norm(x[:1], weight, weight, 1e-5)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("rows, heads, head_dim", [(1, 12, 64), (5, 3, 20), (4, 1, 128)])
def test_head_norm(kernels: Any, rows: int, heads: int, head_dim: int) -> None:
    cases.check_head_norm(kernels, rows, heads, head_dim)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("form", cases.ACTIVATED_FORMS, ids=lambda f: f.name)
def test_activated_linear(kernels: Any, form: Format, act: str, gated: bool) -> None:
    if kernels.name == "ipex" and (form.zero_points or form.name not in ipex.DTYPES):
        pytest.skip("refused, see test_choices_that_do_not_go_together")
    for m, n, k in cases.ACTIVATED_SHAPES:
        cases.check_activated_linear(kernels, form, act, gated, m, n, k)


@pytest.mark.parametrize("rows, heads, n, k, tail", [(1, 3, 64, 48, 16), (5, 2, 32, 64, 0), (40, 4, 96, 128, 6)])
@pytest.mark.parametrize("form", cases.EXPERT_FORMS, ids=lambda f: f.name)
def test_head_linear(kernels: Any, form: Format, rows: int, heads: int, n: int, k: int, tail: int) -> None:
    if form.group and k % form.group:
        pytest.skip("not whole groups: refused before loading")
    cases.check_head_linear(kernels, form, rows, heads, n, k, tail)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("experts, router", cases.ROUTERS, ids=str)
def test_route(kernels: Any, experts: int, router: Router, rows: int, biased: bool) -> None:
    cases.check_route(kernels, experts, router, rows, biased)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("rows, n, k", [(1, 48, 64), (3, 40, 96), (60, 33, 128)])
@pytest.mark.parametrize("form", cases.EXPERT_FORMS, ids=lambda f: f.name)
def test_experts(kernels: Any, form: Format, rows: int, n: int, k: int, gated: bool) -> None:
    cases.check_experts(kernels, form, rows, n, k, gated)


def test_experts_without_columns_or_rows(kernels: Any) -> None:
    """What a rank with a share of zero has."""
    routes = kernels.route(torch.randn(3, 4), None, Router(top_k=2))
    rows = kernels.expert_rows(torch.randn(3, 32).bfloat16(), routes)
    into, out = (
        [kernels.pack(torch.empty(shape).bfloat16(), FORMATS["int8"], gated) for _ in range(4)]
        for shape, gated in (((0, 32), True), ((32, 0), False))
    )
    nothing = kernels.expert_linear(rows, into, routes, 0, act="silu")
    assert nothing.shape == (6, 0)
    assert torch.equal(kernels.expert_linear(nothing, out, routes, 32, torch.float32), torch.zeros(6, 32))


def test_more_experts_than_fit_are_refused(kernels: Any) -> None:
    if kernels.name != "native":
        pytest.skip("takes any")
    with pytest.raises(ValueError, match="more than 512 experts"):
        kernels.route(torch.randn(1, 513), None, Router(top_k=2))


@pytest.mark.parametrize("rows, n", [(1, 1999), (3, 40)])
def test_softcap(kernels: Any, rows: int, n: int) -> None:
    cases.check_softcap(kernels, rows, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows, n", [(1, 1999), (3, 40)])
def test_add(kernels: Any, rows: int, n: int, dtype: torch.dtype) -> None:
    cases.check_add(kernels, rows, n, dtype)


def test_embedding(kernels: Any) -> None:
    cases.check_embedding(kernels)


@pytest.mark.parametrize("head_dim", [20, 64, 128])
def test_int8_cache(kernels: Any, head_dim: int) -> None:
    cases.check_kv_append(kernels, head_dim)


@pytest.mark.parametrize("kv_dtype", cases.KV_DTYPES, ids=["bf16", "int8"])
@pytest.mark.parametrize("case", cases.ATTENTION_CASES, ids=str)
def test_attention(kernels: Any, case: dict[str, Any], kv_dtype: torch.dtype) -> None:
    cases.check_attention(kernels, **case, kv_dtype=kv_dtype)


@pytest.mark.parametrize("kv_dtype", cases.KV_DTYPES, ids=["bf16", "int8"])
def test_later_positions_are_not_seen(kernels: Any, kv_dtype: torch.dtype) -> None:
    if kernels.name == "reference" or (kernels.name == "ipex" and kv_dtype == torch.int8):  # then it is the reference
        pytest.skip("multiplies them by zero in a matrix product of its own order")
    cases.check_causality(kernels, kv_dtype)


def test_a_longer_head_is_refused(kernels: Any) -> None:
    if kernels.name != "native":
        pytest.skip("takes any")
    batch = cases.step_of([(0, 0)], torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="head_dim above 576"):
        kernels.attention(torch.zeros(1, 1, 578).bfloat16(), cases.new_cache(1, 1, 578, torch.bfloat16), batch, 1, 0)


def test_zero_size_shards(kernels: Any) -> None:
    empty_in, empty_out = (kernels.pack(torch.empty(shape).bfloat16(), FORMATS["int8"]) for shape in ((32, 0), (0, 32)))
    assert torch.equal(kernels.linear(torch.empty(2, 0).bfloat16(), empty_in, None, torch.float32), torch.zeros(2, 32))
    assert kernels.linear(torch.ones(2, 32).bfloat16(), empty_out).shape == (2, 0)
    empty_gated = kernels.pack(torch.empty(0, 32).bfloat16(), FORMATS["int8"], gated=True)
    assert kernels.linear(torch.ones(2, 32).bfloat16(), empty_gated, act="silu").shape == (2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("check", ["check_linears", "check_attentions"])
def test_amx_machine_code_by_emulation(tmp_path: Path, check: str) -> None:
    """The compiled AMX code on a CPU without tiles: its instructions are trapped and carried out in software."""
    if "amx" in extension.available_isas():
        pytest.skip("this CPU has AMX: test_linear and test_attention run on it")
    if "avx512_bf16" not in extension.available_isas():
        pytest.skip("the AMX path also needs AVX-512 bf16, which this CPU lacks")
    source, library = Path(__file__).parent / "support/amx_emulator.cpp", tmp_path / "amx_emulator.so"
    subprocess.run(["g++", "-O2", "-std=c++17", "-fPIC", "-shared", "-o", library, source], check=True)
    script = (
        "import ctypes, sys\n"
        "from distinf.kernels.native import NativeKernels\n"
        f"from tests.kernel_cases import {check}\n"
        f"emulator = ctypes.CDLL({str(library)!r})\n"
        "emulator.amx_emulator_count.restype = ctypes.c_ulong\n"
        "assert emulator.amx_emulator_install() == 0\n"
        f"{check}(NativeKernels('amx', [-1, -1], oversubscribed=True))\n"
        "print(emulator.amx_emulator_count())\n"
    )
    repo = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, cwd=repo)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000, "the AMX code did not run"


def test_isa_that_the_cpu_lacks_is_refused() -> None:
    missing = [isa for isa in ("amx", "avx512", "avx2") if isa not in extension.available_isas()]
    if not missing:
        pytest.skip("this CPU has every instruction set")
    with pytest.raises(ValueError, match=rf"--isa {missing[0]}: this CPU .* has"):
        extension.resolve_isa(missing[0])


@pytest.mark.parametrize(
    "name, isa, dtype, message",
    [
        ("native", "auto", "fp32", "cannot run --dtype fp32"),
        ("reference", "avx2", "bf16", "--isa avx2 needs the native kernels"),
        ("auto", "avx2", "fp32", "--isa avx2 needs the native kernels"),
        ("ipex", "avx2", "bf16", "--isa avx2 needs the native kernels, but --kernels ipex"),
        ("ipex", "auto", "fp32", "--kernels ipex cannot run fp32; expected .* bf16, int8, int4"),
        ("ipex", "auto", "auto", "--kernels ipex cannot run auto; expected .* bf16, int8, int4"),
        ("ipex", "auto", "w8a8", "--kernels ipex cannot run w8a8"),
    ],
)
def test_choices_that_do_not_go_together(name: str, isa: str, dtype: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name, isa, dtype, Placement((-1,)))


def test_ipex_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, ipex.MODULE, None)
    with pytest.raises(ValueError, match=r"--kernels ipex: .* is not installed; .*: pip install [^\n]*2\.8[^\n]*$"):
        load("ipex", "auto", "bf16", Placement((-1,)))


def test_ipex_for_another_torch_is_refused_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.0")
    with pytest.raises(ValueError, match=r"1\.2\.0 does not run on torch"):
        load("ipex", "auto", "bf16", Placement((-1,)))


def test_ipex_keeps_stdout_clean() -> None:
    if ipex.missing():
        pytest.skip(ipex.missing())
    script = "from distinf.kernels.ipex import IpexKernels; IpexKernels(1); print('text')"
    env = {**os.environ, "PMI_RANK": "0"}  # a rank under a launcher, as the package guesses it
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, env=env)
    assert done.stdout == "text\n", done.stderr


def test_whole_groups_of_a_shard_that_cuts_groups() -> None:
    runs = list(ipex.whole_groups(heads=9, group=3, offset=1))
    assert runs == [(slice(0, 2), slice(0, 1)), (slice(2, 8), slice(1, 3)), (slice(8, 9), slice(3, 4))]
    assert list(ipex.whole_groups(heads=1, group=4, offset=2)) == [(slice(0, 1), slice(0, 1))]
    assert list(ipex.whole_groups(heads=8, group=4, offset=0)) == [(slice(0, 8), slice(0, 2))]
