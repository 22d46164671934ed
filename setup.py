"""Builds dqo_kernels._cpu and, where CUDA's nvcc is, dqo_kernels._cuda from csrc/. DQO_KERNELS_CUDA=0 leaves the second one out.

They need pybind11 and a C++17 compiler, neither torch nor a GPU."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# A file that is compiled for one instruction set; on other processors it compiles to nothing.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# GCC's own AVX-512 header is warned about (GCC bug 105593); Clang does not know that warning.
QUIET = ["-Wno-unknown-warning-option", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
INSTRUCTION_SETS = {"_avx2.cpp": AVX2, "_avx512.cpp": [*AVX2, *AVX512, *QUIET]}

OLDEST_NVCC = (12, 0)  # the first to know Hopper's instructions
# Machine code for Hopper, and for every other GPU of its capability or later code that its driver compiles at first use.
CUDA_TARGETS = ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_80,code=compute_80"]
CLUSTER_TARGETS = ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_90,code=compute_90"]
CLUSTER_SOURCES = {"soft_bellman_loss.cu"}  # thread block clusters: compute capability 9.0 and later
# -fmad=false: no product is contracted into a sum, so that the KL of identical rows is exactly 0 and results are the same as the
# C++ mathematics tested on the CPU.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all"]


def leave_out(backend: str, reason: str) -> list:
    print(f"dqo_kernels: the backend '{backend}' is left out: {reason}", file=sys.stderr)
    return []


class BuildExt(build_ext):
    """pybind11's, with the flags of each instruction set on its own files only, and nvcc for CUDA sources."""

    def build_extension(self, ext):
        if ext.name.endswith("._cuda"):
            objects = Path(self.build_temp) / "cuda"
            objects.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # one compiler each
                ext.extra_objects = list(pool.map(lambda source: self.compile_cuda(source, objects), ext.cuda_sources))
        super().build_extension(ext)

    def compile_cuda(self, source: Path, objects: Path) -> str:
        target = str(objects / f"{source.stem}.o")
        targets = CLUSTER_TARGETS if source.name in CLUSTER_SOURCES else CUDA_TARGETS
        subprocess.run([nvcc(), *NVCC_FLAGS, *targets, "-Icsrc", "-c", str(source), "-o", target], check=True)
        return target

    def build_extensions(self):
        compile_one = self.compiler._compile

        def with_flags(obj, src, ext, cc_args, extra_postargs, pp_opts):
            flags = next((flags for ending, flags in INSTRUCTION_SETS.items() if src.endswith(ending)), [])
            if platform.machine() not in ("x86_64", "AMD64"):
                flags = []
            compile_one(obj, src, ext, cc_args, [*extra_postargs, *flags], pp_opts)

        self.compiler._compile = with_flags
        super().build_extensions()


def no_compiler() -> str | None:
    if sys.platform == "win32":
        return "it is written for GCC and Clang, not for Windows"
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    return None if any(map(shutil.which, (compiler, "c++", "g++", "clang++"))) else "no C++ compiler found"


def cpu_extension() -> list[Pybind11Extension]:
    """The extension, or nothing (said in one line) on a machine that cannot build it. A build that breaks is an error."""
    if reason := no_compiler():
        return leave_out("cpp", reason)
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


def nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return next(
        filter(None, [*(shutil.which("nvcc", path=f"{home}/bin") for home in homes), shutil.which("nvcc")]), None
    )


def toolkit() -> tuple[Path, tuple[int, int]]:
    """The folder of the toolkit that nvcc belongs to, and its version."""
    dry = subprocess.run([nvcc(), "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"#\$ TOP=(.*)", dry)
    version = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout
    )
    if not top or not version:
        raise RuntimeError(f"{nvcc()} does not say where its toolkit is; set DQO_KERNELS_CUDA=0 to build without it")
    return Path(top[1].strip()).resolve(), (int(version[1]), int(version[2]))


def cuda_extension() -> list[Pybind11Extension]:
    """As cpu_extension. The runtime is linked in and finds the driver when it is used: the module loads without one."""
    if os.environ.get("DQO_KERNELS_CUDA") == "0":
        return leave_out("cuda", "DQO_KERNELS_CUDA=0")
    if reason := no_compiler() or (None if nvcc() else "CUDA's nvcc is not on PATH, nor under CUDA_HOME"):
        return leave_out("cuda", reason)
    home, version = toolkit()
    if version < OLDEST_NVCC:
        return leave_out(
            "cuda", f"{nvcc()} is of CUDA {version[0]}.{version[1]}; it needs {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]}"
        )
    csrc = Path("csrc")
    extension = Pybind11Extension(
        "dqo_kernels._cuda",
        ["csrc/cuda/bindings.cpp"],
        include_dirs=["csrc", str(home / "include")],
        depends=sorted(map(str, [*csrc.glob("c*/*.h"), *csrc.glob("cuda/*.cu*")])),
        cxx_std=17,
        extra_compile_args=["-O2"],
        library_dirs=[str(home / "lib64"), str(home / "lib")],
        libraries=["cudart_static", "dl", "rt", "pthread"],
    )
    extension.cuda_sources = sorted(csrc.glob("cuda/*.cu"))
    return [extension]


with ParallelCompile(default=0):
    setup(ext_modules=[*cpu_extension(), *cuda_extension()], cmdclass={"build_ext": BuildExt})
