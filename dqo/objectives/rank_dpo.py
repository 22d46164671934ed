"""RankDPO (arXiv 2410.18013): all responses to a prompt in one loss; a pair weighs what its exchange would cost in DCG.

eq. 5     s_i = beta * sum_t log pi(y_t|s_t) - log ref(y_t|s_t)                       the score of response y_i; tau_i is its rank
eq. 6     w_ij = |G_i - G_j| * |1/D(tau_i) - 1/D(tau_j)|,    G = 2^R - 1,    D(tau) = log(1 + tau)              held fixed
eq. 7     L = - sum over pairs with R_i > R_j of w_ij * log sigmoid( s_i - s_j )      a list of responses to one prompt

R is the reward of the outcome; the paper's lie between 0 and 1. Ranks go down with the score of the policy as it is, from 1 on.
Equal rewards have w = 0. Scores within TIED of each other, as all are before the first step, have no order: their pairs have the
mean of w over all orders. Two responses have w = |G_1 - G_2| * (1/log 2 - 1/log 3) whatever their order, and the loss of DPO
times that. Gain and discount are given from memory of the paper, whose form is that of LambdaLoss; the base of its logarithm, a
constant factor of the loss, is taken to be e.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dqo.errors import UserError
from dqo.objectives.base import Columns, Objective, Selection
from dqo.objectives.groups import by_prompt

TIED = 1e-3  # nats of log(pi/ref) of a whole response: more than the rounding of two computations, and nothing to go by
GREATEST = 64.0  # reward: 2^R of it is far from the limits of float32


@dataclass(frozen=True)
class RankDPO(Objective):
    beta: float = 0.1
    """The KL temperature multiplies log(pi/ref)."""

    unit: ClassVar[str] = "group"
    group_size: ClassVar[int | None] = None
    nothing_left: ClassVar[str] = "no prompt has responses with different rewards: 0 lists"

    def prepare(self, columns: Columns) -> Selection:
        """The responses of each prompt whose rewards differ.

        Raises:
            UserError: for rewards whose gain 2^R is no number of use.
        """
        if len(columns.reward) and (greatest := float(np.max(columns.reward))) > GREATEST:
            raise UserError(
                f"rank_dpo takes 2^reward for the gain of a response, and {columns.source[int(np.argmax(columns.reward))]} has "
                f"the reward {greatest:g}; bring rewards between 0 and 1 with --reward_scale"
            )
        lists = [rows for rows in by_prompt(columns.prompt) if len(np.unique(columns.reward[rows])) > 1]
        return Selection(lists, {"gain": np.exp2(columns.reward) - 1.0})

    def __call__(self, stats, rows, cu_seqlens):
        import torch
        from torch.nn import functional as F

        from dqo.objectives.sums import mean_metric, response_metrics, sequence_sums

        log_ratio = sequence_sums(stats.logprobs - rows["ref_logprobs"], cu_seqlens)  # (B,)
        gain, group = (rows[name][cu_seqlens[:-1]] for name in ("gain", "group"))
        by_score = torch.argsort(log_ratio.detach(), descending=True, stable=True)
        order = by_score[torch.argsort(group[by_score], stable=True)]  # each list from its greatest score down
        score, gain, group = self.beta * log_ratio[order], gain[order], group[order]
        better = (group[:, None] == group) & (gain[:, None] > gain)  # (B, B): [i, j] is a pair
        weight = (gain[:, None] - gain).abs() * exchange(log_ratio.detach()[order], group)  # eq. 6
        difference = score[:, None] - score
        loss = torch.where(better, -weight * F.logsigmoid(difference), 0.0).sum()  # eq. 7
        metrics = {
            "rewards/margins": mean_metric(difference, better),
            "rewards/accuracies": mean_metric((difference > 0).to(score.dtype), better),
        }
        return loss, metrics | response_metrics(stats, rows, cu_seqlens, self.beta)


def exchange(score, group):
    """(B, B): |1/D(tau_i) - 1/D(tau_j)|, a mean over the orders of scores that are tied.

    Args:
        score, group: (B,) one list behind the other, each from its greatest score down.
    """
    import torch

    place = torch.arange(len(score), device=score.device)
    begins = torch.ones_like(group, dtype=torch.bool)  # a list
    begins[1:] = group[1:] != group[:-1]
    apart = begins.clone()  # a run of scores that are tied
    apart[1:] |= score[:-1] - score[1:] > TIED
    rank = place - torch.where(begins, place, 0).cummax(0).values + 1
    discount = 1.0 / torch.log1p(rank.to(score.dtype))
    run = apart.cumsum(0) - 1
    together = (run[:, None] == run).to(score.dtype)
    size = together.sum(1)
    mean = together @ discount / size  # of each run
    within = together * (discount[:, None] - discount).abs()
    of_run = together @ within.sum(1) / (size * (size - 1.0)).clamp(min=1.0)  # over its pairs, both ways
    return torch.where(together > 0, of_run[:, None], (mean[:, None] - mean).abs())
