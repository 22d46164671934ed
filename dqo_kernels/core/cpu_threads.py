"""Lets the C++ kernels run on the threads that torch already has.

torch's OpenMP workers spin for some milliseconds after every operation. Threads of our own would wait for those cores: a
kernel of 0.6 ms was measured to take 4 ms right after a torch operation. So the kernels borrow torch's pool, through
the one function of an OpenMP runtime that GCC's, LLVM's and Intel's all export. Where it is not found they start threads.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import torch

import dqo_kernels._cpu as _cpu


def openmp_runtimes() -> list[Path]:
    """The OpenMP runtimes that this process has loaded (Linux; elsewhere none are looked for)."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    names = {line.split(maxsplit=5)[5].strip() for line in maps.splitlines() if line.count("/")}
    return sorted(Path(name) for name in names if re.match(r"lib(gomp|iomp5|omp)\b.*\.so", os.path.basename(name)))


def of_torch(runtimes: list[Path]) -> Path | None:
    """The one in torch's own folders, else the only one there is: with several it cannot be known which torch uses."""
    home = Path(torch.__file__).resolve().parent
    own = [path for path in runtimes if home in path.parents or home.with_name("torch.libs") in path.parents]
    candidates = own or runtimes
    return candidates[0] if len(candidates) == 1 else None


def borrow_pool() -> Path | None:
    """Hands torch's pool to the kernels; returns the runtime, or None when they start their own threads."""
    runtime = of_torch(openmp_runtimes())
    address = None
    if runtime is not None:
        library = ctypes.CDLL(str(runtime), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        if hasattr(library, "GOMP_parallel"):
            address = ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
    _cpu.use_openmp(address or 0)
    return runtime if address else None


POOL = borrow_pool()
