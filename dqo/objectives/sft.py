"""Supervised fine-tuning: cross-entropy of every response in the file, whatever its reward.

L = - log pi(y_t|s_t)        a response token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dqo.objectives.base import Objective


@dataclass(frozen=True)
class SFT(Objective):
    unit: ClassVar[str] = "token"
    reads_rewards: ClassVar[str] = "labels"
    needs_contrast: ClassVar[bool] = False

    @property
    def needs_reference(self) -> bool:
        return False

    def advice(self, labels: Sequence[bool], rewards: np.ndarray) -> list[str]:
        wrong = len(labels) - sum(labels)
        text = (
            f"sft trains on every response, on the {wrong:,} wrong ones of {len(labels):,} too; --method rft trains on the "
            "correct ones alone"
        )
        return [text] * bool(wrong)

    def __call__(self, stats, rows, cu_seqlens):
        from dqo.objectives.sums import response_metrics

        return -stats.logprobs.sum(), response_metrics(stats, rows, cu_seqlens)
