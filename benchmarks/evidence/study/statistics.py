"""The study's test: paired over seeds, each a replicate with its own base model, data and problems; and corrections by Holm."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from dqo.stats import CONFIDENCE


class Difference(NamedTuple):
    """Of the means of two methods, a - b, over seeds."""

    mean: float
    low: float
    high: float
    p_value: float  # two-sided


def paired_over_seeds(a: ArrayLike, b: ArrayLike) -> Difference | None:
    """Student's paired t over seeds, of a, b (S, P): the scores of P problems in each of S seeds, the same problems for both.

    The means over problems are one difference a seed, and the S differences are the independent things: they hold the variation
    of base model, data, training and problems. A test over the S * P problems would miss the first three, which all problems of a
    seed share, and find differences of methods where there are none. None for fewer than two seeds.
    """
    from scipy import stats

    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.ndim != 2 or a.shape != b.shape or a.size == 0:
        raise ValueError(f"paired scores must be two arrays (seeds, problems), got {a.shape} and {b.shape}")
    gaps = (a - b).mean(axis=1)
    count, mean = len(gaps), float(gaps.mean())
    if count < 2:
        return None
    error = float(gaps.std(ddof=1)) / sqrt(count)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    if error == 0.0:  # all seeds have the same difference
        return Difference(mean, mean, mean, 1.0 if mean == 0.0 else 0.0)
    return Difference(mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean / error), count - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down correction: the chance that any of those called true at a level is false is at most that level."""
    corrected = [1.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = running
    return corrected


def ahead_of_each(differences: Sequence[Difference]) -> float:
    """The p value of "ahead of every rival": all must hold, so that it is the largest of them, and 1 where one mean is not
    above 0 (an intersection-union test, Berger 1982)."""
    if not differences or any(found.mean <= 0 for found in differences):
        return 1.0
    return max(found.p_value for found in differences)
