"""lambda_return in C++ on the CPU; csrc/cpu/lambda_return.h."""

from __future__ import annotations

import torch
from torch import Tensor

import dqo_kernels._cpu as _cpu
from dqo_kernels.core.addresses import addresses


def _kernel(direction: str, dtype: torch.dtype):
    return getattr(_cpu, f"lambda_return_{direction}_{'f64' if dtype == torch.float64 else 'f32'}")


def fwd(rewards, values, bootstrap, cu_seqlens, gamma, lam) -> Tensor:
    """(N,) returns."""
    returns = torch.empty_like(rewards)
    tensors = (rewards, values, bootstrap, cu_seqlens, returns)
    _kernel("fwd", rewards.dtype)(*addresses(*tensors), rewards.numel(), cu_seqlens.numel() - 1, gamma, lam)
    return returns


def bwd(grad_returns, cu_seqlens, gamma, lam) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rewards (N,), values (N,) and bootstrap (B,)."""
    sequences = cu_seqlens.numel() - 1
    gradients = torch.empty_like(grad_returns), torch.empty_like(grad_returns), grad_returns.new_empty(sequences)
    tensors = (grad_returns, cu_seqlens, *gradients)
    _kernel("bwd", grad_returns.dtype)(*addresses(*tensors), grad_returns.numel(), sequences, gamma, lam)
    return gradients
