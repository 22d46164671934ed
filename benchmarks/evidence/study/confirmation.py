"""The second test: what the first one found about contenders that were added to it, on base models that nobody had looked at.
docs/evidence.md says the same in words."""

from __future__ import annotations

from dataclasses import dataclass

NEW_SEEDS = (6, 7, 8, 9, 10, 11, 12, 13, 15, 16)  # the training of 14's base model ends at a loss of 0.125


@dataclass(frozen=True)
class Claim:
    """That a contender is ahead of each rival on a task."""

    task: str
    contender: str
    rivals: tuple[str, ...]
    title: str

    @property
    def methods(self) -> tuple[str, ...]:
        return (*self.rivals, self.contender)


OF_OUTCOMES = ("rft", "dpo", "dpo-nll", "kto", "dro", "oreo", "rebel")
CLAIMS = (
    Claim("c", "dqo-nll", tuple(name for name in OF_OUTCOMES if name != "oreo"), "few positives"),
    Claim("d", "dqo-nll", OF_OUTCOMES, "half-right responses, outcomes alone"),
    Claim(
        "d", "dqo-noisy-nll", (*OF_OUTCOMES, "rft-noisy", "rft-noisy-whole"),
        "half-right responses, a fifth of the labels of steps wrong",
    ),
    Claim(
        "f", "dqo-steps-nll", ("dpo", "dpo-nll", "kto", "dro", "oreo", "qrpo", "rebel", "rft-steps"),
        "stitching, labels of steps",
    ),
)  # fmt: skip
