"""Triton backend of lambda_return: launchers on plain tensors, no autograd, no checks (lambda_return.py has both).

One program per sequence walks over tiles of fixed size with a carry, backward in time for the returns, forward for the
gradients; equations in lambda_return.py. A sequence's bits do not depend on the batch around it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqo_kernels.core.scan_triton import BLOCK, OPTIONS, last_of, linear_scan, run, times


@triton.jit
def lambda_return_forward(
    rewards_ptr, values_ptr, bootstrap_ptr, cu_seqlens_ptr, returns_ptr, bridge, decay, BLOCK: tl.constexpr,
):  # fmt: skip
    """bridge = gamma*(1-lam), decay = gamma*lam."""
    sequence = tl.program_id(0)
    start, end = tl.load(cu_seqlens_ptr + sequence), tl.load(cu_seqlens_ptr + sequence + 1)
    length = (end - start).to(tl.int32)
    bootstrap = tl.load(bootstrap_ptr + sequence)
    carry = bootstrap
    for first in range(0, length, BLOCK):
        i = first + tl.arange(0, BLOCK)  # counts back from the last row
        row = end - 1 - i
        inside = i < length
        reward = tl.load(rewards_ptr + row, mask=inside, other=0.0)
        next_value = tl.load(values_ptr + row + 1, mask=inside & (i > 0), other=0.0)
        next_value = tl.where(i == 0, bootstrap, next_value)
        returns = linear_scan(tl.zeros_like(reward) + decay, reward + times(bridge, next_value), carry)
        carry = last_of(returns, BLOCK)
        tl.store(returns_ptr + row, returns, mask=inside)


@triton.jit
def lambda_return_backward(
    grad_ptr, cu_seqlens_ptr, grad_rewards_ptr, grad_values_ptr, grad_bootstrap_ptr, gamma, bridge, decay,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Element i gets the adjoint of row i-1; i = length, after the last row, is the bootstrap's place."""
    sequence = tl.program_id(0)
    start, end = tl.load(cu_seqlens_ptr + sequence), tl.load(cu_seqlens_ptr + sequence + 1)
    length = (end - start).to(tl.int32)
    carry = tl.full((), 0.0, tl.float32)
    for first in range(0, length + 1, BLOCK):
        i = first + tl.arange(0, BLOCK)
        row = start + i
        inside = i < length
        previous = (i > 0) & (i <= length)
        grad_before = tl.load(grad_ptr + row - 1, mask=previous, other=0.0)
        grad = tl.load(grad_ptr + row, mask=inside, other=0.0)
        before = linear_scan(tl.where(previous, tl.zeros_like(grad) + decay, 1.0), grad_before, carry)
        carry = last_of(before, BLOCK)
        tl.store(grad_rewards_ptr + row, grad + times(decay, before), mask=inside)
        tl.store(grad_values_ptr + row, times(bridge, before), mask=inside)
        tl.store(grad_bootstrap_ptr + sequence + 0 * i, times(gamma, before), mask=i == length)


def _launch(kernel, gamma: float, lam: float, arguments: dict):
    """(kernel, grid, arguments, options)."""
    arguments |= {"bridge": float(gamma * (1.0 - lam)), "decay": float(gamma * lam), "BLOCK": BLOCK}
    return kernel, arguments["cu_seqlens_ptr"].numel() - 1, arguments, OPTIONS


def forward_launch(rewards, values, bootstrap, cu_seqlens, gamma, lam):
    returns = torch.empty_like(rewards)
    given = {"rewards_ptr": rewards, "values_ptr": values, "bootstrap_ptr": bootstrap, "cu_seqlens_ptr": cu_seqlens}
    return returns, _launch(lambda_return_forward, gamma, lam, given | {"returns_ptr": returns})


def backward_launch(grad_returns, cu_seqlens, gamma, lam):
    grads = [torch.empty_like(grad_returns) for _ in range(2)] + [grad_returns.new_empty(cu_seqlens.numel() - 1)]
    names = ("grad_rewards_ptr", "grad_values_ptr", "grad_bootstrap_ptr")
    given = {"grad_ptr": grad_returns, "cu_seqlens_ptr": cu_seqlens} | dict(zip(names, grads, strict=True))
    return tuple(grads), _launch(lambda_return_backward, gamma, lam, given | {"gamma": float(gamma)})


def fwd(rewards, values, bootstrap, cu_seqlens, gamma, lam) -> Tensor:
    """Returns (N,)."""
    returns, launch = forward_launch(rewards, values, bootstrap, cu_seqlens, gamma, lam)
    run(launch)
    return returns


def bwd(grad_returns, cu_seqlens, gamma, lam) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in rewards, values and bootstrap."""
    grads, launch = backward_launch(grad_returns, cu_seqlens, gamma, lam)
    run(launch)
    return grads


def specialisations():
    """Every launch that can be made, for compiling them ahead of time."""
    rows, sequences = (torch.empty(n, device="meta") for n in (16, 3))
    cu_seqlens = torch.empty(4, dtype=torch.int64, device="meta")
    yield forward_launch(rows, rows, sequences, cu_seqlens, 1.0, 0.5)[1]
    yield backward_launch(rows, cu_seqlens, 1.0, 0.5)[1]
