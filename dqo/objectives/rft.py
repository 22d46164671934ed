"""Rejection-sampling fine-tuning (arXiv 2308.01825): cross-entropy of the distinct correct responses of each prompt.

L = - log pi(y_t|s_t)        a token of a response that is kept
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dqo.objectives.base import Columns, Objective, Selection


@dataclass(frozen=True)
class RFT(Objective):
    max_per_prompt: int | None = None
    """At most this many correct responses are kept for each prompt. None keeps all distinct ones."""

    unit: ClassVar[str] = "token"
    reads_rewards: ClassVar[str] = "labels"
    needs_contrast: ClassVar[bool] = False
    nothing_left: ClassVar[str] = "no response is correct"

    @property
    def needs_reference(self) -> bool:
        return False

    def problems(self) -> list[tuple[str, str]]:
        return self.below(1, "max_per_prompt")

    def prepare(self, columns: Columns) -> Selection:
        """The first of each prompt's equal responses that are correct, in the order of the data."""
        correct = np.flatnonzero(columns.label)
        _, first = np.unique(columns.same_as[correct], return_index=True)
        kept: list[int] = []
        count: dict[int, int] = {}
        for row in correct[np.sort(first)].tolist():
            prompt = int(columns.prompt[row])
            count[prompt] = count.get(prompt, 0) + 1
            if self.max_per_prompt is None or count[prompt] <= self.max_per_prompt:
                kept.append(row)
        return Selection(np.array(kept, dtype=np.int64)[:, None])

    def __call__(self, stats, rows, cu_seqlens):
        from dqo.objectives.sums import response_metrics

        return -stats.logprobs.sum(), response_metrics(stats, rows, cu_seqlens)
