"""--comm ccl and torch-ccl: what oneCCL is told, and one line where a library is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distinf.comm import ccl, torch_ccl
from tests.conftest import need, ranks, run


def test_settings_keep_oneccl_off_the_cores_and_within_the_transport(tmp_path: Path) -> None:
    over_mpi = ccl.settings("mpi", tmp_path)
    assert over_mpi["CCL_WORKER_OFFLOAD"] == "0" and over_mpi["CCL_KVS_MODE"] == over_mpi["CCL_ATL_TRANSPORT"] == "mpi"
    over_ofi = ccl.settings("ofi", tmp_path)
    assert over_ofi["CCL_ATL_TRANSPORT"] == "ofi" and not {"CCL_KVS_MODE", "CCL_OFI_LIBRARY_PATH"} & set(over_ofi)
    (tmp_path / "libfabric.so.1").touch()
    assert ccl.settings("ofi", tmp_path)["CCL_OFI_LIBRARY_PATH"] == str(tmp_path / "libfabric.so.1")
    assert ccl.settings("ofi", tmp_path)["FI_PROVIDER_PATH"] == str(tmp_path)


def test_a_broken_library_is_named(tmp_path: Path) -> None:
    (tmp_path / ccl.LIBRARY).write_text("not a library")
    with pytest.raises(ValueError, match=rf"--comm ccl: oneCCL not found \({tmp_path}/libccl.so.1: .*distinf\[ccl\]"):
        ccl.load(tmp_path)


def test_missing_bindings_are_named() -> None:
    with pytest.raises(ValueError, match=r"--comm torch-ccl: oneccl_bindings_for_pytorch cannot be imported"):
        torch_ccl.load_bindings()


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize("missing_on, end", [((0, 1), '"distinf[ccl]"'), ((1,), '"distinf[ccl]" (rank 1)')])
def test_a_missing_library_is_one_line_on_many_ranks(tmp_path: Path, missing_on: tuple[int, ...], end: str) -> None:
    need("ccl")
    (tmp_path / "script.py").write_text(
        "from distinf import cli, comm; from distinf.comm import ccl\n"
        f"if comm.launched_rank() in {missing_on}: ccl.LIBRARY = 'libccl_gone.so.1'\n"
        "cli.main(['info', '--comm', 'ccl'])"
    )
    done = run(ranks(2, "python", tmp_path / "script.py"), timeout_s=60)
    assert done.status == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "distinf: error:" in line]
    assert len(lines) == 1 and "--comm ccl: oneCCL not found (libccl_gone.so.1: " in lines[0] and lines[0].endswith(end)
    assert "Traceback" not in done.stderr


@pytest.mark.mpi
@pytest.mark.slow
def test_stdout_is_free_of_what_oneccl_says() -> None:
    need("ccl")
    done = run(ranks(2, "info", "--json", "--comm", "ccl"))
    assert json.loads(done.stdout)["world_size"] == 2
