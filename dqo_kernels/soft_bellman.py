"""soft_bellman: importance weights, lambda-returns and both losses of DQO on packed rows (arXiv 2410.09302).

    delta_t = logprobs_t - ref_logprobs_t,  k_t = r_t - beta*sg(delta_t),  b = bootstrap (0 after EOS)
    G_t     = k_t + gamma*((1-lam)*sg(V_{t+1}) + lam*G_{t+1}),  V_{T+1} = G_{T+1} = b              # eq. 4.6's target
    value   = 1/2 w_t (sg(G_t) - V_t)^2                                                           # eq. 4.6
    policy  = 1/2 w_t (beta*delta_t - [r_t + gamma*Ghat_{t+1} - sg(V_t)])^2                        # eq. 4.7
    Ghat    = G ("return"), (1-lam)V + lam*G ("td"), V ("one_step")
    w_t     = exp(clamp(x_t, is_floor, is_cap)), x_t from rho = logprobs - behavior_logprobs, never a gradient

With `discounts` gamma_t stands in the place of gamma, one a row: G_t = k_t + gamma_t*(...), and gamma_t*Ghat_{t+1} likewise.

target="residual" detaches nothing but w, r and the reference: the trained term is 1/2 w_t e_t^2,
e_t = V_t + beta*delta_t - r_t - gamma*Ghat_{t+1}; value_loss is then a metric.  Backends: reference, cpp, triton, cuda;
with `discounts` the reference alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dqo_kernels.core import checks, dispatch, library
from dqo_kernels.core.bellman_options import SCHEMA, BellmanOptions
from dqo_kernels.core.packed import (
    RowsThatCount,
    compute_dtype,
    next_row,
    prefix_sum,
    sequence_index,
    sequence_total,
    suffix_sum,
    times,
)
from dqo_kernels.lambda_return import lambda_return_reference

REDUCTIONS = ("mean", "sum", "none")


class SoftBellmanTerms(NamedTuple):
    """Two losses, reduced or (N,), and detached (N,) tensors. With target="residual" value_loss is detached too."""

    policy_loss: Tensor
    value_loss: Tensor
    returns: Tensor  # G_t
    advantages: Tensor  # r_t + gamma*Ghat_{t+1} - V_t, the regression target of beta*delta_t
    weights: Tensor  # w_t


def importance_weights(
    log_ratio: Tensor,  # (N,) log pi - log mu
    sequence: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (B+1,)
    level: str,
    cap: float | None,
    floor: float | None,
) -> Tensor:
    """(N,) w_t; clamped in log space, because exp(1e3) before a cap is inf and its gradient NaN."""
    if level == "none":
        return torch.ones_like(log_ratio)
    x = {
        "trajectory": lambda: sequence_total(log_ratio, sequence, cu_seqlens),
        "suffix": lambda: suffix_sum(log_ratio, sequence),
        "prefix": lambda: prefix_sum(log_ratio, sequence),
        "token": lambda: log_ratio,
    }[level]()
    if cap is not None or floor is not None:
        x = x.clamp(floor, cap)
    return x.exp()


def soft_bellman_reference(
    logprobs: Tensor,  # (N,), live
    ref_logprobs: Tensor,  # (N,), detached
    rewards: Tensor,  # (N,), detached
    values: Tensor,  # (N,), live
    cu_seqlens: Tensor,
    mask: Tensor | None,  # (N,)
    behavior_logprobs: Tensor,  # (N,), detached
    bootstrap: Tensor,  # (B,)
    target_values: Tensor | None,  # (N,), detached
    options: BellmanOptions,
    discounts: Tensor | None = None,  # (N,), detached, in the place of gamma; without a mask
) -> SoftBellmanTerms:
    """The definition, in differentiable torch; every term (N,)."""
    if mask is not None:
        counted = RowsThatCount(mask, cu_seqlens)
        terms = soft_bellman_reference(
            counted.first(logprobs),
            counted.first(ref_logprobs),
            counted.first(rewards),
            counted.first(values),
            counted.cu_seqlens,
            None,
            counted.first(behavior_logprobs),
            torch.cat([bootstrap, bootstrap.new_zeros(1)]),
            None if target_values is None else counted.first(target_values),
            options,
        )
        return SoftBellmanTerms(*map(counted.back, terms))
    gamma, lam = options.gamma if discounts is None else discounts, options.lam
    sequence = sequence_index(cu_seqlens, logprobs.shape[0])
    log_ratio = logprobs.detach() - behavior_logprobs
    weights = importance_weights(log_ratio, sequence, cu_seqlens, options.is_level, options.is_cap, options.is_floor)
    scaled_ratio = options.beta * (logprobs - ref_logprobs)  # beta * delta_t
    if options.target == "residual":
        regularizer, baseline = scaled_ratio, values
    else:  # targets are constants: only beta*delta_t in the policy loss and V_t in the value loss are trained
        regularizer, bootstrap = scaled_ratio.detach(), bootstrap.detach()
        baseline = (values if target_values is None else target_values).detach()
    returns = lambda_return_reference(rewards - regularizer, baseline, bootstrap, sequence, gamma, lam)
    next_value = next_row(baseline, sequence, bootstrap)
    next_return = next_row(returns, sequence, bootstrap)
    if options.policy_target == "return":
        ahead = next_return
    elif options.policy_target == "td":
        ahead = times(1.0 - lam, next_value) + times(lam, next_return)
    else:
        ahead = next_value
    advantages = rewards + gamma * ahead - baseline
    policy_loss = 0.5 * weights * (scaled_ratio - advantages).square()
    value_loss = 0.5 * weights * (returns.detach() - values).square()
    if options.target == "residual":
        value_loss = value_loss.detach()
    return SoftBellmanTerms(policy_loss, value_loss, returns.detach(), advantages.detach(), weights)


def _forward(
    logprobs, ref_logprobs, rewards, values, cu_seqlens, mask, behavior_logprobs, bootstrap, target_values, *rest
):
    *options, backend = rest
    required = (logprobs, ref_logprobs, rewards, values, cu_seqlens)
    optional = (mask, behavior_logprobs, bootstrap, target_values)
    return library.run("soft_bellman", "fwd", backend, *required, *optional, BellmanOptions(*options))


def _backward_residual(cotangent, policy_grad, cu_seqlens, mask, *rest):
    *options, backend = rest
    inputs = (cotangent, policy_grad, cu_seqlens, mask)
    return library.run("soft_bellman", "bwd_residual", backend, *inputs, BellmanOptions(*options))


_FORWARD = library.Operation(
    "soft_bellman(Tensor logprobs, Tensor ref_logprobs, Tensor rewards, Tensor values, Tensor cu_seqlens, Tensor? mask, "
    f"Tensor? behavior_logprobs, Tensor? bootstrap, Tensor? target_values, {SCHEMA}, str backend) -> "
    "(Tensor policy_loss, Tensor value_loss, Tensor returns, Tensor advantages, Tensor weights, "
    "Tensor policy_grad, Tensor value_grad)",
    _forward,
    lambda logprobs, *_: tuple(torch.empty_like(logprobs) for _ in range(7)),
)
_BACKWARD_RESIDUAL = library.Operation(
    "soft_bellman_backward_residual(Tensor cotangent, Tensor policy_grad, Tensor cu_seqlens, Tensor? mask, "
    f"{SCHEMA}, str backend) -> (Tensor, Tensor, Tensor)",
    _backward_residual,
    lambda cotangent, policy_grad, cu_seqlens, *_: (
        torch.empty_like(cotangent),
        torch.empty_like(cotangent),
        cotangent.new_empty(cu_seqlens.shape[0] - 1),
    ),
)


def _save(ctx, inputs, output):
    _, _, _, _, cu_seqlens, mask, _, bootstrap, _, *options, ctx.backend = inputs
    ctx.bootstrapped, ctx.options = bootstrap is not None, BellmanOptions(*options)
    _policy_loss, _value_loss, *constants, policy_grad, value_grad = output
    ctx.save_for_backward(cu_seqlens, mask, policy_grad, value_grad)
    ctx.mark_non_differentiable(*constants, policy_grad, value_grad)


def _gradient(ctx, c_policy, c_value, *_):
    cu_seqlens, mask, policy_grad, value_grad = ctx.saved_tensors
    logprobs = values = bootstrap = None
    if ctx.options.target == "residual":
        if c_policy is not None:
            logprobs, values, bootstrap = _BACKWARD_RESIDUAL(
                c_policy.contiguous(), policy_grad, cu_seqlens, mask, *ctx.options, ctx.backend
            )
    else:  # only beta*delta_t in the policy loss and V_t in the value loss are trained
        logprobs = None if c_policy is None else c_policy * policy_grad
        values = None if c_value is None else c_value * value_grad
    bootstrap = bootstrap if ctx.bootstrapped else None
    return _FORWARD.gradients(logprobs=logprobs, values=values, bootstrap=bootstrap)


_FORWARD.differentiable(_save, _gradient)
_BACKWARD_RESIDUAL.differentiable_once()


def check_rows(
    cu_seqlens: Tensor, bootstrap: Tensor | None, target_values: Tensor | None, like: Tensor, options: BellmanOptions
) -> None:
    """What both forms of the loss must check beside the rows' own shapes."""
    if bootstrap is not None:
        checks.tensor("bootstrap", bootstrap, (cu_seqlens.numel() - 1,), like, "(one a sequence)")
    options.check()
    if options.target == "residual" and target_values is not None:
        checks.fail("target_values", 'None with target="residual", which trains both ends', "a tensor")


