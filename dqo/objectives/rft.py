"""Rejection-sampling fine-tuning (arXiv 2308.01825): cross-entropy of the distinct correct responses of each prompt.

L = - log pi(y_t|s_t)        a token of a response that is kept, or with imitate steps one before its first wrong step
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from dqo.objectives.base import Columns, Objective, Selection


@dataclass(frozen=True)
class RFT(Objective):
    max_per_prompt: int | None = None
    """At most this many responses are kept for each prompt. None keeps all distinct ones."""
    imitate: Literal["responses", "steps"] = "responses"
    """ "responses" keeps the distinct correct responses. "steps" keeps distinct responses of any outcome up to the first step
    that the file marks as wrong; one without such a step is kept whole if it is correct."""

    unit: ClassVar[str] = "token"
    reads_rewards: ClassVar[str] = "labels"
    needs_contrast: ClassVar[bool] = False
    nothing_left: ClassVar[str] = "no response is correct"

    @property
    def needs_reference(self) -> bool:
        return False

    @property
    def reads_steps(self) -> str:
        return "imitate steps" if self.imitate == "steps" else ""

    def problems(self) -> list[tuple[str, str]]:
        return self.below(1, "max_per_prompt")

    def prepare(self, columns: Columns) -> Selection:
        """The first of each prompt's equal responses of which something is imitated, in the order of the data."""
        correct = np.flatnonzero(columns.label if self.imitate == "responses" else columns.right_length > 0)
        _, first = np.unique(columns.same_as[correct], return_index=True)
        kept: list[int] = []
        count: dict[int, int] = {}
        for row in correct[np.sort(first)].tolist():
            prompt = int(columns.prompt[row])
            count[prompt] = count.get(prompt, 0) + 1
            if self.max_per_prompt is None or count[prompt] <= self.max_per_prompt:
                kept.append(row)
        more = {"right_length": columns.right_length} if self.imitate == "steps" else {}
        return Selection(np.array(kept, dtype=np.int64)[:, None], more)

    def __call__(self, stats, rows, cu_seqlens):
        from dqo.objectives.sums import response_metrics, right_tokens

        loss = -stats.logprobs
        if self.imitate == "steps":
            loss = loss.where(right_tokens(rows, cu_seqlens), 0.0)
        return loss.sum(), response_metrics(stats, rows, cu_seqlens)
