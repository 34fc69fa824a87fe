"""Builds the C++ extension. Everything else about the package is in pyproject.toml."""

import shutil
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

# No -march: each instruction set is compiled by its own file and chosen at run time.
# gcc 12 warns about its own AVX-512 header (GCC bug 105593).
FLAGS = ["-O3", "-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]


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


def extension(name: str, csrc: Path) -> Pybind11Extension:
    """The module `name` from all C++ files of a folder."""
    return Pybind11Extension(
        name,
        sorted(str(p) for p in csrc.glob("*.cpp")),
        depends=sorted(str(p) for p in csrc.iterdir()),
        cxx_std=17,
        extra_compile_args=FLAGS,
    )


setup(
    ext_modules=[
        extension("distinf.kernels._native", Path("distinf/kernels/csrc")),
        extension("distinf.comm._ccl", Path("distinf/comm/csrc")),
    ],
    cmdclass={"build_ext": BuildNative},
)