def bellman_rows(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor,
    values: Tensor | None,
    cu_seqlens: Tensor,  # (B+1,) int64, contiguous
    mask: Tensor | None,  # (N,) bool: rows that do not count are passed over, and all their terms are 0
    *,
    behavior_logprobs: Tensor | None,
    lse: Tensor | None,
    ref_lse: Tensor | None,
    bootstrap: Tensor | None,
    target_values: Tensor | None,
    options: BellmanOptions,
    backend: str | None,
    discounts: Tensor | None = None,
) -> SoftBellmanTerms:
    """The terms of every row, (N,), from arguments that have been checked."""
    dtype = compute_dtype(logprobs, ref_logprobs, rewards, values, lse)
    if discounts is not None and backend not in (None, "reference"):
        checks.fail("backend", "None or 'reference' with discounts, which no other backend has", repr(backend))
    backend = backend if discounts is None else "reference"
    chosen = dispatch.choose("soft_bellman", logprobs.device.type, backend, dtype)

    def row(x: Tensor) -> Tensor:
        return x.to(dtype).contiguous()

    def constant(x: Tensor | None) -> Tensor | None:
        return None if x is None else row(x.detach())

    if values is None:  # soft values; a row that does not count may hold anything
        assert lse is not None and ref_lse is not None  # has been checked
        values = options.beta * (row(lse) - row(ref_lse.detach()))
    inputs = (row(logprobs), row(ref_logprobs.detach()), row(rewards.detach()), row(values), cu_seqlens, mask)
    behavior, targets = constant(behavior_logprobs), constant(target_values)
    ends = constant(bootstrap) if options.target == "detach" or bootstrap is None else row(bootstrap)
    if chosen != "reference":
        policy_loss, value_loss, *constants, _, _ = _FORWARD(*inputs, behavior, ends, targets, *options, chosen)
        if options.target == "residual":
            value_loss = value_loss.detach()
        return SoftBellmanTerms(policy_loss, value_loss, *constants)
    behavior = inputs[1] if behavior is None else behavior
    ends = inputs[0].new_zeros(cu_seqlens.numel() - 1) if ends is None else ends
    return soft_bellman_reference(*inputs, behavior, ends, targets, options, constant(discounts))


