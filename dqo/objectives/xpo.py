"""Exploratory Preference Optimization (arXiv 2405.21046): DPO that makes samples of the reference less likely, to explore.

Alg. 1    L = - log sigmoid( beta * (S(y_w) - S(y_l)) ) + alpha * log pi(y'|x)        a pair; any variant of DPO in its place
          S(y) = sum_t log pi(y_t|s_t) - log ref(y_t|s_t)
          y' is the sample of the reference in the pair; where both are, a mean over the two; where none is, there is no term

The pairs of the paper are a sample of the policy of the last round and one of the reference: it samples anew in each round
(examples/xpo.sh). On one stored file it is DPO with samples of the reference unlearnt a little, without the paper's guarantee.
The sign of the term, and the default of alpha, are those of TRL; the paper gives no value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dqo.errors import UserError
from dqo.objectives.base import Columns, Selection
from dqo.objectives.dpo import DPO


@dataclass(frozen=True)
class XPO(DPO):
    alpha: float = 1e-5
    """The log-probability of samples of the reference is multiplied by this and added."""
    reference_rows: Literal["sampling", "all"] = "sampling"
    """Which rows are samples of the reference: "sampling" takes those whose column sampling names the reference, at temperature
    1, "all" takes every row."""

    def problems(self) -> list[tuple[str, str]]:
        return super().problems() + self.below(0, "alpha")

    def prepare(self, columns: Columns) -> Selection:
        """(better, worse) in each group, and which responses are samples of the reference.

        Raises:
            UserError: when no pair has one, so that nothing is explored.
        """
        pairs = np.asarray(super().prepare(columns).groups)
        count = len(columns.prompt)
        of_reference = np.ones(count) if self.reference_rows == "all" else columns.of_reference.astype(np.float64)
        if self.alpha > 0 and len(pairs) and not of_reference[pairs].any():
            raise UserError(
                f"xpo finds no sample of the reference in {len(pairs):,} pairs: {int(of_reference.sum()):,} of {count:,} "
                "responses tell by their column sampling that the reference wrote them, at temperature 1; add rows of "
                "`dqo sample` from the reference model, or give --reference_rows all where it wrote every row"
            )
        return Selection(pairs, {"of_reference": of_reference})

    def __call__(self, stats, rows, cu_seqlens):
        from dqo.objectives.sums import mean_metric, sequence_sums

        loss, metrics = super().__call__(stats, rows, cu_seqlens)
        marked = rows["of_reference"][cu_seqlens[:-1]]  # (2 * pairs,)
        logps, marks = (x[0::2] + x[1::2] for x in (marked * sequence_sums(stats.logprobs, cu_seqlens), marked))
        unlearnt = self.alpha * logps / marks.clamp(min=1.0)  # (pairs,)
        return loss + unlearnt.sum(), metrics | {"loss/xpo": mean_metric(unlearnt)}
