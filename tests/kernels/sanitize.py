"""Builds the C++ kernels under sanitizers, and fuzzes such a build in a Python without torch. Driven by test_sanitizers.py.

    python tests/kernels/sanitize.py fuzz <_cpu...so> CASES SEED      prints "ran N cases"
    python tests/kernels/sanitize.py overrun|misaligned <_cpu...so>   commits the error, to show that it is noticed

Every array has exactly its size, so that a read or write past an end meets AddressSanitizer's guard. For races, by hand:
drive(build(folder, "thread"), "fuzz", 600, 0, sanitizers="thread"), which leaves out the OpenMP pool: ThreadSanitizer cannot
see its barriers.
"""

import contextlib
import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CXX = next((name for name in ("g++", "c++") if shutil.which(name)), None)
RUNTIMES = {"address,undefined": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}
REPORT = "halt_on_error=1:exitcode=66:print_stacktrace=1"


def runtime_libraries(sanitizers: str) -> list[str] | None:
    """Paths to preload, C++'s own among them (exceptions pass through the sanitizer); None when the compiler has none."""
    names = [*RUNTIMES[sanitizers], "libstdc++.so"]
    paths = (
        [subprocess.check_output([CXX, f"-print-file-name={name}"], text=True).strip() for name in names]
        if CXX
        else [""]
    )
    return paths if all(map(os.path.isabs, paths)) else None


