"""soft_bellman_loss: DQO's loss from logits; `token_stats` followed by `soft_bellman`.

loss = policy_scale * policy_loss + value_coef * value_loss + kl_coef * kl_loss      (no value_loss with "residual")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from dqo_kernels import checks
from dqo_kernels.layout import Layout
from dqo_kernels.soft_bellman import REDUCTIONS, bellman_rows, check_row_options
from dqo_kernels.token_stats import TokenStats
from dqo_kernels.token_stats import statistics as token_statistics


class SoftBellmanOutput(NamedTuple):
    """Only `loss` is differentiable. Losses are reduced (or rows); the tensors after `kl_loss` have the shape of actions."""

    loss: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    kl_loss: Tensor | None  # None without ref_logits
    logprobs: Tensor
    ref_logprobs: Tensor
    lse: Tensor
    entropy: Tensor
    kl: Tensor | None  # None without ref_logits
    returns: Tensor
    advantages: Tensor
    weights: Tensor


def check_reference(ref_features, features_name: str, ref_logprobs, ref_lse, values, kl_coef: float) -> None:
    """Exactly one reference input; soft values and the exact KL need more than log-probabilities."""
    if ref_features is None and ref_logprobs is None:
        checks.fail(f"{features_name} or ref_logprobs", "one reference input", "None for both")
    if ref_features is not None and (ref_logprobs is not None or ref_lse is not None):
        extra = "ref_logprobs" if ref_logprobs is not None else "ref_lse"
        checks.fail(extra, f"None, because {features_name} already gives it", "a tensor")
    if ref_features is None and values is None and ref_lse is None:
        checks.fail("ref_lse", f"a tensor (or {features_name}), because soft values (values=None) need it", "None")
    if ref_features is None and kl_coef != 0.0:
        checks.fail(features_name, f"a tensor, because the exact KL of kl_coef = {kl_coef} needs it", "None")


def loss_from_features(
    statistics: Callable[[Layout], TokenStats],
    name: str,
    features: Tensor,
    ref_features: Tensor | None,
    actions: Tensor,
    rewards: Tensor,
    values: Tensor | None,
    *,
    vocab: int,
    ref_logprobs: Tensor | None,
    ref_lse: Tensor | None,
    behavior_logprobs: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    target_values: Tensor | None,
    policy_scale: float,
    value_coef: float,
    kl_coef: float,
    temperature: float | Tensor,
    softcap: float | None,
    reduction: str,
    **options,
) -> SoftBellmanOutput:
    """What the logits form and the linear form share. `features`, called `name`, are logits or hidden states in the caller's
    layout; `statistics` gives the TokenStats of that layout's rows."""
    layout = Layout(features, name, mask, cu_seqlens)
    checks.actions(actions, layout.shape, vocab, features, mask)
    checks.one_of("reduction", reduction, REDUCTIONS)
    check_reference(ref_features, f"ref_{name}", ref_logprobs, ref_lse, values, kl_coef)
    if ref_features is not None:
        checks.logits(f"ref_{name}", ref_features)
        expected = (*layout.shape, ref_features.shape[-1] if name == "hidden" else features.shape[-1])
        checks.tensor(f"ref_{name}", ref_features, expected, features)
    checks.temperature(temperature, layout.shape, features, mask)
    checks.softcap(softcap)
    per_token = {
        "rewards": rewards,
        "values": values,
        "ref_logprobs": ref_logprobs,
        "ref_lse": ref_lse,
        "behavior_logprobs": behavior_logprobs,
        "target_values": target_values,
    }
    for argument, value in per_token.items():
        if value is not None:
            checks.tensor(argument, value, layout.shape, features, "(that of actions)")
    check_row_options(layout.cu_seqlens, bootstrap, target_values, features, **options)

    stats = statistics(layout)
    if stats.kl is None:
        given = layout.counted(layout.rows(ref_logprobs)).detach()
        stats = stats._replace(ref_logprobs=given, ref_lse=layout.rows(ref_lse))
    terms = bellman_rows(
        stats.logprobs,
        stats.ref_logprobs,
        layout.rows(rewards),
        layout.rows(values),
        layout.cu_seqlens,
        layout.mask,
        behavior_logprobs=layout.rows(behavior_logprobs),
        lse=stats.lse,
        ref_lse=stats.ref_lse,
        bootstrap=bootstrap,
        target_values=layout.rows(target_values),
        **options,
    )
    count = layout.count() if reduction == "mean" else 1

    def reduced(rows: Tensor) -> Tensor:
        return layout.unrows(layout.counted(rows)) if reduction == "none" else rows.sum() / count

    # Reduced first and added up as scalars: three passes over the rows instead of four, and no products of rows.
    policy_loss, value_loss = reduced(terms.policy_loss), reduced(terms.value_loss)
    kl_loss = None if stats.kl is None else reduced(stats.kl)
    loss = policy_scale * policy_loss
    if options["target"] == "detach":
        loss = loss + value_coef * value_loss
    if kl_coef != 0.0:
        loss = loss + kl_coef * kl_loss

    def shown(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else layout.unrows(rows.detach())

    return SoftBellmanOutput(
        loss,
        policy_loss.detach(),
        value_loss.detach(),
        None if kl_loss is None else kl_loss.detach(),
        *map(shown, (stats.logprobs, stats.ref_logprobs, stats.lse, stats.entropy, stats.kl)),
        *map(shown, (terms.returns, terms.advantages, terms.weights)),
    )


def soft_bellman_loss(
    logits: Tensor,
    actions: Tensor,
    rewards: Tensor,
    values: Tensor | None = None,
    *,
    ref_logits: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    ref_lse: Tensor | None = None,
    behavior_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
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
    policy_scale: float = 1.0,
    value_coef: float = 1.0,
    kl_coef: float = 0.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> SoftBellmanOutput:
    """The loss of Direct Q-function Optimization (arXiv 2410.09302, eqs. 4.6 and 4.7) from logits.

    Row t is the state before action t: `logits[t]` predicts `actions[t]`, `values[t] = V(s_t)`, `rewards[t]` is paid for
    `actions[t]`. Only response tokens are rows.

    Args:
        logits: (N, V) packed with `cu_seqlens`, or (B, T, V) padded with `mask`. Floating.
        actions, rewards, values: (N,) or (B, T). `values=None` takes soft values beta * (lse - ref_lse).
        ref_logits: shape of logits, the reference policy's; or
        ref_logprobs (and ref_lse for soft values): shape of actions, at the same temperature.
        behavior_logprobs: shape of actions, of the policy that wrote the responses; the reference's when None.
        mask: (B, T) bool, True on the rows that count; it may have holes, and masked inputs may be NaN.
        cu_seqlens: (B+1,) integer boundaries of packed rows.
        bootstrap: (B,) V(s_{T+1}) of responses cut by the length limit; 0 when None.
        target_values: shape of actions, a slow copy's values for every place where the gradient stops.
        beta, gamma, lam, policy_target, target, is_level, is_cap, is_floor: see `soft_bellman`.
        policy_scale, value_coef, kl_coef: factors of the three losses; kl_coef needs ref_logits (OREO's alpha is 2*kl_coef).
        temperature: a number, or one a row in the shape of actions. softcap: see `token_stats`.
        reduction: "mean" over unmasked rows, "sum", or "none" (rows in the shape of actions).
        backend: "reference", "cpp", "triton", or None for the best that can run.

    Returns:
        SoftBellmanOutput.

    Raises:
        ValueError: shapes, dtypes, devices, options or a missing reference, each named. RuntimeError: the backend cannot run.
    """

    def statistics(layout):
        per_row = isinstance(temperature, Tensor) and temperature.dim() > 0
        temperatures = layout.rows(temperature) if per_row else temperature
        # The logits go in the caller's own layout: a view of their rows may not exist.
        rows = (logits, layout.rows(actions), ref_logits, layout.mask)
        return token_statistics(*rows, temperatures, softcap, backend)

    return loss_from_features(
        statistics,
        "logits",
        logits,
        ref_logits,
        actions,
        rewards,
        values,
        vocab=logits.shape[-1] if isinstance(logits, Tensor) and logits.dim() else 0,
        ref_logprobs=ref_logprobs,
        ref_lse=ref_lse,
        behavior_logprobs=behavior_logprobs,
        mask=mask,
        cu_seqlens=cu_seqlens,
        bootstrap=bootstrap,
        target_values=target_values,
        beta=beta,
        gamma=gamma,
        lam=lam,
        policy_target=policy_target,
        target=target,
        is_level=is_level,
        is_cap=is_cap,
        is_floor=is_floor,
        policy_scale=policy_scale,
        value_coef=value_coef,
        kl_coef=kl_coef,
        temperature=temperature,
        softcap=softcap,
        reduction=reduction,
        backend=backend,
    )
