"""How well scores of tokens tell right responses from wrong ones, and where a wrong one went wrong.

All intervals are 95 %, over prompts: responses to one prompt resemble each other (dqo.stats).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from dqo.credit.steps import step_sums
from dqo.stats import Interval, auc_interval, clustered_interval


@dataclass(frozen=True)
class Judged:
    """A response and what a score says of its tokens: low where it blames. beta * log(pi/ref) is such a score."""

    prompt: int | str  # responses to one prompt share it
    label: bool  # whether the response is right
    scores: np.ndarray  # (T,)
    step_ends: Sequence[int] = ()  # index of the last token of each step
    first_wrong_step: int | None = None  # counted from 0; None: no step is wrong, or it is not known

    @property
    def total(self) -> float:
        """The score of the response."""
        return float(np.asarray(self.scores, float).sum())

    @property
    def step_scores(self) -> np.ndarray:
        """(S,)"""
        return step_sums(self.scores, self.step_ends)


class Quality(NamedTuple):
    """What is known of a score; None where the responses do not tell it."""

    auc: Interval | None
    auc_within_prompt: Interval | None
    first_wrong_step: Interval | None
    first_wrong_step_chance: Interval | None


def quality_of(judged: Sequence[Judged]) -> Quality:
    """All four measures of a score."""
    columns = [j.total for j in judged], [j.label for j in judged], [j.prompt for j in judged]
    steps = [(j.prompt, j.step_scores, j.first_wrong_step) for j in judged]
    return Quality(auc_interval(*columns), auc_within_prompt(*columns), lowest_is_wrong(steps), chance_of_wrong(steps))


def auc_within_prompt(scores: ArrayLike, labels: ArrayLike, prompts: ArrayLike) -> Interval | None:
    """The share of pairs of a right and a wrong response to one prompt whose right one is scored higher; equal ones count half.

    The difficulty of prompts, which the plain AUC rewards a score for knowing, is out of it. scores, labels, prompts (N,).

    Returns:
        The mean over all pairs and its interval over prompts; None where no prompt has both kinds.
    """
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    if np.isnan(scores).any():
        raise ValueError("scores contain NaN")
    members = np.unique(np.asarray(prompts), return_inverse=True)[1]
    order = np.argsort(members, kind="stable")
    wins, pairs = [], []
    for group in np.split(order, np.flatnonzero(np.diff(members[order])) + 1):
        right, wrong = scores[group][labels[group]], np.sort(scores[group][~labels[group]])
        if len(right) and len(wrong):
            below = np.searchsorted(wrong, right, "left") + np.searchsorted(wrong, right, "right")
            wins.append(below.sum() / 2)
            pairs.append(len(right) * len(wrong))
    return clustered_interval(wins, pairs) if pairs else None


Steps = tuple[int | str, np.ndarray, int | None]  # prompt, (S,) score of each step, the first wrong one


def lowest_is_wrong(steps: Sequence[Steps], among: Sequence[np.ndarray] | None = None) -> Interval | None:
    """The share of responses whose lowest step is their first wrong one; of k equally low ones each counts 1/k.

    Only responses with a known wrong step, and two steps or more, are asked. `among`: (S,) bool for each response, the steps
    that may be blamed; None: all.
    """

    def share(scores: np.ndarray, wrong: int, may: np.ndarray) -> float:
        lowest = may & (scores == scores[may].min(initial=np.inf))
        return lowest[wrong] / max(lowest.sum(), 1)

    return _over_prompts(steps, among, share)


def chance_of_wrong(steps: Sequence[Steps], among: Sequence[np.ndarray] | None = None) -> Interval | None:
    """`lowest_is_wrong` of a score that draws one of the steps: the mean of 1 / number of steps."""
    return _over_prompts(steps, among, lambda _, wrong, may: may[wrong] / max(may.sum(), 1))


def _over_prompts(
    steps: Sequence[Steps],
    among: Sequence[np.ndarray] | None,
    share: Callable[[np.ndarray, int, np.ndarray], float],
) -> Interval | None:
    sums: dict[int | str, list[float]] = {}
    for i, (prompt, scores, wrong) in enumerate(steps):
        if wrong is not None and wrong < len(scores) and len(scores) > 1:
            may = np.ones(len(scores), bool) if among is None else np.asarray(among[i], bool)
            sums.setdefault(prompt, []).append(float(share(scores, wrong, may)))
    if not sums:
        return None
    return clustered_interval([sum(found) for found in sums.values()], [len(found) for found in sums.values()])
