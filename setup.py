"""Builds the C++ extension. Everything else about the package is in pyproject.toml."""

import shutil
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

CSRC = Path("distinf/kernels/csrc")


class BuildNative(build_ext):
    """build_ext that says what to install when there is no C++ compiler."""

    def build_extensions(self) -> None:
        compiler = self.compiler.compiler_cxx[0]
        if shutil.which(compiler) is None:
            sys.exit(
                f"distinf: no C++ compiler ({compiler!r} not found). Install g++ 12 or newer, "
                "e.g. `apt-get install g++` or `dnf install gcc-c++`, and run the same command again."
            )
        super().build_extensions()


setup(
    ext_modules=[
        Pybind11Extension(
            "distinf.kernels._native",
            sorted(str(p) for p in CSRC.glob("*.cpp")),
            depends=sorted(str(p) for p in CSRC.iterdir()),
            cxx_std=17,
            # No -march: each instruction set is compiled by its own file and chosen at run time.
            # gcc 12 warns about its own AVX-512 header (GCC bug 105593).
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
