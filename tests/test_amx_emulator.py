"""tests/support/amx_emulator.cpp, through the compiled AMX code of tests/support/amx_probe.cpp.

Each check runs in a child process, `python test_amx_emulator.py CHECK EMULATOR PROBE`: a SIGILL handler
must not leak into the pytest process, and some checks end in a signal.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

SUPPORT = Path(__file__).parent / "support"
BF16, SSD, SUD, USD, UUD = range(5)
S8, U8 = np.int8, np.uint8
INT8_TYPES = {SSD: (S8, S8), SUD: (S8, U8), USD: (U8, S8), UUD: (U8, U8)}
SHAPES = [(16, 16, 16), (1, 1, 1), (5, 7, 3), (16, 9, 13), (33, 20, 41)]  # m, n, k: n and k count dwords
BLOCK_INSTRUCTIONS = 7  # of one block in amx_probe.cpp

Array = NDArray[Any]


def skip_reason() -> str | None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "AMX exists on x86-64 only"
    if "amx_tile" in Path("/proc/cpuinfo").read_text().split():
        return "this CPU has AMX: the instructions never raise SIGILL"
    return None


pytestmark = pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason()))


# ---- pytest side ----


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("amx")
    built = []
    for name in ("amx_emulator", "amx_probe"):
        built.append(str(out / f"{name}.so"))
        flags = ["-O2", "-std=c++17", "-fPIC", "-shared"]
        subprocess.run(["g++", *flags, "-o", built[-1], str(SUPPORT / f"{name}.cpp")], check=True)
    return built


def run_child(libraries: list[str], check: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, __file__, check, *libraries]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "check", ["bf16_random", "bf16_denormals", "int8_random", "addressing", "config", "two_threads"]
)
def test_matches_reference(libraries: list[str], check: str) -> None:
    child = run_child(libraries, check)
    assert child.returncode == 0, child.stdout + child.stderr


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ("bad_inner", "TDPBF16PS: A.colsb/4 != B.rows"),
        ("bad_rows", "TDPBF16PS: C.rows != A.rows"),
        ("bad_columns", "TDPBF16PS: C.colsb != B.colsb"),
        ("bad_missing_tile", "TDPBF16PS: tile has rows = colsb = 0"),
        ("bad_released", "TDPBF16PS: tiles are not configured"),
        ("bad_limit", "LDTILECFG: rows > 16"),
        ("bad_half_tile", "LDTILECFG: only one of rows and colsb is 0"),
        ("bad_palette", "LDTILECFG: palette is not 0 or 1"),
        ("bad_reserved", "LDTILECFG: a reserved byte is not 0"),
    ],
)
def test_illegal_configuration_aborts(libraries: list[str], check: str, message: str) -> None:
    child = run_child(libraries, check)
    assert child.returncode == -signal.SIGABRT
    assert child.stderr == f"amx_emulator: {message}\n"


@pytest.mark.parametrize("check", ["ud2", "raise"])
def test_other_sigill_still_kills(libraries: list[str], check: str) -> None:
    assert run_child(libraries, check).returncode == -signal.SIGILL


def test_chains_to_the_previous_handler(libraries: list[str]) -> None:
    child = run_child(libraries, "ud2", "-X", "faulthandler")
    assert child.returncode == -signal.SIGILL
    assert "Fatal Python error: Illegal instruction" in child.stderr


# ---- child side ----


@dataclass
class Libraries:
    emulator: ctypes.CDLL
    probe: ctypes.CDLL

    def count(self) -> int:
        return int(self.emulator.amx_emulator_count())


def load(emulator: str, probe: str) -> Libraries:
    libs = Libraries(ctypes.CDLL(emulator), ctypes.CDLL(probe))
    libs.emulator.amx_emulator_count.restype = ctypes.c_ulong
    libs.probe.probe_gemm.restype = ctypes.c_bool
    kind, pointer, size, stride = ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_long
    libs.probe.probe_gemm.argtypes = [kind, *[pointer] * 3, *[size] * 3, *[stride] * 3]
    libs.probe.probe_address.argtypes = [kind, pointer, stride, pointer]
    assert libs.emulator.amx_emulator_install() == 0
    assert libs.emulator.amx_emulator_install() == 0  # a second call changes nothing
    return libs


def gemm(libs: Libraries, kind: int, a: Array, b: Array, c: Array) -> Array:
    """C + A @ B by AMX. A is (m, k, pack), B (k, n, pack), C (m, n): 4-byte elements after packing."""
    (m, k, _), n = a.shape, b.shape[1]
    # One spare column of dwords each, so that no stride equals colsb.
    wide = [np.full((rows, columns + 1), 0x5A5A5A5A, np.uint32) for rows, columns in ((m, k), (k, n), (m, n))]
    for buffer, data in zip(wide, (a, b, c), strict=True):
        buffer[:, :-1] = np.ascontiguousarray(data).view(np.uint32).reshape(len(buffer), -1)
    pointers, strides = [x.ctypes.data for x in wide], [x.strides[0] for x in wide]
    assert libs.probe.probe_gemm(kind, *pointers, m, n, k, *strides), "MXCSR changed"
    assert (wide[2][:, -1] == 0x5A5A5A5A).all(), "stored past colsb"
    return np.ascontiguousarray(wide[2][:, :-1]).view(c.dtype)


def bf16_inputs(rng: np.random.Generator, m: int, n: int, k: int) -> tuple[Array, Array, Array]:
    a, b = (rng.standard_normal((*size, 2)).astype(np.float32) for size in ((m, k), (k, n)))
    return to_bf16(a), to_bf16(b), rng.standard_normal((m, n)).astype(np.float32)


def to_bf16(x: Array) -> Array:
    return np.asarray(x.view(np.uint32) >> 16, np.uint16)  # truncation: any bf16 value will do


def to_float(x: Array) -> Array:
    return (x.astype(np.uint32) << 16).view(np.float32)


def bf16_reference(a: Array, b: Array, c: Array) -> Array:
    """The SDM's order in float32: per block of 16 dwords, even and odd products apart, then C + (even + odd).

    A product of two bf16 is exact in float32, so one addition rounds as the SDM's FMA does.
    """
    af, bf, out = to_float(a), to_float(b), c.copy()
    for start in range(0, a.shape[1], 16):
        sums = np.zeros((*c.shape, 2), np.float32)
        for k in range(start, min(start + 16, a.shape[1])):
            sums += af[:, None, k, :] * bf[None, k, :, :]
        out += sums[..., 0] + sums[..., 1]
    return out


def check_bf16(libs: Libraries, rng: np.random.Generator, m: int, n: int, k: int) -> None:
    a, b, c = bf16_inputs(rng, m, n, k)
    got = gemm(libs, BF16, a, b, c)
    np.testing.assert_array_equal(got, bf16_reference(a, b, c))
    # Independent of the order: 2k products and c, rounded at most k + 2 * blocks times by 2^-24 each.
    af, bf, cf = to_float(a).astype(np.float64), to_float(b).astype(np.float64), c.astype(np.float64)
    exact = np.einsum("mkp,knp->mn", af, bf) + cf
    size = np.einsum("mkp,knp->mn", abs(af), abs(bf)) + abs(cf)
    roundings = k + 2 * -(-k // 16)
    assert (abs(got - exact) <= 1.01 * roundings * 2.0**-24 * size).all()


def blocks(m: int, n: int, k: int) -> int:
    return -(-m // 16) * -(-n // 16) * -(-k // 16)


def bf16_random(libs: Libraries) -> None:
    for shape in SHAPES:
        before = libs.count()
        check_bf16(libs, np.random.default_rng(1), *shape)
        assert libs.count() - before == BLOCK_INSTRUCTIONS * blocks(*shape)


def bf16_denormals(libs: Libraries) -> None:
    """Denormal inputs and results count as 0, but a denormal product inside the FMA does not."""

    def dot(a: list[float], b: list[float], c: float) -> float:
        row, column = (to_bf16(np.array([[[x, 0.0] for x in v]], np.float32)) for v in (a, b))
        return float(gemm(libs, BF16, row, column.reshape(-1, 1, 2), np.array([[c]], np.float32))[0, 0])

    assert dot([2.0**-130], [2.0**100], 0.0) == 0.0  # DAZ on A
    assert dot([2.0**100], [2.0**-130], 1.0) == 1.0  # DAZ on B
    assert dot([0.0], [0.0], 2.0**-130) == 0.0  # DAZ on C
    assert dot([2.0**-64], [2.0**-63], 0.0) == 0.0  # FTZ
    assert dot([2.0**-63, 2.0**-64], [2.0**-63, 2.0**-63], 0.0) == 1.5 * 2.0**-126
    assert dot([-(2.0**100), 2.0**64], [2.0**27, 2.0**64], 0.0) == 2.0**127  # a product beyond float32


def int8_random(libs: Libraries) -> None:
    rng = np.random.default_rng(2)
    for kind, types in INT8_TYPES.items():
        for m, n, k in SHAPES:
            a, b = random_bytes(rng, types[0], (m, k, 4)), random_bytes(rng, types[1], (k, n, 4))
            c = rng.integers(-(2**31), 2**31, (m, n), np.int32)  # the sum wraps modulo 2^32
            before = libs.count()
            got = gemm(libs, kind, a, b, c)
            assert libs.count() - before == BLOCK_INSTRUCTIONS * blocks(m, n, k)
            exact = np.einsum("mkp,knp->mn", a.astype(np.int64), b.astype(np.int64)) + c
            np.testing.assert_array_equal(got, exact.astype(np.int32))


def random_bytes(rng: np.random.Generator, dtype: type[Any], shape: tuple[int, ...]) -> Array:
    return rng.integers(0, 256, shape, np.uint8).view(dtype)


def addressing(libs: Libraries) -> None:
    data = np.random.default_rng(3).integers(0, 256, 8192, np.uint8)
    middle, step = 4096, 24
    # Where rows 0..3 come from, for each form of probe_address.
    rows = {
        0: [middle + r * step for r in range(4)],
        1: [middle - 40 + r * step * 2 for r in range(4)],
        2: [middle + 1000 + r * step * 8 for r in range(4)],
        3: [middle + 16] * 4,
        4: [middle + 8 + r * step * 4 for r in range(4)],
    }
    for form, starts in rows.items():
        for sign in (1, -1):
            expected = np.array([data[s if sign > 0 else 2 * starts[0] - s :][:8] for s in starts])
            got = load_rows(libs, form, data.ctypes.data + middle, sign * step)
            np.testing.assert_array_equal(got, expected, f"form {form}")
    # Form 5 has no base register and starts at row 3, which is 3 * step + 8.
    address = data.ctypes.data + middle
    skew = address % 3
    got = load_rows(libs, 5, 0, (address - skew) // 3)
    np.testing.assert_array_equal(got[3], data[middle - skew + 8 :][:8])
    assert not got[:3].any()
    assert not load_rows(libs, 6, address, step).any()  # form 6 ends with TILEZERO


def load_rows(libs: Libraries, form: int, base: int, step: int) -> Array:
    out = np.full((4, 8), 0x5A, np.uint8)
    libs.probe.probe_address(form, base, step, out.ctypes.data)
    return out


def config(libs: Libraries) -> None:
    out = np.full((2, 64), 0x5A, np.uint8)
    libs.probe.probe_config(ctypes.c_void_p(out.ctypes.data))
    expected = np.zeros((2, 64), np.uint8)
    expected[0, [0, 16 + 2 * 3, 48 + 3]] = [1, 4 * 7, 5]
    np.testing.assert_array_equal(out, expected)


def two_threads(libs: Libraries) -> None:
    """Both threads run AMX at once, with other shapes: tile state shared between them would show."""
    errors: list[BaseException] = []
    start, repeats, shapes = threading.Barrier(2), 100, [(16, 16, 64), (7, 5, 75)]

    def work(index: int) -> None:
        try:
            start.wait()
            for _ in range(repeats):
                check_bf16(libs, np.random.default_rng(index), *shapes[index])
        except BaseException as error:  # handed to the main thread
            errors.append(error)

    before = libs.count()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert libs.count() - before == BLOCK_INSTRUCTIONS * repeats * sum(blocks(*s) for s in shapes)


def bad(libs: Libraries, check: str) -> None:
    c, a, b = 0, 6, 7  # the tiles of probe_dot
    cfg = np.zeros(64, np.uint8)
    rows, colsb = cfg[48:56], cfg[16:32:2]
    cfg[0] = 1
    rows[[c, a, b]] = [8, 8, 4]
    colsb[[c, a, b]] = [24, 16, 24]
    if check == "bad_inner":
        rows[b] = 5
    elif check == "bad_rows":
        rows[a] = 7
    elif check == "bad_columns":
        colsb[c] = 20
    elif check == "bad_missing_tile":
        rows[b] = colsb[b] = 0
    elif check == "bad_released":
        cfg[0] = 0
    elif check == "bad_limit":
        rows[c] = 17
    elif check == "bad_half_tile":
        colsb[1] = 4
    elif check == "bad_palette":
        cfg[0] = 2
    elif check == "bad_reserved":
        cfg[33] = 1
    libs.probe.probe_dot(ctypes.c_void_p(cfg.ctypes.data))


def main(check: str, emulator: str, probe: str) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libs = load(emulator, probe)
    if check.startswith("bad_"):
        bad(libs, check)
    elif check == "ud2":
        libs.probe.probe_ud2()
    elif check == "raise":
        signal.raise_signal(signal.SIGILL)
    else:
        globals()[check](libs)


if __name__ == "__main__":
    main(*sys.argv[1:])
