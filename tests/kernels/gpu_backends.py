"""The backends that are written for GPUs: on a GPU where there is one, else Triton's interpreter and the emulation of CUDA."""

import importlib

import pytest
import torch

from dqo_kernels.core import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("triton", "cuda")


def on_device(*xs):
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in xs]


def launchers(op: str, backend: str):
    """dqo_kernels.<op>_<backend>, or a skip with the reason why it cannot run."""
    reason = dispatch.unavailable(backend, DEVICE)
    if reason:
        pytest.skip(reason)
    return importlib.import_module(f"dqo_kernels.{op}_{backend}")
