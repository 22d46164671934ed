"""Direct Reward Optimization with a value model (DRO-V, arXiv 2405.19107): the whole response is one action.

eq. 6    L = 1/2 (R - V(x) - beta * S)^2,    S = sum_t log pi(y_t|s_t) - log ref(y_t|s_t),    R = all rewards of the response
eq. 7    its gradient in the value model holds S fixed:         1/2 (V(x) - (R - beta * S))^2
eq. 8    its gradient in the policy holds V(x) fixed:           1/2 (beta * S - (R - V(x)))^2, times policy_scale

On responses of one token it is DQO. With value_states all a value of every state is fitted to the return of the whole response,
and the residual of the response is the mean of those of its states, V(s_t) in the place of V(x): the paper's "multiple value
outputs", in its ablation ahead of one. The form of the loss is told there in words alone, so that the mean is our reading. The
paper trains on rewards of mean 0 and variance 1: --normalize_rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dqo.objectives.value_options import ValueOptions


@dataclass(frozen=True)
class _Options:
    """Those before the value model's."""

    beta: float = 0.1
    """The KL temperature (the paper's tau) multiplies log(pi/ref)."""
    policy_scale: float | None = None
    """The policy loss is multiplied by this factor. None takes the paper's 1 / beta."""
    value_states: Literal["first", "all"] = "first"
    """Which states have a value that is fitted and subtracted: "first" takes that of the prompt, "all" those of all tokens, with
    a mean over each response."""


@dataclass(frozen=True)
class DRO(ValueOptions, _Options):
    fits_rewards: ClassVar[bool] = True

    def problems(self) -> list[tuple[str, str]]:
        return super().problems() + self.below(0, "policy_scale")

    def __call__(self, stats, rows, cu_seqlens):
        from dqo.objectives.sums import regression_metrics, response_metrics, response_regression, sequence_means
        from dqo.objectives.value_outputs import outcome_losses, value_losses

        fitted = response_regression(
            stats, rows, cu_seqlens, self.beta, everywhere=self.value_states == "all"
        )  # scaled_ratio is beta * S, its target R - V(x)
        policy_loss = 0.5 * (fitted.scaled_ratio - fitted.advantages).square()  # eq. 8, of the states that count
        squared = 0.5 * (fitted.values - fitted.returns).square()  # eq. 7
        at = cu_seqlens[:-1] if self.value_states == "first" else None
        value_loss, of_loss = value_losses(rows, squared, fitted.returns, at=at)
        if self.value_states == "all":
            policy_loss, value_loss = (sequence_means(loss, cu_seqlens) for loss in (policy_loss, value_loss))
        value_loss = outcome_losses(rows, cu_seqlens, value_loss)
        scale = 1.0 / self.beta if self.policy_scale is None else self.policy_scale
        metrics = regression_metrics(policy_loss, value_loss, fitted) | of_loss
        metrics |= response_metrics(stats, rows, cu_seqlens, self.beta)
        return scale * policy_loss.sum() + self.value_coef * value_loss.sum(), metrics
