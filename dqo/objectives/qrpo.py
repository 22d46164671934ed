"""Quantile Reward Policy Optimization (arXiv 2507.08068): each response alone, its reward a quantile of known partition.

          Q(y) = share of the reference's responses to the prompt whose reward is at most that of y
eq. 11    L = ( Q(y) - beta * log Z - beta * S(y) )^2                                a response y
          S(y) = sum_t log pi(y_t|s_t) - log ref(y_t|s_t)
          Z = E exp(Q / beta) under the reference

It has its minimum 0 at pi = ref * exp(Q / beta) / Z. Where no two rewards are equal Q is uniform on [0, 1], and Z is
beta * (exp(1 / beta) - 1): the paper, whose eq. 11 leaves out the 1. Where rewards tie, as 0 and 1 do, that is not so: Z is then
a sum over the values of Q. Of a share p of correct responses Z = (1 - p) exp((1 - p) / beta) + p exp(1 / beta).

All stored responses to a prompt are taken for the reference's, y among them. A prompt whose responses share one reward has the
target 0: there the policy is held at the reference. The square and its sign are those of the authors' published loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from dqo.errors import UserError
from dqo.objectives.base import Columns, Objective, Selection
from dqo.objectives.groups import by_prompt


@dataclass(frozen=True)
class QRPO(Objective):
    beta: float = 0.1
    """The KL temperature multiplies log(pi/ref). Quantiles lie between 0 and 1, whatever the rewards are."""
    partition: Literal["atoms", "continuous"] = "atoms"
    """How the partition function is found: "atoms" sums over the quantiles of a prompt's responses, and is right with ties,
    "continuous" takes the paper's closed form, for rewards of which no two are equal."""

    unit: ClassVar[str] = "response"
    reads_rewards: ClassVar[str] = "order"

    def prepare(self, columns: Columns) -> Selection:
        """Every response, with what beta * S is regressed on.

        Raises:
            UserError: when no prompt has two responses, so that every quantile is 1.
        """
        members = by_prompt(columns.prompt)
        if members and max(map(len, members)) == 1:
            raise UserError(
                f"qrpo takes quantiles among the responses to one prompt, and each of the {len(members):,} prompts has one "
                "response; `dqo sample --num_generations 8` gives each more, which `dqo score` grades"
            )
        target = np.zeros(len(columns.prompt))
        for rows in members:
            rewards = columns.reward[rows]
            quantile = np.searchsorted(np.sort(rewards), rewards, side="right") / len(rows)
            target[rows] = quantile - self._scaled_log_partition(quantile)
        return Selection(super().prepare(columns).groups, {"quantile_target": target})

    def _scaled_log_partition(self, quantile: np.ndarray) -> float:
        """beta * log Z, which lies between 0 and 1."""
        if self.partition == "continuous":  # log(beta * (exp(1/beta) - 1)) without its overflow
            return self.beta * (math.log(self.beta) + math.log(-math.expm1(-1.0 / self.beta))) + 1.0
        greatest = float(quantile.max())
        return greatest + self.beta * math.log(np.exp((quantile - greatest) / self.beta).mean())

    def __call__(self, stats, rows, cu_seqlens):
        from dqo.objectives.sums import mean_metric, response_metrics, sequence_sums

        scaled_ratio = self.beta * sequence_sums(stats.logprobs - rows["ref_logprobs"], cu_seqlens)  # (B,): beta * S
        error = rows["quantile_target"][cu_seqlens[:-1]] - scaled_ratio
        metrics = {"qrpo/error_abs_mean": mean_metric(error.abs())}
        return error.square().sum(), metrics | response_metrics(stats, rows, cu_seqlens, self.beta)
