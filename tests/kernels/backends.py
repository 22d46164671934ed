"""Which backends a test runs on: those of the CPU; what cannot run is skipped with its reason."""

import pytest

from dqo_kernels import dispatch


def backends(op: str) -> list:
    """pytest parameters for the backends of `op` on the CPU."""
    params = []
    for name in dispatch.TABLE[op]["cpu"]:
        reason = dispatch.unavailable(name)
        params.append(pytest.param(name, marks=[pytest.mark.skip(reason=reason)] if reason else []))
    return params
