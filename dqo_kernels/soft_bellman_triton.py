"""Triton backend of soft_bellman: launchers on plain tensors, no autograd, no checks (soft_bellman.py has both).

One program per sequence, one launch each way. The forward sums the log-ratios of the sequence (float64), then walks backward in
time over tiles: the state (G, V) of the next row that counts comes from a scan, everything else of a row from that state. The
residual form's adjoint is the same kind of scan forward in time. A sequence's bits do not depend on the batch around it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqo_kernels.core.bellman_options import BellmanOptions
from dqo_kernels.core.scan_triton import BLOCK, OPTIONS, last_of, pair_scan, run, times

_LEVELS = ("none", "token", "suffix", "trajectory", "prefix")  # the last two need the sum over the whole sequence
_NONE, _TOKEN, _SUFFIX, _TRAJECTORY, _PREFIX = (tl.constexpr(i) for i in range(5))


@triton.jit
def _counts(mask_ptr, row, inside):
    """Which rows count: those inside whose mask is True."""
    if mask_ptr is not None:
        inside = tl.load(mask_ptr + row, mask=inside, other=0) != 0
    return inside


@triton.jit
def _log_ratio(logprobs_ptr, behavior_ptr, row, valid):
    logprob = tl.load(logprobs_ptr + row, mask=valid, other=0.0)
    return logprob.to(tl.float64) - tl.load(behavior_ptr + row, mask=valid, other=0.0).to(tl.float64)


@triton.jit
def _is_finite(x):
    return x - x == 0.0


@triton.jit
def soft_bellman_forward(
    logprobs_ptr, ref_ptr, rewards_ptr, values_ptr, cu_seqlens_ptr, mask_ptr, behavior_ptr, bootstrap_ptr, baseline_ptr,
    policy_loss_ptr, value_loss_ptr, returns_ptr, advantages_ptr, weights_ptr, policy_grad_ptr, value_grad_ptr,
    beta, gamma, bridge, decay, ahead_value, ahead_return, cap, floor,
    LEVEL: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """bridge = gamma*(1-lam), decay = gamma*lam; Ghat = ahead_value*V + ahead_return*G."""
    sequence = tl.program_id(0)
    start, end = tl.load(cu_seqlens_ptr + sequence), tl.load(cu_seqlens_ptr + sequence + 1)
    length = (end - start).to(tl.int32)

    total = tl.full((), 0.0, tl.float64)
    # A prefix is the total less the rest, which must be finite: infinities and NaN are left out and counted from their row on.
    rises, falls = end, end  # first rows with +inf, with -inf; NaN is both
    if LEVEL >= _TRAJECTORY:
        for first in range(0, length, BLOCK):
            i = first + tl.arange(0, BLOCK)
            row = start + i
            rho = _log_ratio(logprobs_ptr, behavior_ptr, row, _counts(mask_ptr, row, i < length))
            if LEVEL == _PREFIX:
                finite = _is_finite(rho)
                rises = tl.minimum(rises, tl.min(tl.where(finite | (rho < 0.0), end, row), 0))
                falls = tl.minimum(falls, tl.min(tl.where(finite | (rho > 0.0), end, row), 0))
                rho = tl.where(finite, rho, 0.0)
            total += tl.sum(rho, 0)

    y = tl.full((), 0.0, tl.float32)
    if bootstrap_ptr is not None:
        y = tl.load(bootstrap_ptr + sequence)
    v = y
    suffix = tl.full((), 0.0, tl.float64)
    for first in range(0, length, BLOCK):
        i = first + tl.arange(0, BLOCK)  # counts back from the last row
        row = end - 1 - i
        inside = i < length
        valid = _counts(mask_ptr, row, inside)

        after = _counts(mask_ptr, row + 1, inside & (i > 0))
        delta = tl.load(logprobs_ptr + row + 1, mask=after, other=0.0) - tl.load(
            ref_ptr + row + 1, mask=after, other=0.0
        )
        k = tl.load(rewards_ptr + row + 1, mask=after, other=0.0) - beta * delta
        value = tl.load(baseline_ptr + row + 1, mask=after, other=0.0)
        next_return, next_value = pair_scan(after, decay, bridge, k, value, y, v)
        y, v = last_of(next_return, BLOCK), last_of(next_value, BLOCK)

        x = tl.zeros_like(k)
        if LEVEL != _NONE:
            rho = _log_ratio(logprobs_ptr, behavior_ptr, row, valid)
            if LEVEL == _TOKEN:
                x64 = rho
            elif LEVEL == _SUFFIX:
                x64 = suffix + tl.cumsum(rho, 0)
                suffix += tl.sum(rho, 0)
            elif LEVEL == _TRAJECTORY:
                x64 = total + tl.zeros_like(rho)
            else:
                rho = tl.where(_is_finite(rho), rho, 0.0)
                x64 = total - (suffix + tl.cumsum(rho, 0))
                suffix += tl.sum(rho, 0)
                x64 += tl.where(row > rises, float("inf"), 0.0)
                x64 += tl.where(row > falls, float("-inf"), 0.0)
            x = x64.to(tl.float32)
            x = tl.where(x > cap, cap, x)  # NaN stays
            x = tl.where(x < floor, floor, x)
        weight = tl.exp(x)

        delta = tl.load(logprobs_ptr + row, mask=valid, other=0.0) - tl.load(ref_ptr + row, mask=valid, other=0.0)
        reward = tl.load(rewards_ptr + row, mask=valid, other=0.0)
        value = tl.load(values_ptr + row, mask=valid, other=0.0)
        baseline = tl.load(baseline_ptr + row, mask=valid, other=0.0)
        returns = reward - beta * delta + times(bridge, next_value) + times(decay, next_return)
        ahead = times(ahead_value, next_value) + times(ahead_return, next_return)
        advantage = reward + gamma * ahead - baseline
        policy_error, value_error = beta * delta - advantage, value - returns
        policy_grad, value_grad = weight * policy_error, weight * value_error
        tl.store(policy_loss_ptr + row, tl.where(valid, 0.5 * policy_grad * policy_error, 0.0), mask=inside)
        tl.store(value_loss_ptr + row, tl.where(valid, 0.5 * value_grad * value_error, 0.0), mask=inside)
        tl.store(returns_ptr + row, tl.where(valid, returns, 0.0), mask=inside)
        tl.store(advantages_ptr + row, tl.where(valid, advantage, 0.0), mask=inside)
        tl.store(weights_ptr + row, tl.where(valid, weight, 0.0), mask=inside)
        if RESIDUAL:
            value_grad = tl.zeros_like(value_grad)
        else:
            policy_grad = beta * policy_grad
        tl.store(policy_grad_ptr + row, tl.where(valid, policy_grad, 0.0), mask=inside)
        tl.store(value_grad_ptr + row, tl.where(valid, value_grad, 0.0), mask=inside)


@triton.jit
def soft_bellman_residual(
    cotangent_ptr, policy_grad_ptr, cu_seqlens_ptr, mask_ptr, grad_logprobs_ptr, grad_values_ptr, grad_bootstrap_ptr,
    beta, gamma, bridge, decay, ahead_value, ahead_return, BLOCK: tl.constexpr,
):  # fmt: skip
    """With y_t the gradient at the error e_t and A_t that at G_t, both 0 before the first row:
    A_t = decay*A_prev - gamma*ahead_return*y_prev;  dlogprob = beta*(y - A);  dV = y - gamma*ahead_value*y_prev + bridge*A_prev.

    Element i gets the state (A, y) of the last row that counts before it; i = length is the bootstrap's place.
    """
    sequence = tl.program_id(0)
    start, end = tl.load(cu_seqlens_ptr + sequence), tl.load(cu_seqlens_ptr + sequence + 1)
    length = (end - start).to(tl.int32)
    adjoint = tl.full((), 0.0, tl.float32)
    arriving = tl.full((), 0.0, tl.float32)
    for first in range(0, length + 1, BLOCK):
        i = first + tl.arange(0, BLOCK)
        row = start + i
        inside = i < length
        valid = _counts(mask_ptr, row, inside)
        previous = _counts(mask_ptr, row - 1, (i > 0) & (i <= length))
        cotangent = tl.load(cotangent_ptr + row - 1, mask=previous, other=0.0)
        y = cotangent * tl.load(policy_grad_ptr + row - 1, mask=previous, other=0.0)
        a_prev, y_prev = pair_scan(previous, decay, -gamma * ahead_return, tl.zeros_like(y), y, adjoint, arriving)
        adjoint, arriving = last_of(a_prev, BLOCK), last_of(y_prev, BLOCK)

        y = tl.load(cotangent_ptr + row, mask=valid, other=0.0) * tl.load(policy_grad_ptr + row, mask=valid, other=0.0)
        a = times(decay, a_prev) - times(gamma * ahead_return, y_prev)
        grad_value = y - times(gamma * ahead_value, y_prev) + times(bridge, a_prev)
        tl.store(grad_logprobs_ptr + row, tl.where(valid, beta * (y - a), 0.0), mask=inside)
        tl.store(grad_values_ptr + row, tl.where(valid, grad_value, 0.0), mask=inside)
        tl.store(grad_bootstrap_ptr + sequence + 0 * i, times(gamma, a_prev - y_prev), mask=i == length)


def _coefficients(options: BellmanOptions) -> dict:
    gamma, lam = options.gamma, options.lam
    by_target = {"return": (0.0, 1.0), "td": (1.0 - lam, lam), "one_step": (1.0, 0.0)}
    ahead_value, ahead_return = by_target[options.policy_target]
    return {
        "beta": float(options.beta), "gamma": float(gamma), "bridge": float(gamma * (1.0 - lam)), "decay": float(gamma * lam),
        "ahead_value": float(ahead_value), "ahead_return": float(ahead_return),
    }  # fmt: skip


_ROWS = ("policy_loss", "value_loss", "returns", "advantages", "weights", "policy_grad", "value_grad")


def forward_launch(
    logprobs, ref_logprobs, rewards, values, cu_seqlens, mask, behavior_logprobs, bootstrap, target_values,
    options: BellmanOptions,
):  # fmt: skip
    """The rows, and the launch (kernel, grid, arguments, options) that fills them."""
    out = tuple(torch.empty_like(logprobs) for _ in _ROWS)
    arguments = {
        "logprobs_ptr": logprobs, "ref_ptr": ref_logprobs, "rewards_ptr": rewards, "values_ptr": values,
        "cu_seqlens_ptr": cu_seqlens, "mask_ptr": mask, "bootstrap_ptr": bootstrap,
        "behavior_ptr": ref_logprobs if behavior_logprobs is None else behavior_logprobs,
        "baseline_ptr": values if target_values is None else target_values,
        "cap": float("inf") if options.is_cap is None else float(options.is_cap),
        "floor": float("-inf") if options.is_floor is None else float(options.is_floor),
        "LEVEL": _LEVELS.index(options.is_level), "RESIDUAL": options.target == "residual", "BLOCK": BLOCK,
    }  # fmt: skip
    arguments |= _coefficients(options) | {f"{name}_ptr": x for name, x in zip(_ROWS, out, strict=True)}
    return out, (soft_bellman_forward, cu_seqlens.numel() - 1, arguments, OPTIONS)


def residual_launch(cotangent, policy_grad, cu_seqlens, mask, options: BellmanOptions):
    """The gradients, and the launch that fills them."""
    grads = (torch.empty_like(cotangent), torch.empty_like(cotangent), cotangent.new_empty(cu_seqlens.numel() - 1))
    arguments = {
        "cotangent_ptr": cotangent, "policy_grad_ptr": policy_grad, "cu_seqlens_ptr": cu_seqlens, "mask_ptr": mask,
        "grad_logprobs_ptr": grads[0], "grad_values_ptr": grads[1], "grad_bootstrap_ptr": grads[2],
        "BLOCK": BLOCK,
    }  # fmt: skip
    arguments |= _coefficients(options)
    return grads, (soft_bellman_residual, cu_seqlens.numel() - 1, arguments, OPTIONS)


def fwd(*arguments) -> tuple[Tensor, ...]:
    """(policy_loss, value_loss, returns, advantages, weights, policy_grad, value_grad); arguments as in forward_launch."""
    out, launch = forward_launch(*arguments)
    run(launch)
    return out


def bwd_residual(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in logprobs, values and bootstrap; arguments as in residual_launch."""
    grads, launch = residual_launch(*arguments)
    run(launch)
    return grads


def specialisations(everything: bool):
    """The launches that calls make, for compiling them ahead of time; without `everything` the paper's options alone."""
    rows, sequences = (torch.empty(n, device="meta") for n in (16, 3))
    cu_seqlens = torch.empty(4, dtype=torch.int64, device="meta")
    mask = torch.empty(16, dtype=torch.bool, device="meta")
    levels = _LEVELS if everything else ("trajectory",)
    given = [(None, None)] + ([(mask, sequences)] if everything else [])
    for some_mask, bootstrap in given:
        for level in levels:
            for target in ("detach", "residual") if everything else ("detach",):
                options = BellmanOptions(0.1, 1.0, 0.5, "return", target, level, 1.0, None)
                yield forward_launch(rows, rows, rows, rows, cu_seqlens, some_mask, None, bootstrap, None, options)[1]
        residual = BellmanOptions(0.1, 1.0, 0.5, "return", "residual", "none", None, None)
        yield residual_launch(rows, rows, cu_seqlens, some_mask, residual)[1]
