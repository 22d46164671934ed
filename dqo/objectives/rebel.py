"""REBEL (arXiv 2404.16767): the difference of two responses' log-ratios is regressed on the difference of their rewards.

Alg. 1    L = ( beta * (S(y) - S(y')) - (R(y) - R(y')) )^2        a pair of responses y, y' to one prompt
          S(y) = sum_t log pi(y_t|s_t) - log ref(y_t|s_t),    R(y) = all rewards of the response

beta is the paper's 1 / eta, and ref its pi_t, the policy that the iteration begins with. It is DRO whose V(x), the same for both
responses, cancels: the optimum is ref * exp(R / beta) without a value model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from dqo.objectives.base import Columns, Objective, Selection
from dqo.objectives.groups import by_prompt


@dataclass(frozen=True)
class REBEL(Objective):
    beta: float = 0.1
    """The KL temperature multiplies log(pi/ref); it is 1 / eta of the paper."""
    pairing: Literal["ring", "all"] = "ring"
    """Which responses to a prompt make pairs: "ring" takes each with the next, so that K responses make K pairs, "all" every two
    of them, K (K - 1) / 2. Both have one optimum."""

    unit: ClassVar[str] = "group"
    group_size: ClassVar[int | None] = 2
    fits_rewards: ClassVar[bool] = True
    nothing_left: ClassVar[str] = "no prompt has two responses: 0 pairs"

    def prepare(self, columns: Columns) -> Selection:
        """Each response with the next one to its prompt, the last with the first: all are used alike, whatever their rewards."""
        pairs = []
        for rows in by_prompt(columns.prompt):
            if self.pairing == "all":  # each with every other
                pairs.append(rows[np.stack(np.triu_indices(len(rows), k=1), axis=1)])
                continue
            ring = np.stack([rows, np.roll(rows, -1)], axis=1)
            pairs.append(ring if len(rows) > 2 else ring[: len(rows) - 1])  # two responses are one pair, one is none
        return Selection(np.concatenate(pairs) if pairs else np.zeros((0, 2), dtype=np.int64))

    def __call__(self, stats, rows, cu_seqlens):
        from dqo.objectives.sums import mean_metric, response_metrics, sequence_sums

        # (2 * pairs,): beta * S
        scaled_ratio = self.beta * sequence_sums(stats.logprobs - rows["ref_logprobs"], cu_seqlens)
        outcome = sequence_sums(rows["rewards"], cu_seqlens)  # R
        found, wanted = (x[0::2] - x[1::2] for x in (scaled_ratio, outcome))  # (pairs,): the differences
        metrics = {
            "rewards/accuracies": mean_metric((found * wanted > 0).to(found.dtype), wanted != 0),
            "rebel/error_abs_mean": mean_metric((found - wanted).abs()),
        }
        metrics |= response_metrics(stats, rows, cu_seqlens, self.beta)
        return (found - wanted).square().sum(), metrics
