"""Trajectory Bellman Residual Minimization (arXiv 2505.15311): one residual a response, with the logits as Q-function.

eq. 4     L = ( V(s_1) + beta * S(y) - R(y) )^2                                      a response y; nothing is held fixed
          S(y) = sum_t log pi(y_t|s_t) - log ref(y_t|s_t),    R(y) = all rewards of the response
          V(s) = beta * log (sum_a exp logit_a of pi) / (the same of ref)            a soft value: no model of its own

The residuals V(s_t) + beta * delta_t - r_t - V(s_{t+1}) of the tokens add up to this one. So it is DQO with soft values
(value_model none) and target residual at t = 1 alone, without the factor 1/2, and DRO whose V(x) is that of the logits and is
trained with them. The paper's V is the logsumexp of the policy itself; the reference's is taken off here, as DQO does, so that an
untrained policy has V = 0. The paper trains with beta 0.002.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dqo.objectives.base import Objective


@dataclass(frozen=True)
class TBRM(Objective):
    beta: float = 0.1
    """The KL temperature multiplies log(pi/ref) and the soft value."""

    fits_rewards: ClassVar[bool] = True

    def __call__(self, stats, rows, cu_seqlens):
        from dqo.objectives.sums import mean_metric, moments, response_metrics, sequence_sums

        first = cu_seqlens[:-1]
        value = self.beta * (stats.lse[first] - rows["ref_lse"][first])  # (B,): V(s_1)
        scaled_ratio = self.beta * sequence_sums(stats.logprobs - rows["ref_logprobs"], cu_seqlens)
        residual = value + scaled_ratio - sequence_sums(rows["rewards"], cu_seqlens)
        metrics = {"td_error/abs_mean": mean_metric(residual.abs()), **moments("value", value.detach())}
        return residual.square().sum(), metrics | response_metrics(stats, rows, cu_seqlens, self.beta)
