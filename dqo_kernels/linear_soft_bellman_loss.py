"""linear_soft_bellman_loss: DQO's loss from hidden states and the head; `linear_token_stats` followed by `soft_bellman`."""

from __future__ import annotations

from torch import Tensor

from dqo_kernels.linear_token_stats import linear_token_stats
from dqo_kernels.soft_bellman_loss import SoftBellmanOutput, loss_from_features
from dqo_kernels.token_stats import TokenStats


def linear_soft_bellman_loss(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    rewards: Tensor,
    values: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
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
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> SoftBellmanOutput:
    """`soft_bellman_loss(F.linear(hidden, weight, bias), ...)` without the logits.

    Args:
        hidden: (N, D) packed with `cu_seqlens`, or (B, T, D) padded with `mask`. Floating.
        weight, bias: (V, D), (V,): the policy's head.
        ref_hidden, ref_weight, ref_bias: the reference policy's, in place of ref_logprobs and ref_lse.
        workspace_bytes: bytes of logits held at once; None is 256 MiB on the CPU, 2 GiB on a GPU.
        Everything else: as `soft_bellman_loss`.

    Returns:
        SoftBellmanOutput; `loss` is differentiable in hidden, weight, bias and values.

    Raises:
        ValueError, RuntimeError: as `soft_bellman_loss`.
    """

    def statistics(layout):
        per_row = isinstance(temperature, Tensor) and temperature.dim() > 0
        stats = linear_token_stats(  # only the rows that count are projected
            layout.selected(hidden),
            weight,
            layout.selected(actions),
            bias=bias,
            ref_hidden=layout.selected(ref_hidden),
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            temperature=layout.selected(temperature) if per_row else temperature,
            softcap=softcap,
            workspace_bytes=workspace_bytes,
            backend=backend,
        )
        return TokenStats(*map(layout.scattered, stats))

    return loss_from_features(
        statistics,
        "hidden",
        hidden,
        ref_hidden,
        actions,
        rewards,
        values,
        vocab=weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else 0,
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
