"""What oneCCL does besides the group's methods, on every rank of the job."""

from __future__ import annotations

import ctypes

import pytest
import torch

from distinf.comm.ccl import CclGroup
from tests.conftest import need


@pytest.fixture(scope="module")
def group() -> CclGroup:
    need("ccl")
    return CclGroup()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_method_and_c_function_sum_in_place(group: CclGroup, dtype: torch.dtype) -> None:
    """Small integers, exact in bf16 too. The C function is what a recorded step calls; it touches n elements."""
    n, total = 1000, group.world_size * (group.world_size + 1) / 2
    x = torch.full((n,), group.rank + 1, dtype=dtype)
    group.all_reduce_(x)
    assert torch.equal(x, torch.full((n,), total, dtype=dtype))

    native = group.native_all_reduce
    address = native.fp32 if dtype == torch.float32 else native.bf16
    call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(address)
    x = torch.full((n + 1,), group.rank + 1, dtype=dtype)
    assert call(native.context, x.data_ptr(), n) == 0
    assert torch.equal(x[:n], torch.full((n,), total, dtype=dtype)) and x[n] == group.rank + 1


def test_several_groups_at_once(group: CclGroup) -> None:
    other = CclGroup()
    for each in (group, other, group):
        x = torch.ones(5)
        each.all_reduce_(x)
        assert torch.equal(x, torch.full((5,), float(each.world_size)))
