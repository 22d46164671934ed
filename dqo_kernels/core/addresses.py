"""How tensors are handed to the compiled extensions: as addresses and strides. An address of 0 is an absent array."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dqo_kernels.core.bellman_options import BellmanOptions

ABSENT = (0, 1, 0, 0)
# The numbers of the enumerations in csrc: Dtype, PolicyTarget, IsLevel.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_POLICY_TARGETS = {"return": 0, "td": 1, "one_step": 2}
_IS_LEVELS = {"trajectory": 0, "suffix": 1, "prefix": 2, "token": 3, "none": 4}


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def addresses(*tensors: Tensor | None) -> list[int]:
    return [address(x) for x in tensors]


def rows(x: Tensor | None) -> tuple[int, int, int, int]:
    """Address, and where row i starts: (i // inner) * outer_stride + (i % inner) * inner_stride."""
    if x is None:
        return ABSENT
    inner, outer_stride = (x.shape[1], x.stride(0)) if x.dim() == 3 else (max(x.shape[0], 1), 0)
    return x.data_ptr(), max(inner, 1), outer_stride, x.stride(-2)


def encoded(options: BellmanOptions) -> tuple[float, float, float, int, bool, int, float, float]:
    """SoftBellmanOptions of csrc/common/soft_bellman.h."""
    beta, gamma, lam, policy_target, target, is_level, is_cap, is_floor = options
    cap = math.inf if is_cap is None else is_cap
    floor = -math.inf if is_floor is None else is_floor
    return beta, gamma, lam, _POLICY_TARGETS[policy_target], target == "residual", _IS_LEVELS[is_level], cap, floor


def where(x: Tensor) -> tuple[int, int]:
    """The CUDA device of x and the stream that its work goes to."""
    if x.device.type != "cuda":  # the tests' emulation, which has neither
        return 0, 0
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream
