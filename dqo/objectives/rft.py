"""Rejection-sampling fine-tuning (arXiv 2308.01825): cross-entropy of the distinct correct responses of each prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class RFT:
    max_per_prompt: int | None = None
    """At most this many correct responses are kept for each prompt. None keeps all distinct ones."""

    unit: ClassVar[str] = "token"
    needs_reference: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = False
    needs_contrast: ClassVar[bool] = False

    def problems(self) -> list[tuple[str, str]]:
        bad = self.max_per_prompt is not None and self.max_per_prompt < 1
        return [("max_per_prompt", f"must be at least 1 or None, got {self.max_per_prompt}")] if bad else []

    def prepare(self, episodes: list) -> list:
        kept, seen, count = [], set(), {}
        for episode in episodes:
            key = (episode.prompt_index, tuple(episode.completion_ids))
            full = self.max_per_prompt is not None and count.get(episode.prompt_index, 0) >= self.max_per_prompt
            if episode.label and key not in seen and not full:
                seen.add(key)
                count[episode.prompt_index] = count.get(episode.prompt_index, 0) + 1
                kept.append(episode)
        return kept

    def __call__(self, stats, rows, cu_seqlens):
        from dqo.objectives.sums import response_metrics

        return -stats.logprobs.sum(), response_metrics(stats, rows, cu_seqlens)
