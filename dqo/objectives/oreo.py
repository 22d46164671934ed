"""Offline Reasoning Optimization (arXiv 2412.16145): DQO at lambda 1 without weights, a mean over each response.

eq. 8    L_V  = mean_t (V_t - R_t + beta * sum_{i>=t} delta_i)^2                                              policy held fixed
eq. 9    L_pi = mean_t (V_t - R_t + beta * delta_t + sg[beta * sum_{i>t} delta_i])^2 + alpha * mean_t KL_t    V held fixed

delta_t = log pi(y_t|s_t) - log ref(y_t|s_t), R_t = rewards from t on, KL_t = KL(pi || ref) over the vocabulary. At the level of
steps an action is a step of the response: t counts those alone that begin one, delta_t is the sum over the step's tokens and
differentiated whole, and the sums over i > t are over the later steps. At the level of responses only t = 1 counts, and its whole
sum is differentiated. So steps of one token are the level of tokens, and one step the level of responses. For steps the paper's
code has alpha 0.1, for responses 0.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dqo.objectives.value_options import ValueOptions


@dataclass(frozen=True)
class _Options:
    """Those before the value model's."""

    beta: float = 0.03
    """The KL temperature multiplies log(pi/ref)."""
    alpha: float = 0.01
    """The exact KL to the reference is multiplied by this and added. Above 0 the reference stays in memory."""
    level: Literal["token", "step", "response"] = "token"
    """Which states count: "token" takes the state of every token (the paper), "step" those in which a step of the file begins,
    "response" the first of each response."""


@dataclass(frozen=True)
class OREO(ValueOptions, _Options):
    fits_rewards: ClassVar[bool] = True

    @property
    def needs_kl(self) -> bool:
        return self.alpha > 0

    @property
    def needs_steps(self) -> bool:
        return self.level == "step"

    def problems(self) -> list[tuple[str, str]]:
        return super().problems() + self.below(0, "alpha")

    def __call__(self, stats, rows, cu_seqlens):
        from dqo.objectives.sums import mean_metric, regression_metrics, response_metrics, sequence_means
        from dqo.objectives.value_outputs import outcome_losses

        terms = self._responses if self.level == "response" else self._actions
        policy_loss, value_loss, fitted, of_loss = terms(stats, rows, cu_seqlens)  # the losses (B,)
        value_loss = outcome_losses(rows, cu_seqlens, value_loss)
        metrics = regression_metrics(policy_loss, value_loss, fitted) | of_loss
        metrics |= response_metrics(stats, rows, cu_seqlens, self.beta)
        loss = policy_loss.sum() + self.value_coef * value_loss.sum()
        if self.needs_kl:
            loss = loss + self.alpha * sequence_means(stats.kl, cu_seqlens).sum()  # the second term of eq. 9
            metrics["loss/kl"] = mean_metric(stats.kl)
        return loss, metrics

    def _actions(self, stats, rows, cu_seqlens):
        """Eqs. 9 and 8 with their means over the actions, tokens or steps: advantages are
        R_t - V_t - sg[beta * sum_{i>t} delta_i], returns R_t - beta * sum_{i>=t} delta_i."""
        from dqo.objectives.sums import Regression, sequence_means, steps_of
        from dqo.objectives.value_outputs import value_losses
        from dqo_kernels import soft_bellman

        logprobs, ref_logprobs, rewards = stats.logprobs, rows["ref_logprobs"], rows["rewards"]
        values, cu_actions, at = rows["values"], cu_seqlens, None
        if self.level == "step":
            steps = steps_of(rows, cu_seqlens)
            logprobs, ref_logprobs, rewards = map(steps.sums, (logprobs, ref_logprobs, rewards))
            at, cu_actions = steps.starts, steps.cu_steps
            values = values[at]
        terms = soft_bellman(
            logprobs,
            ref_logprobs,
            rewards,
            values,
            cu_actions,
            bootstrap=rows["bootstrap"][cu_seqlens[1:] - 1] if "bootstrap" in rows else None,
            beta=self.beta,
            is_level="none",
            reduction="none",
        )
        of_states, of_loss = value_losses(rows, terms.value_loss, terms.returns, at=at)
        policy_loss, value_loss = (  # there they have a factor 1/2
            2.0 * sequence_means(loss, cu_actions) for loss in (terms.policy_loss, of_states)
        )
        scaled_ratio = self.beta * (logprobs - ref_logprobs)
        fitted = Regression(values, terms.returns, scaled_ratio, terms.advantages)
        return policy_loss, value_loss, fitted, of_loss

    def _responses(self, stats, rows, cu_seqlens):
        """The same at t = 1 alone, where the policy's part has the whole sum without sg."""
        from dqo.objectives.sums import response_regression
        from dqo.objectives.value_outputs import value_losses

        fitted = response_regression(stats, rows, cu_seqlens, self.beta)
        squared = 0.5 * (fitted.values - fitted.returns).square()
        of_states, of_loss = value_losses(rows, squared, fitted.returns, at=cu_seqlens[:-1])
        return (fitted.scaled_ratio - fitted.advantages).square(), 2.0 * of_states, fitted, of_loss