def soft_bellman(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor,
    values: Tensor | None,
    cu_seqlens: Tensor,
    *,
    behavior_logprobs: Tensor | None = None,
    lse: Tensor | None = None,
    ref_lse: Tensor | None = None,
    bootstrap: Tensor | None = None,
    target_values: Tensor | None = None,
    discounts: Tensor | None = None,
    beta: float = 0.1,
    gamma: float = 1.0,
    lam: float = 1.0,
    policy_target: str = "return",
    target: str = "detach",
    is_level: str = "trajectory",
    is_cap: float | None = 1.0,
    is_floor: float | None = None,
    reduction: str = "sum",
    backend: str | None = None,
) -> SoftBellmanTerms:
    """DQO's two losses from row statistics; equations at the top of this file.

    Args:
        logprobs, ref_logprobs, rewards: (N,) floating. The last two are constants.
        values: (N,) V(s_t), the state before action t; None takes the soft values beta * (lse - ref_lse).
        cu_seqlens: (B+1,) integer boundaries. A sequence may be empty.
        behavior_logprobs: (N,) of the policy that wrote the responses; ref_logprobs when None.
        lse, ref_lse: (N,) logsumexps, used only when `values` is None.
        bootstrap: (B,) V(s_{T+1}) of responses that did not end; 0 when None. It gets a gradient with target="residual" only.
        target_values: (N,) values of a slow copy of the value model. They replace `values` wherever a value is a constant.
        discounts: (N,) in [0, 1], in the place of gamma: what follows action t counts by discounts[t]. A constant; the reference
            computes it.
        beta: KL temperature, positive. gamma, lam: in [0, 1].
        policy_target: "return" (the paper), "td", "one_step". target: "detach" or "residual".
        is_level: "trajectory" (the paper), "suffix", "prefix", "token", "none". is_cap, is_floor: in log space, or None.
        reduction: "sum", "mean" over N, or "none".
        backend: "reference", "cpp", "triton", "cuda", or None for the best that can run.

    Returns:
        SoftBellmanTerms; the losses are differentiable in logprobs, values, lse (and bootstrap with "residual").

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, each named.
        RuntimeError: the requested backend cannot run.
    """
    checks.floating("logprobs", logprobs)
    checks.rows_only("logprobs", logprobs, "(N,)", 1)
    n = logprobs.shape[0]
    checks.cu_seqlens(cu_seqlens, n, logprobs)
    required: dict[str, Tensor | None] = {"ref_logprobs": ref_logprobs, "rewards": rewards}
    optional = {"values": values, "behavior_logprobs": behavior_logprobs, "target_values": target_values}
    optional["discounts"] = discounts
    if values is None:
        for name, given in (("lse", lse), ("ref_lse", ref_lse)):
            if given is None:
                checks.fail(name, "a tensor, because soft values (values=None) are beta * (lse - ref_lse)", "None")
        required |= {"lse": lse, "ref_lse": ref_lse}
    for name, value in required.items():
        checks.tensor(name, value, (n,), logprobs)
    for name, value in optional.items():
        if value is not None:
            checks.tensor(name, value, (n,), logprobs)
    options = BellmanOptions(beta, gamma, lam, policy_target, target, is_level, is_cap, is_floor)
    check_rows(cu_seqlens, bootstrap, target_values, logprobs, options)
    checks.one_of("reduction", reduction, REDUCTIONS)
    terms = bellman_rows(
        logprobs,
        ref_logprobs,
        rewards,
        values,
        checks.owned_index(cu_seqlens),
        None,
        behavior_logprobs=behavior_logprobs,
        lse=lse,
        ref_lse=ref_lse,
        bootstrap=bootstrap,
        target_values=target_values,
        options=options,
        backend=backend,
        discounts=discounts,
    )
    if reduction == "none":
        return terms
    count = max(n, 1) if reduction == "mean" else 1
    return terms._replace(policy_loss=terms.policy_loss.sum() / count, value_loss=terms.value_loss.sum() / count)
