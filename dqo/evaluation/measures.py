"""What k samples a problem say of a model: estimates over all choices of k of the n samples, and tests between many models.

Scores are between 0 and 1. P is problems, n samples of a problem. Choices are counted in whole numbers: there are more of 64
samples than floats tell apart, and a mean of scores must not exceed 1 by rounding.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction
from math import comb, sqrt

import numpy as np
from numpy.typing import ArrayLike


def standard_error(scores: ArrayLike) -> float | None:
    """Of the mean of scores (P, n) or (P,), clustered by problem: the P means of a problem's samples are the independent numbers,
    so it is their standard deviation (of P - 1) over the root of P. None for one problem, which says nothing of others."""
    scores = np.asarray(scores, float)
    means = scores.reshape(len(scores), -1).mean(axis=1)
    return float(means.std(ddof=1) / sqrt(len(means))) if len(means) > 1 else None


def majority_at_k(answers: Sequence[str | None], scores: Sequence[float], k: int) -> float:
    """The expected score of the answer that most of k samples gave: the mean over all choices of k of the n samples.

    Samples vote by their canonical answers; one without an answer (None) does not vote. Of answers with equally many votes each
    is taken with the same chance. Where nobody votes the score is 0. An answer's score is the mean of those who gave it.

    Raises:
        ValueError: unless answers and scores are of one length n, and 1 <= k <= n.
    """
    n = len(answers)
    if len(scores) != n or not 1 <= k <= n:
        raise ValueError(f"maj@{k} needs as many answers as scores, and 1 <= k <= n; got {n} and {len(scores)}")
    given: dict[str, list[float]] = defaultdict(list)
    for answer, score in zip(answers, scores):
        if answer is not None:
            given[answer].append(score)
    silent = n - sum(map(len, given.values()))
    sizes = Counter(len(found) for found in given.values())
    chances = {size: _chosen(size, sizes - Counter([size]), silent, k) for size in sizes}
    total = sum((chances[len(found)] * _mean(found) for found in given.values()), Fraction(0))
    return float(total / comb(n, k))


def _mean(scores: list[float]) -> Fraction:
    return Fraction(sum(map(Fraction, scores))) / len(scores)


def _chosen(size: int, others: Counter[int], silent: int, k: int) -> Fraction:
    """In how many of the choices of k samples an answer that `size` samples gave is taken; a tie of m counts 1/m. `others`: how
    many further answers were given by how many samples each; `silent` samples gave none."""
    found: dict[int, int] = defaultdict(int)  # by the number of ties
    for votes in range(1, min(size, k) + 1):
        ways = {(0, 0): 1}  # (votes of others, how many of them have as many votes as ours) -> number of choices
        for other in sorted(others.elements()):  # those first that cannot tie, which keeps `ways` short
            more: dict[tuple[int, int], int] = defaultdict(int)
            for (used, ties), count in ways.items():
                for theirs in range(min(other, votes, k - votes - used) + 1):
                    more[used + theirs, ties + (theirs == votes)] += count * comb(other, theirs)
            ways = more
        for (used, ties), count in ways.items():
            found[ties] += comb(size, votes) * count * comb(silent, k - votes - used)
    return sum((Fraction(count, ties + 1) for ties, count in found.items()), Fraction(0))


def best_at_k(ranks: Sequence[float], scores: Sequence[float], k: int) -> float:
    """The expected score of the one of k samples that ranks highest: the mean over all choices of k of the n samples. Of equal
    ranks each is taken with the same chance.

    Raises:
        ValueError: unless ranks and scores are of one length n, and 1 <= k <= n.
    """
    n = len(ranks)
    if len(scores) != n or not 1 <= k <= n:
        raise ValueError(f"best of {k} needs as many ranks as scores, and 1 <= k <= n; got {n} and {len(scores)}")
    by_rank: dict[float, list[float]] = defaultdict(list)
    for rank, score in zip(ranks, scores):
        by_rank[rank].append(score)
    total, above = Fraction(0), 0
    for rank in sorted(by_rank, reverse=True):
        group = by_rank[rank]
        # choices of k among those not above, less those that take none of the group
        choices = comb(n - above, k) - comb(n - above - len(group), k)
        total += choices * _mean(group)
        above += len(group)
    return float(total / comb(n, k))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values of several tests (Holm 1979): the chance of any false alarm among all tests stays below the level at
    which an adjusted value is called significant. The tests need not be independent."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, least = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - place) * p_values[i]))
        adjusted[i] = least
    return adjusted


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4 ... up to n, and n itself."""
    return sorted({2**i for i in range(n.bit_length())} | {n})
