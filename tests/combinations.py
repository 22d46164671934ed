"""Few combinations of options in the place of all."""

import itertools
from collections.abc import Sequence


def pairwise(*axes: Sequence) -> list[tuple]:
    """Combinations in which every two values of two axes meet: what one option does to another shows without all the others."""
    everything = list(itertools.product(*(range(len(axis)) for axis in axes)))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in everything}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        best = max(everything, key=lambda row: len(pairs[row] & missing))
        missing -= pairs[best]
        chosen.append(best)
    return [tuple(axis[i] for axis, i in zip(axes, row)) for row in chosen]
