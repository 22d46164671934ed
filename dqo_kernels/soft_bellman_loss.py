"""soft_bellman_loss: DQO's loss from logits; `token_stats` followed by `soft_bellman`.

loss = policy_scale * policy_loss + value_coef * value_loss + kl_coef * kl_loss      (no value_loss with "residual")
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dqo_kernels.core import checks, dispatch
from dqo_kernels.core.bellman_options import BellmanOptions
from dqo_kernels.core.layout import Layout
from dqo_kernels.core.row_stats import mapped
from dqo_kernels.core.vocab_parallel import VocabSlices
from dqo_kernels.soft_bellman import REDUCTIONS, SoftBellmanTerms, bellman_rows, check_rows
from dqo_kernels.token_stats import TokenStats
from dqo_kernels.token_stats import statistics as token_statistics


class SoftBellmanOutput(NamedTuple):
    """Only `loss` is differentiable. The losses are scalars, or with reduction "none" have the shape of actions, as what follows
    `kl_loss` has."""

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


class Losses(NamedTuple):
    """The three parts of the loss, reduced or (N,)."""

    policy: Tensor
    value: Tensor
    kl: Tensor | None  # None without ref_logits


class PerToken(NamedTuple):
    """What a caller gives for each action, in the shape of actions or as (N,) rows."""

    rewards: Tensor
    values: Tensor | None
    ref_logprobs: Tensor | None
    ref_lse: Tensor | None
    behavior_logprobs: Tensor | None
    target_values: Tensor | None


def columns_of(value: object, dimension: int) -> int:
    """V, as a tensor has it along a dimension; 0 of what is no such tensor, which a check refuses later."""
    return value.shape[dimension] if isinstance(value, Tensor) and value.dim() else 0


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments that the logits form and the linear form share, in the caller's layout. `features`, called `name`, are
    logits or hidden states."""

    name: str
    features: Tensor
    ref_features: Tensor | None
    vocab: int
    actions: Tensor
    per_token: PerToken
    mask: Tensor | None
    cu_seqlens: Tensor | None
    bootstrap: Tensor | None
    policy_scale: float
    value_coef: float
    kl_coef: float
    temperature: float | Tensor
    softcap: float | None
    reduction: str
    group: torch.distributed.ProcessGroup | None
    options: BellmanOptions
    backend: str | None

    def checked(self) -> tuple[Layout, VocabSlices | None]:
        """The layout of arguments that fit together, and who holds V; ValueError names the argument that does not fit."""
        features, ref_features, given = self.features, self.ref_features, self.per_token
        layout = Layout(features, self.name, self.mask, self.cu_seqlens)
        slices = VocabSlices.of(self.group, self.vocab, features.shape[:-1].numel(), features)
        checks.actions(self.actions, layout.shape, slices.vocab if slices else self.vocab, features, self.mask)
        checks.one_of("reduction", self.reduction, REDUCTIONS)
        for factor in ("policy_scale", "value_coef", "kl_coef"):
            checks.factor(factor, getattr(self, factor))
        reference = (given.ref_logprobs, given.ref_lse, given.values, self.kl_coef)
        check_reference(ref_features, f"ref_{self.name}", *reference)
        if ref_features is not None:
            checks.logits(f"ref_{self.name}", ref_features)
            width = ref_features.shape[-1] if self.name == "hidden" else features.shape[-1]
            checks.tensor(f"ref_{self.name}", ref_features, (*layout.shape, width), features)
        checks.temperature(self.temperature, layout.shape, features, self.mask)
        checks.softcap(self.softcap)
        for argument, value in given._asdict().items():
            if value is not None:
                checks.tensor(argument, value, layout.shape, features, "(that of actions)")
        check_rows(layout.cu_seqlens, self.bootstrap, given.target_values, features, self.options)
        return layout, slices

    def temperatures(self, of_rows: Callable[[Tensor], Tensor]) -> float | Tensor:
        """The temperature, through `of_rows` where each row has its own."""
        if isinstance(self.temperature, Tensor) and self.temperature.dim() > 0:
            return of_rows(self.temperature)
        return self.temperature

    def terms(
        self,
        stats: TokenStats,
        rows: PerToken,
        cu_seqlens: Tensor,
        mask: Tensor | None,
        bootstrap: Tensor | None,
    ) -> tuple[TokenStats, SoftBellmanTerms]:
        """The terms of (N,) rows, and their statistics with the reference's part filled in."""
        ref_logprobs, ref_lse = stats.ref_logprobs, stats.ref_lse
        if ref_logprobs is None:
            assert rows.ref_logprobs is not None  # has been checked: there is one reference input
            given = rows.ref_logprobs.detach()
            ref_logprobs, ref_lse = given if mask is None else torch.where(mask, given, 0), rows.ref_lse
        terms = bellman_rows(
            stats.logprobs,
            ref_logprobs,
            rows.rewards,
            rows.values,
            cu_seqlens,
            mask,
            behavior_logprobs=rows.behavior_logprobs,
            lse=stats.lse,
            ref_lse=ref_lse,
            bootstrap=bootstrap,
            target_values=rows.target_values,
            options=self.options,
            backend=self.backend,
        )
        return stats._replace(ref_logprobs=ref_logprobs, ref_lse=ref_lse), terms

    def loss(self, parts: Losses) -> Tensor:
        loss = self.policy_scale * parts.policy
        if self.options.target == "detach":
            loss = loss + self.value_coef * parts.value
        return loss if self.kl_coef == 0.0 or parts.kl is None else loss + self.kl_coef * parts.kl


