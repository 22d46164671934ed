"""csrc/cpu/simd.h measured against double precision for each instruction set, and csrc/cpu compiled for another processor."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from dqo_kernels.core import dispatch

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("simd_accuracy.cpp")
FLAGS = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-psabi", "-I", str(ROOT / "csrc")]
X86 = platform.machine() in ("x86_64", "AMD64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"] if X86 else []
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
LANES = {"portable": (4, []), "avx2": (8, AVX2), "avx512": (16, AVX512)}
AARCH64 = "aarch64-linux-gnu-g++"


def compiled(compiler: str, *arguments) -> None:
    done = subprocess.run([compiler, *FLAGS, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def measured(*command) -> dict[str, float]:
    """What the program measured on every 997th float of each range: more than a million of each."""
    lines = subprocess.run([*map(str, command), "997"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: float(value) for name, value in map(str.split, lines)}


def check(found: dict[str, float], isa: str) -> None:
    wrong = {name: value for name, value in found.items() if name.endswith(("_wrong", "_outside"))}
    assert len(wrong) == 5 and not any(wrong.values()), wrong
    # AVX-512 reduces by one constant for ln 2, whose error grows with |x|: 1.6e-7 at -8, 3.8e-7 at -87.
    assert found["exp_relative"] <= (4e-7 if isa == "avx512" else 1e-7)
    assert found["exp_ulp"] <= (5.5 if isa == "avx512" else 1.1)
    # Where float32 has no normal numbers: 0, or on AVX-512 the nearest subnormals.
    assert found["exp_tiny"] <= (6e-45 if isa == "avx512" else 1.2e-38)
    assert found["tanh_relative"] <= 3e-7 and found["tanh_absolute"] <= 1e-7
    assert found["slope_relative"] <= 4e-7 and found["slope_absolute"] <= 2.5e-7


@pytest.mark.parametrize("isa", dispatch._cpu.instruction_sets() if dispatch._cpu else [])
def test_exp_and_tanh_are_as_accurate_as_claimed_and_halves_round_to_nearest(isa, tmp_path):
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    lanes, flags = LANES[isa]
    compiled(compiler, "-O2", *flags, "-w", f"-DDQO_LANES={lanes}", PROGRAM, "-o", tmp_path / "measure")
    check(measured(tmp_path / "measure"), isa)


@pytest.mark.skipif(not shutil.which(AARCH64), reason=f"{AARCH64} is not installed")
def test_the_sources_compile_for_aarch64_without_a_warning(tmp_path):
    sources = [
        path for path in sorted(ROOT.glob("csrc/cpu/*.cpp")) if path.name != "bindings.cpp"
    ]  # which needs Python's
    assert len(sources) > 5
    for source in sources:
        compiled(AARCH64, "-O2", "-Werror", "-c", source, "-o", tmp_path / "object.o")


@pytest.mark.skipif(not shutil.which(AARCH64), reason=f"{AARCH64} is not installed")
@pytest.mark.skipif(not shutil.which("qemu-aarch64"), reason="qemu-aarch64 is not installed")
def test_neon_is_as_accurate(tmp_path):
    compiled(AARCH64, "-O2", "-static", "-DDQO_LANES=4", PROGRAM, "-o", tmp_path / "measure")
    check(measured("qemu-aarch64", tmp_path / "measure"), "portable")
