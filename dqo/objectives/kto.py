"""Kahneman-Tversky Optimization (arXiv 2402.01306): responses labelled good or bad, no pairs.

eq. 7    S(x, y) = sum_t log pi(y_t|s_t) - log ref(y_t|s_t)                                      the implied reward, over beta
         z0 = max(0, mean of S(x, y') over responses y' given to other prompts than x)           a constant
eq. 8    L = desirable_weight * (1 - sigmoid(beta * (S - z0)))                                   where y is good
         L = undesirable_weight * (1 - sigmoid(beta * (z0 - S)))                                 where y is bad
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dqo.errors import UserError
from dqo.objectives.base import Columns, Objective, Selection
from dqo.objectives.groups import by_prompt


@dataclass(frozen=True)
class KTO(Objective):
    beta: float = 0.1
    """The KL temperature multiplies log(pi/ref)."""
    desirable_weight: float = 1.0
    """The loss of responses labelled correct is multiplied by this factor."""
    undesirable_weight: float = 1.0
    """The loss of responses labelled wrong is multiplied by this factor."""

    needs_contrast: ClassVar[bool] = False
    reads_rewards: ClassVar[str] = "labels"

    def problems(self) -> list[tuple[str, str]]:
        return super().problems() + self.below(0, "desirable_weight", "undesirable_weight")

    def prepare(self, columns: Columns) -> Selection:
        """Every response, and as its companion y' a response to the next prompt: the i-th of its prompt gets that prompt's i-th,
        so that all completions are used alike.

        Raises:
            UserError: when all responses have one prompt.
        """
        members = by_prompt(columns.prompt)
        if len(members) == 1:
            raise UserError(
                "kto needs responses of at least two prompts: its KL term is estimated from responses given to other "
                "prompts; add prompts, or use --method dqo"
            )
        companions = np.full(len(columns.prompt), -1, dtype=np.int64)
        for own, others in zip(members, members[1:] + members[:1]):
            companions[own] = others[np.arange(len(own)) % len(others)]
        return Selection(super().prepare(columns).groups, companions=companions)

    def advice(self, labels: Sequence[bool], rewards: np.ndarray) -> list[str]:
        """Where the labels weigh far from what the paper advises, good over bad from 1 to 4/3."""
        good = sum(labels)
        bad = len(labels) - good
        if not labels:
            return []
        if not good or not bad:
            kind = "correct" if good else "wrong"
            return [
                f"every response is labelled {kind}: kto has nothing to compare them with; is --reward_threshold right?"
            ]
        if self.undesirable_weight <= 0 or self.desirable_weight <= 0:
            return []
        weigh = good * self.desirable_weight / (bad * self.undesirable_weight)
        if 0.75 <= weigh <= 5 / 3:
            return []
        advised = bad * self.undesirable_weight / good
        return [
            f"kto: {good:,} good and {bad:,} bad responses weigh {weigh:.3g} to 1; 1 to 1.33 is advised: "
            f"--desirable_weight {advised:.3g} to {advised * 4 / 3:.3g}"
        ]

    def companion_sums(self, stats, rows, cu_seqlens):
        """[sum, count] of S(x, y') over companions; their mean is the column companion_mean, and z0 where it is above 0."""
        from dqo.objectives.sums import mean_metric, sequence_sums

        return mean_metric(sequence_sums(stats.logprobs - rows["ref_logprobs"], cu_seqlens))

    def __call__(self, stats, rows, cu_seqlens):
        import torch

        from dqo.objectives.sums import mean_metric, response_metrics, sequence_sums

        first = cu_seqlens[:-1]
        desirable = rows["label"][first] > 0.5  # (B,)
        z0 = rows["companion_mean"][first].detach().clamp(min=0)
        margin = self.beta * (sequence_sums(stats.logprobs - rows["ref_logprobs"], cu_seqlens) - z0)  # beta * (S - z0)
        miss = torch.sigmoid(torch.where(desirable, -margin, margin))  # 1 - sigmoid(x) without its cancellation
        loss = torch.where(desirable, self.desirable_weight * miss, self.undesirable_weight * miss).sum()  # eq. 8
        return loss, {"kto/z0": mean_metric(z0)} | response_metrics(stats, rows, cu_seqlens, self.beta)
