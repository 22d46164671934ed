"""Runs the backend "cuda" on the CPU: the sources of csrc/cuda compiled by the C++ compiler against emulation/cuda_emulation.h.

Threads are fibers there, which go on in random order wherever CUDA threads may. What it cannot show: what nvcc makes of the
sources, approximate instructions (ex2), speed. With a GPU the same tests run on the GPU instead.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "emulation"
# No contraction, as with nvcc. No stack checks: fibers jump between stacks.
FLAGS = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",
    "-DDQO_EMULATION",
]
FLAGS += ["-Wall", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}", f"-I{EMULATION}"]
UNITS = [unit for unit in sorted((ROOT / "csrc" / "cuda").glob("*.c*")) if unit.suffix in (".cu", ".cpp")]
UNITS = [unit for unit in UNITS if unit.name != "properties.cu"]  # the emulated device has its own
UNITS += [EMULATION / "cuda_emulation.cpp", EMULATION / "properties.cpp"]


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)


def missing() -> str | None:
    """Why there is no emulation here, or None."""
    if sys.platform != "linux":
        return "the emulation of CUDA is written for Linux"
    if compiler() is None:
        return "no C++ compiler"
    return None if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


def _digest() -> str:
    digest = hashlib.sha256(" ".join([sys.version, compiler() or "", *FLAGS]).encode())
    for path in sorted([*(ROOT / "csrc").glob("c*/*"), *EMULATION.iterdir()]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build() -> Path:
    """The extension; compiled once for the same sources."""
    import pybind11

    folder = Path(tempfile.gettempdir()) / f"dqo-cuda-emulation-{os.getuid()}" / _digest()
    library = folder / "_cuda.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def compile_one(unit: Path) -> str:
        target = str(folder / f"{unit.stem}-{os.getpid()}.o")
        subprocess.run([compiler(), *FLAGS, *includes, "-x", "c++", "-c", str(unit), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, UNITS))
    partial = folder / f"{os.getpid()}.so"
    subprocess.run([compiler(), "-shared", *objects, "-o", str(partial)], check=True)
    partial.replace(library)  # two processes may build it at once
    return library


def load(path: Path):
    spec = importlib.util.spec_from_file_location("emulated._cuda", path)  # pybind11 keeps modules by name
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install() -> None:
    """From now on "cuda" is a backend of the CPU in this process."""
    import dqo_kernels
    from dqo_kernels.core import dispatch

    # Whoever imports it from now on gets this one.
    sys.modules["dqo_kernels._cuda"] = dqo_kernels._cuda = dispatch._cuda = load(build())
    for devices in dispatch.TABLE.values():
        devices["cpu"] = tuple(dict.fromkeys((*devices["cpu"], "cuda")))
