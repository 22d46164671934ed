"""Scores of tokens as scores of steps.

`step_ends` are those of dqo.data.episodes.Episode: the index of the last token of each step. A step has the tokens behind the end
of the step before it, and the last step also all that follows its end, such as the end token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

Mark = Literal["negative", "zero", "none"]  # the rewards that say that a step is wrong


def step_index(step_ends: Sequence[int], length: int) -> np.ndarray:
    """(length,) int: the step of each token. Steps that end on one token share it: it is the first one's, the others are empty.

    Raises:
        ValueError: for ends that fall or lie outside of the response.
    """
    ends = np.asarray(step_ends, int)
    if ends.ndim != 1 or (np.diff(ends) < 0).any() or (len(ends) and not 0 <= ends[0] <= ends[-1] < length):
        raise ValueError(f"step_ends must rise and lie in a response of {length} tokens, got {list(step_ends)}")
    return np.minimum(np.searchsorted(ends, np.arange(length)), max(len(ends) - 1, 0))


def step_sums(values: ArrayLike, step_ends: Sequence[int]) -> np.ndarray:
    """(S,) float64: the sum of `values` (T,) over the tokens of each step; (0,) without steps."""
    values = np.asarray(values, float)
    index = step_index(step_ends, len(values))
    return np.bincount(index, weights=values, minlength=len(step_ends))[: len(step_ends)]


def step_highest(values: ArrayLike, step_ends: Sequence[int]) -> np.ndarray:
    """(S,) float64: the highest of `values` (T,) in each step, -inf in an empty one; (0,) without steps."""
    values = np.asarray(values, float)
    found = np.full(len(step_ends), -np.inf)
    if len(step_ends):
        np.maximum.at(found, step_index(step_ends, len(values)), values)
    return found


def highest_half(scores: ArrayLike) -> np.ndarray:
    """(S,) bool: the steps with the highest `scores` (S,), half of them, rounded up; of equal ones the earlier."""
    scores = np.asarray(scores, float)
    chosen = np.argsort(-scores, kind="stable")[: (len(scores) + 1) // 2]
    return np.isin(np.arange(len(scores)), chosen)


def wrong_mark(step_rewards: Iterable[float], potentials: bool = False) -> Mark:
    """What marks a wrong step in a file, by all of its step rewards.

    Args:
        potentials: they are known to be values of prefixes, pass rates or a model's.

    Returns:
        "negative" where some are below 0: ratings such as PRM800K's -1, 0 and 1, of which 0 is neutral, and penalties. Of
        potentials such ratings alone, since a model's values may be below 0 anywhere.
        "zero" where all are in [0, 1] and not all are 0: labels such as Math-Shepherd's 0 and 1, and pass rates, of which 0 says
        that no completion from there was right. Potentials may all be 0.
        "none" where nothing does.
    """
    numbers = set(step_rewards)
    if not numbers:
        return "none"
    if min(numbers) < 0:
        return "negative" if not potentials or numbers <= {-1.0, 0.0, 1.0} else "none"
    return "zero" if potentials or 0 < max(numbers) <= 1 else "none"


def marked(step_rewards: ArrayLike, mark: Mark) -> np.ndarray:
    """(S,) bool: the steps whose reward has the mark of a wrong one."""
    rewards = np.asarray(step_rewards, float)
    return {"negative": rewards < 0, "zero": rewards == 0, "none": np.zeros(len(rewards), bool)}[mark]


def first_wrong_step(step_rewards: Sequence[float], mark: Mark) -> int | None:
    """The first step, counted from 0, whose reward has the mark of a wrong one; None where there is none."""
    wrong = np.flatnonzero(marked(step_rewards, mark))
    return int(wrong[0]) if len(wrong) else None
