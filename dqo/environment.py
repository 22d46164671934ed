"""What a report of a bug must say of the machine, a line each: versions, devices, kernels, caches, variables."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import dqo
from dqo.errors import printable

PACKAGES: tuple[str, ...] = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "safetensors",
    "huggingface-hub",
    "numpy",
)
EXTRAS: tuple[str, ...] = (
    "flash-attn",
    "kernels",
    "vllm",
    "math-verify",
    "bitsandbytes",
    "datasets",
    "pyarrow",
    "tyro",
)
EXTRAS += ("tensorboard", "wandb", "trackio")
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")
_VARIABLES: tuple[str, ...] = (
    "CUDA_",
    "TRITON_",
    "HF_",
    "HUGGINGFACE_",
    "TRANSFORMERS_",
    "TORCH_",
    "PYTORCH_",
    "NCCL_",
    "OMP_",
    "MKL_",
    "DQO_",
)
_VARIABLES += ("ACCELERATE_", "FSDP_", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LD_PRELOAD")
_SECRET = ("TOKEN", "KEY", "SECRET", "PASS", "CREDENTIAL", "AUTH")
_OF_A_USER = re.compile(r"(?<=://)[^/\s@]+@")  # a name and a password in an address


def version_line() -> str:
    """ "dqo 0.1.0", and the commit where it was installed from git, or runs in a checkout."""
    commit = _commit()
    return f"dqo {dqo.__version__}" + (f" ({commit})" if commit else "")


def env() -> dict[str, str]:
    """{"torch": "2.13.0", ...}: the facts on which a fault may depend. Nothing secret is among them."""
    facts = {
        "dqo": version_line().removeprefix("dqo "),
        "python": f"{platform.python_version()} on {platform.platform()}",
    }
    facts |= {name: _version(name) or "not installed" for name in PACKAGES}
    optional = {name: _version(name) for name in EXTRAS}
    facts["also installed"] = ", ".join(f"{name} {found}" for name, found in optional.items() if found) or "none"
    facts["not installed"] = ", ".join(name for name, found in optional.items() if not found) or "none"
    facts["cpu"] = _cpu()
    try:
        facts |= dict(_of_torch())
    except Exception as error:  # a broken torch is what this is read for
        facts["torch"] += f"; it cannot be used: {_one_line(error)}"
    facts["caches"] = ", ".join(f"{name} {path}" for name, path in _caches())
    named = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)}
    shown = {n: "(set)" if any(part in n for part in _SECRET) else value for n, value in named.items()}
    facts["variables"] = ", ".join(f"{name}={value}" for name, value in shown.items()) or "none"
    return {name: printable(_OF_A_USER.sub("(set)@", " ".join(value.split()))) for name, value in facts.items()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _commit() -> str | None:
    """As pip noted it, or as git says of the folder that the package is in."""
    root = Path(dqo.__file__).parents[1]
    if (root / ".git").exists():
        try:
            found = subprocess.run(
                ["git", "-C", str(root), "describe", "--always", "--dirty=, changed", "--abbrev=12", "--exclude=*"],
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.SubprocessError):  # no git
            return None
        return f"commit {found.stdout.strip()}" if found.returncode == 0 else None
    try:
        told = json.loads(metadata.distribution("dqo").read_text("direct_url.json") or "{}")
        return f"commit {told['vcs_info']['commit_id'][:12]} of {told['url']}"
    except (metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return None


def _cpu() -> str:
    flags: set[str] = set()
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags |= set(value.split())
            elif key.strip() == "model name":
                name = value.strip()
    except OSError:  # not Linux
        pass
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = ""
    if "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB"
    features = " ".join(feature for feature in _CPU_FEATURES if feature in flags)
    return f"{name}, {usable} of {os.cpu_count()} cores{memory}" + (f", {features}" if features else "")


def _of_torch() -> Iterator[tuple[str, str]]:
    import torch

    from dqo_kernels.__main__ import CHECKS, backends, devices, verdict
    from dqo_kernels.core import dispatch

    yield "torch", torch.__version__  # of PyPI's build the metadata say 2.14.1, itself 2.14.1+cu130
    yield "torch was built for", f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    for i in range(torch.cuda.device_count()):
        its = torch.cuda.get_device_properties(i)
        yield f"cuda:{i}", f"{its.name}, {its.total_memory / 1e9:.0f} GB, compute capability {its.major}.{its.minor}"
    if not torch.cuda.is_available():
        yield "cuda", "torch finds no device"
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    yield "torch on the CPU", f"{capability}, {threads} threads"
    yield "compiled", ", ".join(_compiled(name, getattr(dispatch, name)) for name in ("_cpu", "_cuda"))
    for device in devices():
        for backend in dispatch.BACKENDS:
            checks = [name for name in CHECKS if backend in backends(name, device)]
            if not checks:
                continue
            if reason := dispatch.unavailable(backend, device):
                yield f"kernels {backend} on {device}", f"no: {reason}"
                continue
            wrong = [
                f"{name} {found}" for name in checks for good, found in [verdict(name, backend, device)] if not good
            ]
            told = f"fails its self-check: {'; '.join(wrong)}" if wrong else "works"
            yield f"kernels {backend} on {device}", told


def _compiled(name: str, extension: ModuleType | None) -> str:
    if extension is None:
        return f"{name} no"
    return f"{name} {extension.instruction_set()}" if hasattr(extension, "instruction_set") else f"{name} yes"


def _caches() -> Iterator[tuple[str, str]]:
    home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    hub = os.environ.get("HF_HUB_CACHE") or os.path.join(os.environ.get("HF_HOME", f"{home}/huggingface"), "hub")
    yield "hub", os.path.expanduser(hub)
    yield "triton", os.path.expanduser(os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache"))
    yield "torch extensions", os.path.expanduser(os.environ.get("TORCH_EXTENSIONS_DIR", f"{home}/torch_extensions"))
