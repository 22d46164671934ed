"""soft_bellman in CUDA C++; csrc/cuda/soft_bellman.h."""

from __future__ import annotations

import torch
from torch import Tensor

import dqo_kernels._cuda as _cuda
from dqo_kernels.core.addresses import address, addresses, encoded, where


def fwd(
    logprobs, ref_logprobs, rewards, values, cu_seqlens, mask, behavior_logprobs, bootstrap, target_values, options
) -> tuple[Tensor, ...]:
    """(policy_loss, value_loss, returns, advantages, weights, policy_grad, value_grad), (N,) each."""
    out = tuple(torch.empty_like(logprobs) for _ in range(7))
    inputs = (logprobs, ref_logprobs, rewards, values, mask, behavior_logprobs, bootstrap, target_values)
    pack = cu_seqlens.data_ptr(), logprobs.numel(), cu_seqlens.numel() - 1
    _cuda.soft_bellman_fwd(where(logprobs), addresses(*inputs), pack, encoded(options), addresses(*out))
    return out


def bwd_residual(cotangent, policy_grad, cu_seqlens, mask, options) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of logprobs (N,), values (N,) and bootstrap (B,)."""
    sequences = cu_seqlens.numel() - 1
    out = torch.empty_like(cotangent), torch.empty_like(cotangent), cotangent.new_empty(sequences)
    pack = cu_seqlens.data_ptr(), cotangent.numel(), sequences
    arguments = (cotangent.data_ptr(), policy_grad.data_ptr(), address(mask), pack, encoded(options))
    _cuda.soft_bellman_bwd_residual(where(cotangent), *arguments, addresses(*out))
    return out
