"""What a result must be read with: the device, the versions, the commit, and how much of each benchmark was asked for."""

from __future__ import annotations

import datetime
import functools
import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

SIZES = ("smoke", "default", "full")
PACKAGES = ("torch", "triton", "liger-kernel", "trl", "torchrl", "cut-cross-entropy")


def size() -> str:
    """DQO_BENCH: "smoke" (does it run), "default" (under five minutes on two cores) or "full"."""
    asked = os.environ.get("DQO_BENCH", "default")
    if asked not in SIZES:
        raise ValueError(f"DQO_BENCH: expected one of {', '.join(SIZES)}, got {asked!r}")
    return asked


def device() -> torch.device:
    """DQO_BENCH_DEVICE, else the GPU where there is one."""
    asked = os.environ.get("DQO_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(asked)


@functools.cache
def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@functools.cache
def commit() -> str:
    """Short hash, with "+" when tracked files differ from it; results and tables do not count."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True).stdout.strip()

    head = git("rev-parse", "--short", "HEAD")
    if not head:  # a copy without its history: the caller may know
        return os.environ.get("DQO_COMMIT", "unknown")
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results", ":!/benchmarks/*.md"
    )
    return head + ("+" if changed else "")


MEASURED = (("dqo_kernels", "**/*.py"), ("dqo", "**/*.py"), ("csrc", "**/*.*"), ("benchmarks", "**/*.py"))
TESTS = (("tests", "**/*.py"), (".", "pyproject.toml"))


def sources(of: tuple[tuple[str, str], ...] = MEASURED) -> str:
    """A hash of what a measurement (or a test) depends on, to go on after an interruption: a commit does not tell edits apart."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for folder, pattern in of:
        for path in sorted((root / folder).glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def today() -> str:
    return datetime.date.today().isoformat()


@functools.cache
def version(package: str) -> str | None:
    try:
        return torch.__version__ if package == "torch" else metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe(device: torch.device) -> dict:
    """The head of a results file."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := version(name))},
        "commit": commit(),
        "date": today(),
        "size": size(),
    }
