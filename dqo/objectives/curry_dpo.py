"""Curry-DPO (arXiv 2403.07230): DPO in stages from easy pairs to hard ones, the policy of each the reference of the next.

Stage k    L = - log sigmoid( beta * (S_k(y_w) - S_k(y_l)) )        a pair of the stage; any variant of DPO in its place
           S_k(y) = sum_t log pi(y_t|s_t) - log pi_{k-1}(y_t|s_t)
           pi_0 is the reference, pi_k the policy at the end of stage k

A pair is easy where the rewards of its responses are far apart. Among equal gaps, as between rewards of 0 and 1, it is the easier
the greater the mean reward of its prompt. Stages have the same number of pairs, and of steps. The pairs are those of DPO; the
paper takes the best response of a prompt with each of its others. One stage is DPO.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dqo.objectives.base import Columns, Phase, Selection
from dqo.objectives.dpo import DPO
from dqo.objectives.groups import by_prompt


@dataclass(frozen=True)
class CurryDPO(DPO):
    stages: int = 3
    """The pairs are split into this many stages, from the greatest difference of rewards to the least."""

    def problems(self) -> list[tuple[str, str]]:
        return super().problems() + self.below(1, "stages")

    def phases(self, value_warmup: float) -> tuple[Phase, ...]:
        if self.stages == 1:
            return super().phases(value_warmup)
        cuts = [k / self.stages for k in range(self.stages + 1)]
        return tuple(
            Phase(
                f"stage {k + 1}",
                steps=1 / self.stages if k + 1 < self.stages else None,
                trains=("policy",),
                refreshes=("reference",) if k else (),
                part=(cuts[k], cuts[k + 1]),
            )
            for k in range(self.stages)
        )

    def prepare(self, columns: Columns) -> Selection:
        """(better, worse) in each group, the easiest first."""
        pairs = super().prepare(columns).groups
        if self.stages == 1 or not len(pairs):
            return Selection(pairs)
        better, worse = np.asarray(pairs).T
        solved = np.zeros(len(columns.prompt))
        for rows in by_prompt(columns.prompt):
            solved[rows] = columns.reward[rows].mean()
        order = np.lexsort(
            (-solved[better], -(columns.reward[better] - columns.reward[worse]))
        )  # stable, the last key first
        return Selection(np.asarray(pairs)[order])