def output(loss: Tensor, parts: Losses, stats: TokenStats, terms: SoftBellmanTerms) -> SoftBellmanOutput:
    """Of a loss, and of detached parts and rows, these in the caller's layout."""
    assert stats.ref_logprobs is not None  # Call.terms has filled it in
    return SoftBellmanOutput(
        loss,
        *parts,
        logprobs=stats.logprobs,
        ref_logprobs=stats.ref_logprobs,
        lse=stats.lse,
        entropy=stats.entropy,
        kl=stats.kl,
        returns=terms.returns,
        advantages=terms.advantages,
        weights=terms.weights,
    )


def loss_from_statistics(
    call: Call, layout: Layout, statistics: Callable[[Call, Layout], TokenStats]
) -> SoftBellmanOutput:
    """The whole from `statistics` of the layout's rows."""
    rows = mapped(layout.rows, call.per_token)
    stats, terms = call.terms(statistics(call, layout), rows, layout.cu_seqlens, layout.mask, call.bootstrap)
    count = layout.count() if call.reduction == "mean" else 1

    def reduced(x: Tensor) -> Tensor:
        return layout.unrows(layout.counted(x)) if call.reduction == "none" else x.sum() / count

    # Reduced first and added up as scalars: three passes over the rows instead of four, and no products of rows.
    kl_loss = None if stats.kl is None else reduced(stats.kl)
    parts = Losses(reduced(terms.policy_loss), reduced(terms.value_loss), kl_loss)

    def shown(x: Tensor) -> Tensor:
        return layout.unrows(x.detach())

    return output(call.loss(parts), mapped(Tensor.detach, parts), mapped(shown, stats), mapped(shown, terms))


def _statistics(slices: VocabSlices | None, call: Call, layout: Layout) -> TokenStats:
    # The logits go in the caller's own layout: a view of their rows may not exist.
    rows = (call.features, layout.rows(call.actions), call.ref_features, layout.mask)
    return token_statistics(*rows, call.temperatures(layout.rows), call.softcap, call.backend, slices)


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
    group: torch.distributed.ProcessGroup | None = None,
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
        mask: (B, T) bool, True on the rows that count. It may have holes. Inputs may be NaN where it is False.
        cu_seqlens: (B+1,) integer boundaries of packed rows.
        bootstrap: (B,) V(s_{T+1}) of responses cut by the length limit; 0 when None.
        target_values: shape of actions, values of a slow copy of the value model. They replace `values` wherever a value is a
            constant.
        beta, gamma, lam, policy_target, target, is_level, is_cap, is_floor: see `soft_bellman`.
        policy_scale, value_coef, kl_coef: factors of the three losses; kl_coef needs ref_logits (OREO's alpha is 2*kl_coef).
        temperature: a number, or one a row in the shape of actions. softcap: see `token_stats`.
        reduction: "mean" over unmasked rows, "sum", or "none" (rows in the shape of actions).
        backend: "reference", "cpp", "triton", "cuda", or None for the best that can run; "cuda_one_pass" reads the logits once
            and makes the gradient in the forward (is_level none, token or suffix; see soft_bellman_loss_cuda.py).
        group: the processes that hold V together, each a slice of the logits; see `token_stats`.

    Returns:
        SoftBellmanOutput.

    Raises:
        ValueError: shapes, dtypes, devices, options or a missing reference, each named. RuntimeError: the backend cannot run.
    """
    checks.logits("logits", logits)
    call = Call(
        name="logits",
        features=logits,
        ref_features=ref_logits,
        vocab=columns_of(logits, -1),
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
    layout, slices = call.checked()
    if backend == dispatch.ONE_PASS:
        dispatch.insist("soft_bellman_loss", backend, logits.device.type)
        from dqo_kernels import soft_bellman_loss_cuda  # it needs the extension

        soft_bellman_loss_cuda.check(call)
        return SoftBellmanOutput._make(soft_bellman_loss_cuda.one_pass(call, layout))
    return loss_from_statistics(call, layout, functools.partial(_statistics, slices))