def build(folder: Path, sanitizers: str = "address,undefined") -> Path:
    """The extension, compiled in `folder` from a copy of the sources. -O0 because optimising instrumented code takes minutes."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy(ROOT / "setup.py", folder)
    if (
        "avx512f" not in Path("/proc/cpuinfo").read_text()
    ):  # it would be compiled, a third of all the work, and never run
        place = folder / "csrc" / "cpu" / "token_stats_avx512.cpp"
        empty = '#include "cpu/token_stats.h"\nconst dqo::cpu::TokenStatsRows dqo::cpu::token_stats_avx512{};\n'
        place.write_text(f"#if defined(__x86_64__)\n{empty}#endif\n")
    (folder / "dqo_kernels").mkdir()
    flags = f"-fsanitize={sanitizers}"
    env = os.environ | {"CXX": CXX, "CC": CXX, "DQO_KERNELS_CUDA": "0", "DQO_KERNELS_LDFLAGS": flags}
    env["DQO_KERNELS_CXXFLAGS"] = f"-O0 -g1 -fno-sanitize-recover=undefined {flags}"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return next((folder / "dqo_kernels").glob("_cpu*.so"))


def drive(extension: Path, mode: str, *arguments, sanitizers: str = "address,undefined") -> subprocess.CompletedProcess:
    env = os.environ | {
        "LD_PRELOAD": " ".join(runtime_libraries(sanitizers)),
        "ASAN_OPTIONS": f"detect_leaks=0:{REPORT}",  # Python itself leaves memory behind
        "UBSAN_OPTIONS": REPORT,
        "TSAN_OPTIONS": REPORT,
        "PYTHONMALLOC": "malloc",  # every object its own allocation
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, mode, str(extension), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def load(path: str):
    spec = importlib.util.spec_from_file_location("_cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Fuzz:
    def __init__(self, cpu, seed):
        self.cpu, self.rng, self.alive = cpu, np.random.default_rng(seed), []
        self.openmp = 0
        with contextlib.suppress(OSError):
            if "libtsan" not in os.environ["LD_PRELOAD"]:
                self.openmp = ctypes.cast(ctypes.CDLL("libgomp.so.1").GOMP_parallel, ctypes.c_void_p).value

    def pick(self, *options):
        return options[self.rng.integers(len(options))]

    def array(self, size, dtype, values=None) -> int:
        """Address of a fresh array that ends where its memory does, at any alignment; random when values is None."""
        dtype = np.dtype(dtype)
        shift = int(self.rng.integers(17))
        x = np.empty(size + shift, dtype)[shift:]
        if values is not None:
            x[:] = values
        elif dtype.kind == "f":
            x[:] = self.rng.normal(0, self.pick(1e-3, 3, 1e4), size)
            special = self.pick(0, 0, 0, 0.1)
            x[self.rng.random(size) < special] = self.pick(np.nan, np.inf, -np.inf)
        else:  # bfloat16: any bits, or numbers
            numbers = self.rng.normal(0, 3, size).astype(np.float32).view(np.uint32) >> 16
            x[:] = self.pick(self.rng.integers(0, 2**16, size), numbers)
        self.alive.append(x)
        return x.ctypes.data

    def rows(self, outer, inner, vocab, dtype):
        """A tensor of (outer, inner) rows whose last row ends at the end of the memory."""
        inner_stride = vocab + self.pick(0, 0, 1, 5)
        outer_stride = self.pick(0, inner * inner_stride, (inner + 1) * inner_stride)
        size = (outer - 1) * outer_stride + (inner - 1) * inner_stride + vocab if outer and inner else 0
        return self.array(size, dtype), max(inner, 1), outer_stride, inner_stride

    def outputs(self, count, size, dtype):
        """Arrays filled with one bits: a NaN that no arithmetic yields."""
        addresses = [self.array(size, dtype, 0) for _ in range(count)]
        for x in self.alive[len(self.alive) - count :]:
            x.view(np.uint8)[:] = 255
        return addresses

    def written(self, count):
        """Checks that the last `count` arrays keep nothing of what outputs() put there."""
        for x in self.alive[-count:]:
            assert not (x.view(f"u{x.itemsize}") == 256**x.itemsize - 1).any(), "an output was not written"

    def token_stats(self):
        dtype = int(self.rng.integers(4))
        storage = (np.float32, np.uint16, np.float16, np.float64)[dtype]
        real = np.float64 if dtype == 3 else np.float32
        outer, inner = int(self.rng.integers(0, 4)), int(self.rng.integers(0, 4))
        vocab = self.pick(int(self.rng.integers(1, 70)), int(self.rng.integers(2040, 2060)), 4099)
        if self.rng.random() < 0.05:  # beyond the caches, which mostly masked rows make cheap; enough for three threads
            outer, inner, vocab = 1, 2**23 // (1030 * np.dtype(storage).itemsize) + 1, 1030 + int(self.rng.integers(3))
        n, masked = outer * inner, outer * inner > 100 or self.rng.random() < 0.5
        logits, ref = (self.rows(outer, inner, vocab, storage) for _ in range(2))
        ref = self.pick(ref, (0, 1, 0, 0))
        mask = self.array(n, bool, self.rng.random(n) < (0.05 if n > 100 else 0.7)) if masked else 0
        actions = self.rng.integers(0, vocab, n)
        actions[self.rng.random(n) < 0.1] = self.pick(-1, vocab, 2**62, -(2**62))
        shared = logits, ref, self.array(n, np.int64, actions), mask
        shared += (
            self.pick(0, self.array(n, np.float64, self.rng.uniform(0.3, 3, n))),
            0.7,
            self.pick(0.0, 5.0),
            n,
            vocab,
        )
        shared += (dtype, int(self.rng.integers(1, 4)))
        count = 10 if ref[0] else 5
        stats = self.outputs(count, n, real) + [0] * (10 - count)
        self.cpu.token_stats_fwd(*shared, stats)
        self.written(count)
        upstream = [self.pick(0, self.array(n, real)) for _ in range(4)]
        if not ref[0]:
            upstream[3] = 0
        halved = dtype == 0 and self.pick(True, False)  # a bfloat16 gradient of float logits
        gradient = self.outputs(1, n * vocab, np.uint16 if halved else storage)
        self.cpu.token_stats_bwd(*shared, stats, upstream, *gradient, halved)
        self.written(1)

    def sequences(self):
        lengths = self.rng.integers(0, self.pick(3, 40), self.rng.integers(0, 6))
        if self.rng.random() < 0.1:  # enough for threads
            lengths = np.full(60, 700)
        return int(lengths.sum()), len(lengths), self.array(len(lengths) + 1, np.int64, np.cumsum([0, *lengths]))

    def soft_bellman(self):
        name, real = self.pick(("f32", np.float32), ("f64", np.float64))
        n, b, boundaries = self.sequences()
        options = 0.3, 0.9, self.pick(0.0, 0.5, 1.0), int(self.rng.integers(3)), self.pick(True, False)
        options += int(self.rng.integers(5)), self.pick(1.0, np.inf), self.pick(-0.5, -np.inf)
        mask = self.pick(0, self.array(n, bool, self.rng.random(n) < 0.7))
        threads = int(self.rng.integers(1, 4))
        optional = [self.pick(0, self.array(size, real)) for size in (n, b, n)]
        inputs = [self.array(n, real) for _ in range(4)]
        out = self.outputs(7, n, real)
        forward, backward = (getattr(self.cpu, f"soft_bellman_{way}_{name}") for way in ("fwd", "bwd_residual"))
        forward(inputs, boundaries, n, b, mask, *optional, options, threads, out)
        self.written(7)
        upstream = self.array(n, real), out[5]
        backward(
            *upstream, boundaries, n, b, mask, options, threads, [*self.outputs(2, n, real), *self.outputs(1, b, real)]
        )
        self.written(3)

    def lambda_return(self):
        name, real = self.pick(("f32", np.float32), ("f64", np.float64))
        n, b, boundaries = self.sequences()
        rows = [self.array(size, real) for size in (n, n, b)]
        forward, backward = (getattr(self.cpu, f"lambda_return_{way}_{name}") for way in ("fwd", "bwd"))
        forward(*rows, boundaries, *self.outputs(1, n, real), n, b, 0.9, 0.5)
        self.written(1)
        backward(rows[0], boundaries, *self.outputs(2, n, real), *self.outputs(1, b, real), n, b, 0.9, 0.5)
        self.written(3)

    def read_sum(self):
        count = int(self.rng.integers(1, 300_000))
        data = self.array(count, np.float32, 1)
        self.cpu.read_sum(data, count, int(self.rng.integers(1, 4)), *self.outputs(1, -(-count // 65_536), np.float64))
        assert self.alive[-1].sum() == count

    def run(self, cases):
        for case in range(cases):
            self.cpu.use_instruction_set(self.pick(*self.cpu.instruction_sets()))
            self.cpu.use_openmp(self.pick(0, self.openmp))
            self.pick(self.token_stats, self.token_stats, self.soft_bellman, self.lambda_return)()
            if case % 50 == 0:
                self.read_sum()
            self.alive.clear()
        try:
            self.cpu.use_instruction_set("none")
        except ValueError:
            print(f"ran {cases} cases")


def main(mode, path, *arguments):
    cpu = load(path)
    if mode == "fuzz":
        return Fuzz(cpu, int(arguments[1])).run(int(arguments[0]))
    fuzz = Fuzz(cpu, 0)
    logits, stats = fuzz.array(70, np.float32), [*fuzz.outputs(5, 2, np.float32), 0, 0, 0, 0, 0]
    actions = np.zeros(3, np.int64)
    rows = (logits, 2, 0, 35), (0, 1, 0, 0), actions.ctypes.data + (mode == "misaligned"), 0, 0, 1.0, 0.0, 2, 35, 0, 1
    cpu.token_stats_fwd(*rows, stats)
    gradient = fuzz.array(69, np.float32, 0)  # one too few
    cpu.token_stats_bwd(*rows, stats, [0, 0, stats[0], 0], gradient, False)
    print("unnoticed")


if __name__ == "__main__":
    main(*sys.argv[1:])
