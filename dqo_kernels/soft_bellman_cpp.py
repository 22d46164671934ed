"""soft_bellman in C++ on the CPU; csrc/cpu/soft_bellman.h."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import dqo_kernels._cpu as _cpu
import dqo_kernels.cpu_threads  # noqa: F401  (hands torch's threads to the kernels)

# The numbers of the enumerations in csrc/common/soft_bellman.h.
_POLICY_TARGETS = {"return": 0, "td": 1, "one_step": 2}
_IS_LEVELS = {"trajectory": 0, "suffix": 1, "prefix": 2, "token": 3, "none": 4}


def _kernel(direction: str, dtype: torch.dtype):
    return getattr(_cpu, f"soft_bellman_{direction}_{'f64' if dtype == torch.float64 else 'f32'}")


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _options(beta, gamma, lam, policy_target, target="residual", is_level="none", is_cap=None, is_floor=None):
    cap = math.inf if is_cap is None else is_cap
    floor = -math.inf if is_floor is None else is_floor
    return beta, gamma, lam, _POLICY_TARGETS[policy_target], target == "residual", _IS_LEVELS[is_level], cap, floor


def fwd(
    logprobs, ref_logprobs, rewards, values, cu_seqlens, mask, behavior_logprobs, bootstrap, target_values, *options
) -> tuple[Tensor, ...]:
    """(policy_loss, value_loss, returns, advantages, weights, policy_grad, value_grad), (N,) each."""
    out = tuple(torch.empty_like(logprobs) for _ in range(7))
    inputs = [x.data_ptr() for x in (logprobs, ref_logprobs, rewards, values)]
    optional = map(_address, (mask, behavior_logprobs, bootstrap, target_values))
    sizes = (cu_seqlens.data_ptr(), logprobs.numel(), cu_seqlens.numel() - 1)
    addresses = [x.data_ptr() for x in out]
    _kernel("fwd", logprobs.dtype)(inputs, *sizes, *optional, _options(*options), torch.get_num_threads(), addresses)
    return out


def bwd_residual(cotangent, policy_grad, cu_seqlens, mask, *options) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of logprobs (N,), values (N,) and bootstrap (B,); `options` are beta, gamma, lam, policy_target."""
    sequences = cu_seqlens.numel() - 1
    out = torch.empty_like(cotangent), torch.empty_like(cotangent), cotangent.new_empty(sequences)
    sizes = (cu_seqlens.data_ptr(), cotangent.numel(), sequences)
    arguments = (cotangent.data_ptr(), policy_grad.data_ptr(), *sizes, _address(mask), _options(*options))
    _kernel("bwd_residual", cotangent.dtype)(*arguments, torch.get_num_threads(), [x.data_ptr() for x in out])
    return out
