"""Builds dqo_kernels._cpu from csrc/. It needs a C++17 compiler and pybind11, neither torch nor a GPU."""

import shutil
import sys
import sysconfig

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup


def cpu_extension() -> list[Pybind11Extension]:
    """The extension, or nothing (said in one line) on a machine without a compiler. A build that breaks is an error."""
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    if sys.platform != "win32" and not any(map(shutil.which, (compiler, "c++", "g++", "clang++"))):
        print("dqo_kernels: no C++ compiler found, so the backend 'cpp' is left out", file=sys.stderr)
        return []
    return [
        Pybind11Extension(
            "dqo_kernels._cpu",
            ["csrc/cpu/bindings.cpp", "csrc/cpu/lambda_return.cpp"],
            include_dirs=["csrc"],
            depends=["csrc/common/lambda_return.h", "csrc/cpu/lambda_return.h"],
            cxx_std=17,
        )
    ]


setup(ext_modules=cpu_extension(), cmdclass={"build_ext": build_ext})
