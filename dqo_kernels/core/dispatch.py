"""Which backend runs an operation: one table, one `choose`. An explicit request that cannot be met raises with the reason."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch.autograd import forward_ad

try:
    import dqo_kernels._cpu as _cpu  # this form tells a missing module from a broken one, `from ... import` does not
except ModuleNotFoundError:  # not built; an extension that is there but broken must be heard
    _cpu = None
try:
    import dqo_kernels._cuda as _cuda
except ModuleNotFoundError:
    _cuda = None

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # looked for here: torch.compile refuses to

ONE_PASS = "cuda_one_pass"  # a form of soft_bellman_loss alone, which the argument `backend` must ask for
BACKENDS = ("reference", "cpp", "triton", "cuda", ONE_PASS)

# Per operation and device type, the best first. Triton on the CPU is its interpreter, for tests. On an H200 forward and
# gradient by Triton's kernels are faster where the device has work for milliseconds; below that the CUDA kernels are, which
# Python launches sooner.
_NATIVE = {"cpu": ("cpp", "reference", "triton"), "cuda": ("triton", "cuda", "reference")}
TABLE = {
    "token_stats": _NATIVE,
    "lambda_return": _NATIVE,
    "soft_bellman": _NATIVE,
    "linear_token_stats": _NATIVE,
    "linear_row_loss": _NATIVE,
}

_FLOAT32_ALONE = "its kernels compute in float32; float64 runs in the backend 'reference' (on the CPU in 'cpp' too)"


def triton_interprets() -> bool:
    """Whether Triton's kernels run in its interpreter, which needs TRITON_INTERPRET=1 before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result  # torch.compile does not look into the extension
def _device_problem(backend: str) -> str:
    """Why the current CUDA device cannot run the kernels, or an empty string."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return _cuda.cluster_problem(device) if backend == ONE_PASS else _cuda.problem(device)


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which want every operation to be torch's own."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def unavailable(backend: str, device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> str | None:
    """Why `backend` cannot run on tensors of this device and dtype, or None when it can."""
    if backend != "reference" and transformed():
        return "torch.func and forward-mode derivatives pass through plain torch only: backend='reference'"
    if backend == "cpp" and _cpu is None:
        return "dqo_kernels._cpu is not built; run `pip install -e .` where a C++17 compiler is"
    if backend.startswith("cuda"):
        if _cuda is None:
            return "dqo_kernels._cuda is not built; run `pip install -e .` where CUDA's nvcc is"
        if not any("cuda" in devices.get(device_type, ()) for devices in TABLE.values()):
            return f"it runs on CUDA devices, not on {device_type}"
        if reason := _device_problem(backend):
            return reason
        if dtype == torch.float64:
            return _FLOAT32_ALONE
    if backend == "triton":
        if not _HAS_TRITON:
            return "triton is not installed"
        if device_type == "cpu" and not triton_interprets():
            return "Triton compiles for GPUs; on the CPU set TRITON_INTERPRET=1 before Python starts (slow, for tests)"
        if dtype == torch.float64:
            return _FLOAT32_ALONE
    return None


def choose(op: str, device_type: str, backend: str | None = None, dtype: torch.dtype = torch.float32) -> str:
    """The backend that runs `op` on tensors of a device and dtype.

    `backend`, else the environment variable DQO_KERNELS_BACKEND, insists; without either the table decides.
    Raises ValueError for an unknown name and RuntimeError when the one insisted on cannot run.
    """
    candidates = TABLE[op].get(device_type, ("reference",))
    asked = backend or os.environ.get("DQO_KERNELS_BACKEND")
    if asked is None:
        return next(name for name in candidates if unavailable(name, device_type, dtype) is None)
    if asked not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {asked!r}")
    if asked not in candidates:
        raise RuntimeError(
            f"backend {asked!r} has no {op} for device {device_type!r}; it can run on: {', '.join(candidates)}"
        )
    insist(op, asked, device_type, dtype)
    return asked


def insist(op: str, backend: str, device_type: str, dtype: torch.dtype = torch.float32) -> None:
    """Raises RuntimeError with the reason when the backend that was asked for cannot run."""
    reason = unavailable(backend, device_type, dtype)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run {op}: {reason}")
