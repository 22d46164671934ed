"""Which backend runs an operation: one table, one `choose`. An explicit request that cannot be met raises with the reason."""

from __future__ import annotations

import os

try:
    import dqo_kernels._cpu as _cpu  # this form tells a missing module from a broken one, `from ... import` does not
except ModuleNotFoundError:  # not built; an extension that is there but broken must be heard
    _cpu = None

BACKENDS = ("reference", "cpp")

# Per operation and device type, the best first.
TABLE = {
    "token_stats": {"cpu": ("reference",), "cuda": ("reference",)},
    "linear_token_stats": {"cpu": ("reference",), "cuda": ("reference",)},
    "lambda_return": {"cpu": ("cpp", "reference"), "cuda": ("reference",)},
    "soft_bellman": {"cpu": ("reference",), "cuda": ("reference",)},
    "linear_row_loss": {"cpu": ("reference",), "cuda": ("reference",)},
}


def unavailable(backend: str) -> str | None:
    """Why `backend` cannot run on this machine, or None when it can."""
    if backend == "cpp" and _cpu is None:
        return "dqo_kernels._cpu is not built; run `pip install -e .` where a C++17 compiler is"
    return None


def choose(op: str, device_type: str, backend: str | None = None) -> str:
    """The backend that runs `op` on a device.

    `backend`, else the environment variable DQO_KERNELS_BACKEND, insists; without either the table decides.
    Raises ValueError for an unknown name and RuntimeError when the one insisted on cannot run.
    """
    candidates = TABLE[op].get(device_type, ("reference",))
    asked = backend or os.environ.get("DQO_KERNELS_BACKEND")
    if asked is None:
        return next(name for name in candidates if unavailable(name) is None)
    if asked not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {asked!r}")
    if asked not in candidates:
        raise RuntimeError(
            f"backend {asked!r} has no {op} for device {device_type!r}; it can run on: {', '.join(candidates)}"
        )
    reason = unavailable(asked)
    if reason is not None:
        raise RuntimeError(f"backend {asked!r} cannot run {op}: {reason}")
    return asked
