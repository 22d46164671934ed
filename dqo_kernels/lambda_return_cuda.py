"""lambda_return in CUDA C++; csrc/cuda/lambda_return.h."""

from __future__ import annotations

import torch
from torch import Tensor

import dqo_kernels._cuda as _cuda
from dqo_kernels.core.addresses import addresses, where


def _pack(cu_seqlens: Tensor, rows: int) -> tuple[int, int, int]:
    return cu_seqlens.data_ptr(), rows, cu_seqlens.numel() - 1


def fwd(rewards, values, bootstrap, cu_seqlens, gamma, lam) -> Tensor:
    """(N,) returns."""
    returns = torch.empty_like(rewards)
    arrays = addresses(rewards, values, bootstrap, returns)
    _cuda.lambda_return_fwd(where(rewards), arrays, _pack(cu_seqlens, rewards.numel()), gamma, lam)
    return returns


def bwd(grad_returns, cu_seqlens, gamma, lam) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rewards (N,), values (N,) and bootstrap (B,)."""
    sequences = cu_seqlens.numel() - 1
    gradients = torch.empty_like(grad_returns), torch.empty_like(grad_returns), grad_returns.new_empty(sequences)
    arrays = addresses(grad_returns, *gradients)
    _cuda.lambda_return_bwd(where(grad_returns), arrays, _pack(cu_seqlens, grad_returns.numel()), gamma, lam)
    return gradients
