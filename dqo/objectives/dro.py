"""Direct Reward Optimization with a value model (DRO-V, arXiv 2405.19107, eqs. 6 to 8): the whole response is one action.

    L = 1/2 (R - V(x) - beta * S)^2,   S = sum_t log pi(y_t|s_t) - log ref(y_t|s_t),   R = all rewards of the response

The policy's part holds V(x) fixed and is multiplied by policy_scale, the value model's holds S fixed. On responses of one token
it is DQO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True)
class DRO:
    beta: float = 0.1
    """The KL temperature (the paper's tau) multiplies log(pi/ref)."""
    policy_scale: float | None = None
    """The policy loss is multiplied by this factor. None takes the paper's 1 / beta."""
    value_coef: float = 1.0
    """The value loss is multiplied by this factor."""
    value_model: Literal["separate", "head"] = "separate"
    """ "separate" trains a model of its own, from the policy's trunk and a zero head. "head" trains an MLP on the policy's
    hidden states."""

    unit: ClassVar[str] = "sequence"
    needs_reference: ClassVar[bool] = True
    needs_values: ClassVar[bool] = True
    needs_kl: ClassVar[bool] = False
    needs_contrast: ClassVar[bool] = True

    def problems(self) -> list[tuple[str, str]]:
        found = [] if self.beta > 0 else [("beta", f"must be positive, got {self.beta}")]
        if self.policy_scale is not None and not self.policy_scale >= 0:
            found.append(("policy_scale", f"must be at least 0 or None, got {self.policy_scale}"))
        return found if self.value_coef >= 0 else [*found, ("value_coef", f"must be at least 0, got {self.value_coef}")]

    def prepare(self, episodes: list) -> list:
        return episodes

    def __call__(self, stats, rows, cu_seqlens):
        from dqo.objectives.sums import regression_metrics, response_metrics, response_regression

        fitted = response_regression(stats, rows, cu_seqlens, self.beta)
        policy_loss = 0.5 * (fitted.scaled_ratio - fitted.advantages).square()  # (B,)
        value_loss = 0.5 * (fitted.values - fitted.returns).square()
        scale = 1.0 / self.beta if self.policy_scale is None else self.policy_scale
        metrics = regression_metrics(policy_loss, value_loss, fitted)
        metrics |= response_metrics(stats, rows, cu_seqlens, self.beta)
        return scale * policy_loss.sum() + self.value_coef * value_loss.sum(), metrics
