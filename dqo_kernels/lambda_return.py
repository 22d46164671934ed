"""lambda_return: the varlen reverse scan.

    G_t = r_t + gamma * ((1 - lam) * V_{t+1} + lam * G_{t+1}),   V_{T+1} = G_{T+1} = bootstrap of the sequence

Backward, forward in time with g_t the gradient at G_t:  a_t = g_t + gamma*lam*a_{t-1};  dr_t = a_t;
dV_{t+1} = gamma*(1-lam)*a_t;  dbootstrap = gamma*a_T.  Backends: reference, cpp, triton, cuda.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqo_kernels.core import checks, dispatch, library
from dqo_kernels.core.packed import compute_dtype, is_last_row, next_row, reverse_scan, sequence_index, times


def lambda_return_reference(
    rewards: Tensor,  # (N,)
    values: Tensor,  # (N,)
    bootstrap: Tensor,  # (B,)
    sequence: Tensor,  # (N,)
    gamma: float | Tensor,  # (N,) of each row, or one number
    lam: float,
) -> Tensor:
    """The definition, in differentiable torch."""
    after_last = is_last_row(sequence)
    own = rewards + times(gamma * (1.0 - lam), next_row(values, sequence, bootstrap))
    own = torch.where(after_last, own + times(gamma * lam, bootstrap[sequence]), own)
    return reverse_scan(own, gamma * lam, sequence)


_FORWARD = library.Operation(
    "lambda_return(Tensor rewards, Tensor values, Tensor bootstrap, Tensor cu_seqlens, float gamma, float lam, str backend)"
    " -> Tensor",
    lambda *arguments: library.run("lambda_return", "fwd", arguments[-1], *arguments[:-1]),
    lambda rewards, *_: torch.empty_like(rewards),
)
_BACKWARD = library.Operation(
    "lambda_return_backward(Tensor grad_returns, Tensor cu_seqlens, float gamma, float lam, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    lambda *arguments: library.run("lambda_return", "bwd", arguments[-1], *arguments[:-1]),
    lambda grad_returns, cu_seqlens, *_: (
        torch.empty_like(grad_returns),
        torch.empty_like(grad_returns),
        grad_returns.new_empty(cu_seqlens.shape[0] - 1),
    ),
)


def _save(ctx, inputs, output):
    _, _, _, cu_seqlens, ctx.gamma, ctx.lam, ctx.backend = inputs
    ctx.save_for_backward(cu_seqlens)


def _gradient(ctx, grad_returns):
    (cu_seqlens,) = ctx.saved_tensors
    if grad_returns is None:
        return _FORWARD.gradients()
    made = _BACKWARD(grad_returns.contiguous(), cu_seqlens, ctx.gamma, ctx.lam, ctx.backend)
    return _FORWARD.gradients(**dict(zip(("rewards", "values", "bootstrap"), made)))


_FORWARD.differentiable(_save, _gradient)
_BACKWARD.differentiable_once()


def lambda_return(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    bootstrap: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """lambda-returns of packed sequences (arXiv 2410.09302 section 4.2).

    Args:
        rewards: (N,) floating; `rewards[t]` is paid for the action of row t.
        values: (N,) floating; `values[t] = V(s_t)`, the state before that action.
        cu_seqlens: (B+1,) integer boundaries; empty sequences are allowed.
        gamma, lam: in [0, 1].
        bootstrap: (B,) floating, V(s_{T+1}) of each sequence; 0 (a terminal state) when None.
        backend: "reference", "cpp", "triton", "cuda", or None for the best that can run.

    Returns:
        (N,) float32, or float64 when an input is float64. Differentiable in rewards, values and bootstrap.

    Raises:
        ValueError: shapes, dtypes, devices, boundaries or numbers that do not fit, each named.
        RuntimeError: the requested backend cannot run.
    """
    checks.floating("rewards", rewards)
    checks.rows_only("rewards", rewards, "(N,)", 1)
    n = rewards.shape[0]
    checks.tensor("values", values, (n,), rewards)
    checks.cu_seqlens(cu_seqlens, n, rewards)
    checks.unit_interval("gamma", gamma)
    checks.unit_interval("lam", lam)
    sequences = cu_seqlens.numel() - 1
    if bootstrap is not None:
        checks.tensor("bootstrap", bootstrap, (sequences,), rewards, "(one a sequence)")

    dtype = compute_dtype(rewards, values, bootstrap)
    chosen = dispatch.choose("lambda_return", rewards.device.type, backend, dtype)
    rewards, values = rewards.to(dtype), values.to(dtype)
    cu_seqlens = checks.owned_index(cu_seqlens)
    bootstrap = rewards.new_zeros(sequences) if bootstrap is None else bootstrap.to(dtype)
    if chosen == "reference":
        return lambda_return_reference(rewards, values, bootstrap, sequence_index(cu_seqlens, n), gamma, lam)
    tensors = (x.contiguous() for x in (rewards, values, bootstrap, cu_seqlens))
    return _FORWARD(*tensors, float(gamma), float(lam), chosen)
