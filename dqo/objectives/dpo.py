"""Direct Preference Optimization (arXiv 2305.18290) on pairs made of one prompt's better and worse responses.

eq. 7    L = - log sigmoid( beta * S(y_w) - beta * S(y_l) )        a pair of the better response y_w and the worse y_l
         S(y) = sum_t log pi(y_t|s_t) - log ref(y_t|s_t)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dqo.objectives.base import Columns, Objective, Selection
from dqo.objectives.groups import pairs


@dataclass(frozen=True)
class DPO(Objective):
    beta: float = 0.1
    """The KL temperature multiplies log(pi/ref)."""
    max_pairs_per_prompt: int = 4
    """Each prompt gives at most this many pairs. Every response is used before one is used again."""

    unit: ClassVar[str] = "group"
    group_size: ClassVar[int | None] = 2
    nothing_left: ClassVar[str] = "no prompt has both a better and a worse response: 0 pairs"

    def problems(self) -> list[tuple[str, str]]:
        return super().problems() + self.below(1, "max_pairs_per_prompt")

    def prepare(self, columns: Columns) -> Selection:
        """(better, worse) in each group."""
        return Selection(pairs(columns, self.max_pairs_per_prompt))

    def __call__(self, stats, rows, cu_seqlens):
        import torch
        from torch.nn import functional as F

        from dqo.objectives.sums import mean_metric, response_metrics, sequence_sums

        reward = self.beta * sequence_sums(stats.logprobs - rows["ref_logprobs"], cu_seqlens)  # (2 * pairs,): beta * S
        margin = reward[0::2] - reward[1::2]  # beta * S(y_w) - beta * S(y_l)
        chosen = torch.arange(len(reward), device=reward.device) % 2 == 0  # by reward; both may have the same label
        metrics = {
            "rewards/margins": mean_metric(margin),
            "rewards/accuracies": mean_metric((margin > 0).to(margin.dtype)),
        }
        metrics |= response_metrics(stats, rows, cu_seqlens, self.beta, chosen)
        return -F.logsigmoid(margin).sum(), metrics  # eq. 7
