"""What a verifier says of one completion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

RIGHT = 0.5  # a completion is right when its score is above this
OUTCOMES = ("right", "wrong", "unparsed", "timeout", "crash")
_LARGEST = 3.4028234663852886e38  # of float32, which rewards become


@dataclass(frozen=True)
class Grade:
    """The verdict on a completion. One that was not graded has an error and the score 0."""

    score: float
    parsed: bool = True  # whether an answer was found in the completion
    answer: str | None = None  # in canonical form: equal answers are equal strings, as majority votes need
    error: str | None = None  # "timeout", or "crash: ..." and what happened

    @property
    def right(self) -> bool:
        return self.score > RIGHT

    @property
    def outcome(self) -> str:
        """One of OUTCOMES."""
        if self.error is not None:
            return "timeout" if self.error == "timeout" else "crash"
        return "unparsed" if not self.parsed else "right" if self.right else "wrong"


def failed(error: str) -> Grade:
    return Grade(0.0, False, None, error)


def grade_of(found: Any) -> Grade:
    """What a verifier returned as a Grade: a Grade, a bool or a number, numpy's and torch's scalars included.

    Raises:
        ValueError: for anything else, and for a number that is no reward (NaN, an infinity).
    """
    grade = found if isinstance(found, Grade) else None
    score = grade.score if grade else found.item() if hasattr(found, "item") else found
    if not isinstance(score, Real) or not math.isfinite(score) or abs(float(score)) > _LARGEST:
        raise ValueError(f"{score!r:.80}; a verifier returns True, False or a finite number")
    return Grade(float(score), grade.parsed, grade.answer, grade.error) if grade else Grade(float(score))
