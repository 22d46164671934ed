"""soft_bellman: importance weights, lambda-returns and both losses of DQO on packed rows (arXiv 2410.09302).

    delta_t = logprobs_t - ref_logprobs_t,  k_t = r_t - beta*sg(delta_t),  b = bootstrap (0 after EOS)
    G_t     = k_t + gamma*((1-lam)*sg(V_{t+1}) + lam*G_{t+1}),  V_{T+1} = G_{T+1} = b              # eq. 4.6's target
    value   = 1/2 w_t (sg(G_t) - V_t)^2                                                           # eq. 4.6
    policy  = 1/2 w_t (beta*delta_t - [r_t + gamma*Ghat_{t+1} - sg(V_t)])^2                        # eq. 4.7
    Ghat    = G ("return"), (1-lam)V + lam*G ("td"), V ("one_step")
    w_t     = exp(clamp(x_t, is_floor, is_cap)), x_t from rho = logprobs - behavior_logprobs, never a gradient

target="residual" detaches nothing but w, r and the reference: the trained term is 1/2 w_t e_t^2,
e_t = V_t + beta*delta_t - r_t - gamma*Ghat_{t+1}; value_loss is then a metric.  Backends: reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dqo_kernels import checks, dispatch
from dqo_kernels.lambda_return import lambda_return_reference
from dqo_kernels.packed import compute_dtype, next_row, prefix_sum, sequence_index, sequence_total, suffix_sum

POLICY_TARGETS = ("return", "td", "one_step")
TARGETS = ("detach", "residual")
IS_LEVELS = ("trajectory", "suffix", "prefix", "token", "none")
REDUCTIONS = ("mean", "sum", "none")


class SoftBellmanTerms(NamedTuple):
    """Losses, reduced or (N,), and detached (N,) tensors. With target="residual" value_loss is detached too."""

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
    behavior_logprobs: Tensor,  # (N,), detached
    bootstrap: Tensor,  # (B,)
    target_values: Tensor | None,  # (N,), detached
    beta: float,
    gamma: float,
    lam: float,
    policy_target: str,
    target: str,
    is_level: str,
    is_cap: float | None,
    is_floor: float | None,
) -> SoftBellmanTerms:
    """The definition, in differentiable torch; every term (N,)."""
    sequence = sequence_index(cu_seqlens, logprobs.shape[0])
    weights = importance_weights(
        logprobs.detach() - behavior_logprobs, sequence, cu_seqlens, is_level, is_cap, is_floor
    )
    scaled_ratio = beta * (logprobs - ref_logprobs)  # beta * delta_t
    if target == "residual":
        regularizer, baseline = scaled_ratio, values
    else:  # targets are constants: only beta*delta_t in the policy loss and V_t in the value loss are trained
        regularizer, bootstrap = scaled_ratio.detach(), bootstrap.detach()
        baseline = (values if target_values is None else target_values).detach()
    returns = lambda_return_reference(rewards - regularizer, baseline, bootstrap, sequence, gamma, lam)
    next_value = next_row(baseline, sequence, bootstrap)
    next_return = next_row(returns, sequence, bootstrap)
    if policy_target == "return":
        ahead = next_return
    elif policy_target == "td":
        ahead = (1.0 - lam) * next_value + lam * next_return
    else:
        ahead = next_value
    advantages = rewards + gamma * ahead - baseline
    policy_loss = 0.5 * weights * (scaled_ratio - advantages).square()
    value_loss = 0.5 * weights * (returns.detach() - values).square()
    if target == "residual":
        value_loss = value_loss.detach()
    return SoftBellmanTerms(policy_loss, value_loss, returns.detach(), advantages.detach(), weights)


def reduce_rows(x: Tensor, reduction: str) -> Tensor:
    """Sum, mean (0 for zero rows) or the rows themselves."""
    if reduction == "none":
        return x
    return x.sum() if reduction == "sum" else x.sum() / max(x.numel(), 1)


def check_options(beta, gamma, lam, policy_target, target, is_level, is_cap, is_floor, reduction) -> None:
    if not beta > 0:
        checks.fail("beta", "a positive number", beta)
    checks.unit_interval("gamma", gamma)
    checks.unit_interval("lam", lam)
    checks.one_of("policy_target", policy_target, POLICY_TARGETS)
    checks.one_of("target", target, TARGETS)
    checks.one_of("is_level", is_level, IS_LEVELS)
    checks.one_of("reduction", reduction, REDUCTIONS)
    if is_cap is not None and is_floor is not None and is_floor > is_cap:
        checks.fail("is_floor", f"at most is_cap = {is_cap} (both in log space)", is_floor)


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
        cu_seqlens: (B+1,) integer boundaries; empty sequences count nothing.
        behavior_logprobs: (N,) of the policy that wrote the responses; ref_logprobs when None.
        lse, ref_lse: (N,) logsumexps, used only when `values` is None.
        bootstrap: (B,) V(s_{T+1}) of responses that did not end; 0 when None. Live only with target="residual".
        target_values: (N,) a slow copy's values, in every place where the gradient stops.
        beta: KL temperature, positive. gamma, lam: in [0, 1].
        policy_target: "return" (the paper), "td", "one_step". target: "detach" or "residual".
        is_level: "trajectory" (the paper), "suffix", "prefix", "token", "none". is_cap, is_floor: in log space, or None.
        reduction: "sum", "mean" over N, or "none".
        backend: "reference", or None for the best that can run.

    Returns:
        SoftBellmanTerms; the losses are differentiable in logprobs, values, lse (and bootstrap with "residual").

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, each named.
        RuntimeError: the requested backend cannot run.
    """
    checks.floating("logprobs", logprobs)
    if logprobs.dim() != 1:
        checks.fail("logprobs", "shape (N,)", f"shape {tuple(logprobs.shape)}")
    n = logprobs.shape[0]
    checks.cu_seqlens(cu_seqlens, n, logprobs)
    required = {"ref_logprobs": ref_logprobs, "rewards": rewards}
    optional = {"values": values, "behavior_logprobs": behavior_logprobs, "target_values": target_values}
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
    sequences = cu_seqlens.numel() - 1
    if bootstrap is not None:
        checks.tensor("bootstrap", bootstrap, (sequences,), logprobs, "(one a sequence)")
    check_options(beta, gamma, lam, policy_target, target, is_level, is_cap, is_floor, reduction)
    if target == "residual" and target_values is not None:
        checks.fail("target_values", 'None with target="residual", which trains both ends', "a tensor")
    dispatch.choose("soft_bellman", logprobs.device.type, backend)

    dtype = compute_dtype(logprobs, ref_logprobs, rewards, values, lse)
    logprobs = logprobs.to(dtype)
    ref_logprobs = ref_logprobs.detach().to(dtype)
    values = beta * (lse.to(dtype) - ref_lse.detach().to(dtype)) if values is None else values.to(dtype)
    terms = soft_bellman_reference(
        logprobs,
        ref_logprobs,
        rewards.detach().to(dtype),
        values,
        cu_seqlens.long(),
        ref_logprobs if behavior_logprobs is None else behavior_logprobs.detach().to(dtype),
        logprobs.new_zeros(sequences) if bootstrap is None else bootstrap.to(dtype),
        None if target_values is None else target_values.to(dtype),
        beta,
        gamma,
        lam,
        policy_target,
        target,
        is_level,
        is_cap,
        is_floor,
    )
    return terms._replace(
        policy_loss=reduce_rows(terms.policy_loss, reduction), value_loss=reduce_rows(terms.value_loss, reduction)
    )
