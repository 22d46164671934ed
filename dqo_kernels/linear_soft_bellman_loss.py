"""linear_soft_bellman_loss: DQO's loss from hidden states and the head, without the logits.

A reduced loss is a row loss of `linear_row_loss`; unreduced rows are `linear_token_stats` followed by `soft_bellman`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from dqo_kernels.core import checks
from dqo_kernels.core.bellman_options import BellmanOptions
from dqo_kernels.core.layout import Layout
from dqo_kernels.core.packed import sequence_index
from dqo_kernels.core.row_stats import joined, mapped
from dqo_kernels.linear_row_loss import linear_row_loss
from dqo_kernels.linear_token_stats import linear_token_stats
from dqo_kernels.soft_bellman import SoftBellmanTerms
from dqo_kernels.soft_bellman_loss import (
    Call,
    Losses,
    PerToken,
    SoftBellmanOutput,
    columns_of,
    loss_from_statistics,
    output,
)
from dqo_kernels.token_stats import TokenStats


class HeadOptions(TypedDict):
    """What `linear_row_loss` and `linear_token_stats` are told beside the rows."""

    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    lora_scale: float
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    softcap: float | None
    workspace_bytes: int | None
    backend: str | None
    group: torch.distributed.ProcessGroup | None


def _reduced_loss(
    call: Call, layout: Layout, weight: Tensor, head: HeadOptions, seqlens: Sequence[int] | None
) -> SoftBellmanOutput:
    """A reduced loss owns its rows' coefficients, so `linear_row_loss` makes the gradient of each run of sequences while its
    logits are there. Rows that do not count are neither projected nor passed on."""
    cu_seqlens = layout.selected_boundaries()
    per_token = mapped(layout.selected, call.per_token)
    rows = {name: x for name, x in per_token._asdict().items() if x is not None}
    if call.bootstrap is not None:  # one value a sequence goes on its rows
        rows["bootstrap"] = call.bootstrap[sequence_index(cu_seqlens, per_token.rewards.shape[0])]
    count = layout.count() if call.reduction == "mean" else 1
    shown: list[tuple[TokenStats, SoftBellmanTerms]] = []

    def row_loss(stats, rows, cu_seqlens):
        ends = None
        if call.bootstrap is not None:  # an empty sequence has no row, and no use for the value it is given here
            last = (cu_seqlens[1:] - 1).clamp(min=0)
            ends = rows["bootstrap"][last] if len(rows["bootstrap"]) else rows["bootstrap"].new_zeros(len(last))
        own = PerToken(*(rows.get(name) for name in PerToken._fields))
        stats, terms = call.terms(stats, own, cu_seqlens, None, ends)
        shown.append((mapped(Tensor.detach, stats), mapped(Tensor.detach, terms)))
        kl_loss = None if stats.kl is None else stats.kl.sum()
        parts = Losses(terms.policy_loss.sum(), terms.value_loss.sum(), kl_loss)
        return call.loss(parts), {name: x.detach() for name, x in parts._asdict().items() if x is not None}

    loss, sums = linear_row_loss(
        layout.selected(call.features),
        weight,
        layout.selected(call.actions.long()),
        row_loss,
        cu_seqlens,
        rows=rows,
        seqlens=seqlens,
        loss_scale=1 / count if isinstance(count, int) else count.double().reciprocal(),
        ref_hidden=None if call.ref_features is None else layout.selected(call.ref_features),
        temperature=call.temperatures(layout.selected),
        **head,
    )
    zero = loss.detach().new_zeros(())
    kl_loss = None if call.ref_features is None else sums.get("kl", zero) / count
    parts = Losses(sums.get("policy", zero) / count, sums.get("value", zero) / count, kl_loss)

    def in_layout(rows: Tensor) -> Tensor:
        return layout.unrows(layout.scattered(rows))

    stats, terms = (joined(runs) for runs in zip(*shown))
    return output(loss, parts, mapped(in_layout, stats), mapped(in_layout, terms))


def _statistics(weight: Tensor, head: HeadOptions, call: Call, layout: Layout) -> TokenStats:
    stats = linear_token_stats(  # only the rows that count are projected
        layout.selected(call.features),
        weight,
        layout.selected(call.actions.long()),
        ref_hidden=None if call.ref_features is None else layout.selected(call.ref_features),
        temperature=call.temperatures(layout.selected),
        **head,
    )
    return mapped(layout.scattered, stats)


def linear_soft_bellman_loss(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    rewards: Tensor,
    values: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    ref_lse: Tensor | None = None,
    behavior_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seqlens: Sequence[int] | None = None,
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
    group: torch.distributed.ProcessGroup | None = None,
) -> SoftBellmanOutput:
    """`soft_bellman_loss(F.linear(hidden, weight, bias), ...)` without the logits.

    Compilation: the native backends break a compiled graph, so `torch.compile(..., fullgraph=True)` refuses this call. Leave
    fullgraph out, or take backend="reference" or the form with logits, which compile whole.

    Args:
        hidden: (N, D) packed with `cu_seqlens`, or (B, T, D) padded with `mask`. Floating.
        weight, bias: (V, D), (V,): the policy's head. lora_a, lora_b, lora_scale: see `linear_token_stats`.
        ref_hidden, ref_weight, ref_bias: those of the reference policy. They replace ref_logprobs and ref_lse.
        seqlens: the B lengths of a packed call as host integers; see `linear_row_loss`. A padded call on a GPU waits for the
            device, which selects the rows of its mask.
        workspace_bytes: bytes of logits held at once; None is 256 MiB on the CPU, 2 GiB on a GPU.
        group: the processes that hold V together; see `linear_token_stats`.
        Everything else: as `soft_bellman_loss`.

    Returns:
        SoftBellmanOutput; `loss` is differentiable in hidden, weight, bias, lora_a, lora_b and values. With reduction "mean" or
        "sum" the native backends compute its gradients in this call, and it can be differentiated once.

    Raises:
        ValueError, RuntimeError: as `soft_bellman_loss`.
    """
    checks.floating("weight", weight)
    call = Call(
        name="hidden",
        features=hidden,
        ref_features=ref_hidden,
        vocab=columns_of(weight, 0),
        actions=actions,
        per_token=PerToken(rewards, values, ref_logprobs, ref_lse, behavior_logprobs, target_values),
        mask=mask,
        cu_seqlens=cu_seqlens,
        bootstrap=bootstrap,
        policy_scale=policy_scale,
        value_coef=value_coef,
        kl_coef=kl_coef,
        temperature=temperature,
        softcap=softcap,
        reduction=reduction,
        group=group,
        options=BellmanOptions(beta, gamma, lam, policy_target, target, is_level, is_cap, is_floor),
        backend=backend,
    )
    head: HeadOptions = {
        "bias": bias,
        "lora_a": lora_a,
        "lora_b": lora_b,
        "lora_scale": lora_scale,
        "ref_weight": ref_weight,
        "ref_bias": ref_bias,
        "softcap": softcap,
        "workspace_bytes": workspace_bytes,
        "backend": backend,
        "group": group,
    }
    layout, _ = call.checked()
    if seqlens is not None and layout.mask is not None:
        checks.fail("seqlens", "None for padded hidden states; their mask has the lengths", "lengths")
    if reduction != "none" and layout.shape[0] > 0 and layout.cu_seqlens.numel() > 1:
        return _reduced_loss(call, layout, weight, head, seqlens)

    return loss_from_statistics(call, layout, functools.partial(_statistics, weight, head))
