"""Entropy-Regularized Token-level Policy Optimization (arXiv 2402.06700): a separate Q, and its expectation over the vocabulary.

L_Q  = 1/2 ( Q(s_t, y_t) - [ r_t + gamma_t * ( E_pi[Q_bar(s_{t+1}, .)] - beta * KL(pi || ref) ) ] )^2    a token; [...] held fixed
L_pi = KL( pi(.|s_t) || ref(.|s_t) * exp(Q(s_t, .) / beta) / Z )                                        a token; Q held fixed

Q is a language model of its own (dqo/models/q_model.py), Q_bar its moving average; the KL of L_Q is that in s_{t+1}, and what
follows the end is worth 0. gamma_t is gamma where a turn ends and 1 inside of it, where r_t is 0 but for rewards of steps: the
paper's action is a turn, its reward comes with its last token. The expectations are exact sums over the vocabulary, without the
token that was sampled next.

The equations are those of the paper's code and abstract, whose numbers are not known here. That code takes the raw logits of the
critic for Q, and drops the weights pi from L_pi; here Q is 0 where the critic is the reference, and L_pi is the whole KL. Its
moving average has the decay 0.995.

With q and Q_bar tied to the policy the gradient is that of DQO without a value model, with lam 0 and policy_target one_step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dqo.objectives.base import Objective


@dataclass(frozen=True)
class ETPO(Objective):
    beta: float = 0.1
    """The KL temperature is the beta of Q = V + beta * log(q/ref)."""
    gamma: float = 1.0
    """What follows a turn is discounted by this factor. Nothing is discounted inside of a turn."""
    target_ema: float = 0.995
    """The moving average of the Q-model, of which the targets are made, has this decay. 0 takes the Q-model as it is."""
    value_coef: float = 1.0
    """The loss of the Q-model is multiplied by this factor."""

    unit: ClassVar[str] = "token"
    kl_to: ClassVar[str] = "critic"
    fits_rewards: ClassVar[bool] = True

    @property
    def value_kind(self) -> str:
        return "q_model"

    @property
    def needs_kl(self) -> bool:
        return True

    @property
    def discount_at(self) -> str:
        return "turns"

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems() + self.below(0, "value_coef")
        if not 0 <= self.gamma <= 1:
            found.append(("gamma", f"must be in [0, 1], got {self.gamma}"))
        if not 0 <= self.target_ema < 1:
            found.append(("target_ema", f"must be in [0, 1), got {self.target_ema}"))
        return found

    def __call__(self, stats, rows, cu_seqlens):
        from dqo.objectives.sums import discounts, mean_metric, moments, response_metrics
        from dqo_kernels.core.packed import next_row, sequence_index

        q, ahead = rows["q"], rows["target_values"].detach()
        sequence = sequence_index(cu_seqlens, len(q))
        after = next_row(ahead, sequence, ahead.new_zeros(len(cu_seqlens) - 1))
        gamma = discounts(self, rows)
        target = rows["rewards"] + (after if gamma is None else gamma * after)
        q_loss, policy_loss = 0.5 * (q - target).square(), stats.kl
        metrics = {
            "loss/policy": mean_metric(policy_loss),
            "loss/value": mean_metric(q_loss),
            "value/mean": mean_metric(ahead),
            "td_error/abs_mean": mean_metric((q - target).abs()),
        }
        metrics |= moments("returns", target) | moments("value_error", (target - q).detach())
        metrics |= response_metrics(stats, rows, cu_seqlens, self.beta)
        return policy_loss.sum() + self.value_coef * q_loss.sum(), metrics
