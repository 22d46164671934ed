"""soft_bellman in C++ on the CPU; csrc/cpu/soft_bellman.h."""

from __future__ import annotations

import torch
from torch import Tensor

import dqo_kernels._cpu as _cpu
import dqo_kernels.core.cpu_threads  # noqa: F401  (hands torch's threads to the kernels)
from dqo_kernels.core.addresses import address, addresses, encoded


def _kernel(direction: str, dtype: torch.dtype):
    return getattr(_cpu, f"soft_bellman_{direction}_{'f64' if dtype == torch.float64 else 'f32'}")


def fwd(
    logprobs, ref_logprobs, rewards, values, cu_seqlens, mask, behavior_logprobs, bootstrap, target_values, options
) -> tuple[Tensor, ...]:
    """(policy_loss, value_loss, returns, advantages, weights, policy_grad, value_grad), (N,) each."""
    out = tuple(torch.empty_like(logprobs) for _ in range(7))
    inputs = addresses(logprobs, ref_logprobs, rewards, values)
    optional = addresses(mask, behavior_logprobs, bootstrap, target_values)
    sizes = (cu_seqlens.data_ptr(), logprobs.numel(), cu_seqlens.numel() - 1)
    threads = torch.get_num_threads()
    _kernel("fwd", logprobs.dtype)(inputs, *sizes, *optional, encoded(options), threads, addresses(*out))
    return out


def bwd_residual(cotangent, policy_grad, cu_seqlens, mask, options) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of logprobs (N,), values (N,) and bootstrap (B,)."""
    sequences = cu_seqlens.numel() - 1
    out = torch.empty_like(cotangent), torch.empty_like(cotangent), cotangent.new_empty(sequences)
    sizes = (cu_seqlens.data_ptr(), cotangent.numel(), sequences)
    arguments = (cotangent.data_ptr(), policy_grad.data_ptr(), *sizes, address(mask), encoded(options))
    _kernel("bwd_residual", cotangent.dtype)(*arguments, torch.get_num_threads(), addresses(*out))
    return out
