"""Which backends a test runs on: those of the CPU; what cannot run is skipped with its reason."""

import pytest
import torch

from dqo_kernels.core import dispatch


def backends(op: str, dtype: torch.dtype = torch.float64) -> list:
    """pytest parameters for the backends of `op` that take this dtype on the CPU."""
    params = []
    for name in dispatch.TABLE[op]["cpu"]:
        reason = dispatch.unavailable(name, "cpu", dtype)
        if reason is None or dispatch.unavailable(name) is not None:  # a dtype that a backend does not take is no skip
            params.append(pytest.param(name, marks=[pytest.mark.skip(reason=reason)] if reason else []))
    return params
