"""Builds dqo_kernels._cpu from csrc/. It needs a C++17 compiler and pybind11, neither torch nor a GPU."""

import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# A file that is compiled for one instruction set; on other processors it compiles to nothing.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# GCC's own AVX-512 header is warned about (GCC bug 105593); Clang does not know that warning.
QUIET = ["-Wno-unknown-warning-option", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
INSTRUCTION_SETS = {"_avx2.cpp": AVX2, "_avx512.cpp": [*AVX2, *AVX512, *QUIET]}


class BuildExt(build_ext):
    """pybind11's, with the flags of each instruction set on its own files only."""

    def build_extensions(self):
        compile_one = self.compiler._compile

        def with_flags(obj, src, ext, cc_args, extra_postargs, pp_opts):
            flags = next((flags for ending, flags in INSTRUCTION_SETS.items() if src.endswith(ending)), [])
            if platform.machine() not in ("x86_64", "AMD64"):
                flags = []
            compile_one(obj, src, ext, cc_args, [*extra_postargs, *flags], pp_opts)

        self.compiler._compile = with_flags
        super().build_extensions()


def cpu_extension() -> list[Pybind11Extension]:
    """The extension, or nothing (said in one line) on a machine that cannot build it. A build that breaks is an error."""
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    if sys.platform == "win32":
        print(
            "dqo_kernels: the backend 'cpp' is written for GCC and Clang, so it is left out on Windows", file=sys.stderr
        )
        return []
    if not any(map(shutil.which, (compiler, "c++", "g++", "clang++"))):
        print("dqo_kernels: no C++ compiler found, so the backend 'cpp' is left out", file=sys.stderr)
        return []
    csrc = Path("csrc")
    return [
        Pybind11Extension(
            "dqo_kernels._cpu",
            sorted(map(str, csrc.glob("cpu/*.cpp"))),
            include_dirs=["csrc"],
            depends=sorted(map(str, csrc.glob("c*/*.h"))),
            cxx_std=17,
            # -Wno-psabi: no vector crosses a function boundary that is not inlined, so how one would be passed is no matter.
            # -ffp-contract=off: products are fused where the source says so (csrc/cpu/simd.h).
            extra_compile_args=[
                "-O3",
                "-ffp-contract=off",
                "-Wno-psabi",
                *os.environ.get("DQO_KERNELS_CXXFLAGS", "").split(),
            ],
            extra_link_args=["-pthread", *os.environ.get("DQO_KERNELS_LDFLAGS", "").split()],
        )
    ]


with ParallelCompile(default=0):
    setup(ext_modules=cpu_extension(), cmdclass={"build_ext": BuildExt})
