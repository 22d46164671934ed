"""Supervised fine-tuning: cross-entropy of every response in the file, whatever its reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class SFT:
    unit: ClassVar[str] = "token"
    needs_reference: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = False
    needs_contrast: ClassVar[bool] = False

    def problems(self) -> list[tuple[str, str]]:
        return []

    def prepare(self, episodes: list) -> list:
        return episodes

    def __call__(self, stats, rows, cu_seqlens):
        from dqo.objectives.sums import response_metrics

        return -stats.logprobs.sum(), response_metrics(stats, rows, cu_seqlens)
