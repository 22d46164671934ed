"""Which groups the steps of a run read: from the seed and the position alone, so that a position is enough to go on.

Without weights an epoch is one permutation of all groups. With weights an epoch has as many groups as there are, and each data
set has its weight's share of them: its own permutations, one behind the other, which begin again when they end, whether or not
the epoch does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dqo.data.batches import Group, epoch_order
from dqo.data.mixed import names_of, sources_of, weights_of
from dqo.data.selection import Groups
from dqo.errors import UserError


@dataclass
class Order:
    """The order of some groups.

    Args:
        members: int32, the indices of the groups of each data set.
        weights: float64, the shares of the data sets; None: each group counts once.
        per_step: groups of a step; the last of an epoch may have fewer.
    """

    members: list[np.ndarray]
    weights: np.ndarray | None
    per_step: int
    seed: int
    names: Sequence[str] = ()  # of the data sets
    _known: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)  # the last permutation of each data set

    @property
    def size(self) -> int:
        """Groups of an epoch."""
        return sum(map(len, self.members))

    @property
    def per_epoch(self) -> int:
        """Steps."""
        return math.ceil(self.size / self.per_step)

    def step(self, position: int) -> np.ndarray:
        """Indices of the groups of a step."""
        begin, end = self._begin(position), self._begin(position + 1)
        if self.weights is None:
            epoch = begin // self.size
            return self._permuted(0, epoch)[begin - epoch * self.size : end - epoch * self.size]
        found = np.empty(end - begin, np.int64)
        source, draw = slots(self.weights, begin, end)
        for place, (k, number) in enumerate(zip(source.tolist(), draw.tolist())):
            turn, index = divmod(number, len(self.members[k]))
            found[place] = self._permuted(k, turn)[index]
        return found

    def visited(self, steps: int) -> np.ndarray:
        """Sorted indices of the groups that the first `steps` steps read."""
        end = self._begin(steps)
        counts = [end] if self.weights is None else draws(self.weights, end).tolist()
        parts = [self._permuted(k, 0)[:count] for k, count in enumerate(counts)]
        return np.sort(np.concatenate(parts))

    def told(self, what: str) -> list[str]:
        """A line for each of several data sets. `what`: its groups."""
        found = []
        for name, own, weight in zip(self.names, self.members, self.shares):
            times = f", each read {weight * self.size / len(own):.3g} times an epoch" * (self.weights is not None)
            found.append(f"{weight:.1%} of a run from {name}: {len(own):,} of {self.size:,} {what}{times}")
        return found

    @property
    def shares(self) -> list[float]:
        """Of a run, for each data set."""
        return [len(own) / self.size for own in self.members] if self.weights is None else self.weights.tolist()

    def _begin(self, position: int) -> int:
        """Groups that were read before a step, epochs one behind the other."""
        epoch, index = divmod(position, self.per_epoch)
        return epoch * self.size + index * self.per_step

    def _permuted(self, k: int, turn: int) -> np.ndarray:
        """The groups of a data set, of all without weights, as they are read the turn-th time."""
        if k not in self._known or self._known[k][0] != turn:
            if self.weights is None:
                groups, order = np.sort(np.concatenate(self.members)), epoch_order(self.size, turn, self.seed)
            else:
                groups = self.members[k]
                order = np.random.default_rng([self.seed, turn, k]).permutation(len(groups))
            self._known[k] = turn, groups[order]
        return self._known[k][1]


def order_of(groups: Sequence[Group], per_step: int, seed: int) -> Order:
    """The order of all groups. A group is of the data set of its first response.

    Raises:
        UserError: for a data set with a weight that has no group.
    """
    rows = groups.episodes.rows if isinstance(groups, Groups) else []
    names, weights = names_of(rows), weights_of(rows)
    if not names or not isinstance(groups, Groups):
        return Order([np.arange(len(groups), dtype=np.int32)], None, per_step, seed)
    chosen = groups.rows
    first = chosen[:, 0] if isinstance(chosen, np.ndarray) else np.array([group[0] for group in chosen], np.int64)
    source = sources_of(rows)[groups.episodes.places[first]]
    members = [np.flatnonzero(source == k).astype(np.int32) for k in range(len(names))]
    for name, weight, own in zip(names, weights or (), members):
        if not len(own):
            raise UserError(
                f"{name} has the weight {weight:.3g}, and the method finds nothing to train on in it; leave it "
                "out, or hold out less"
            )
    return Order(members, None if weights is None else np.array(weights), per_step, seed, names)


def slots(weights: np.ndarray, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """The data sets of the slots `begin` to `end` of a run, and how often each was read before: int64 (end - begin,) each.

    The j-th time of a data set is due at (j + 1/2) / weight, and slots are dealt in that order. So after n slots each data set
    has had n * weight of them, but for (1 + number of data sets) / 2 at most.
    """
    source, draw, before = _due(weights, begin, end)
    first = begin - int(before.sum())
    return source[first : first + end - begin], draw[first : first + end - begin]


def draws(weights: np.ndarray, count: int) -> np.ndarray:
    """int64 (len(weights),): how many of the first `count` slots each data set has."""
    source, _, before = _due(weights, count, count)
    return before + np.bincount(source[: count - int(before.sum())], minlength=len(weights))


def _due(weights: np.ndarray, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Data sets and times in the order of the slots, from one that is not behind `begin` to one that is not before `end`, and how
    many times of each are before them."""
    count = len(weights)
    before = np.maximum(np.floor(weights * (begin - count) + 0.5), 0).astype(np.int64)
    after = np.ceil(weights * (end + count) + 1).astype(np.int64)
    source = np.repeat(np.arange(count), after - before)
    draw = np.concatenate([np.arange(*ends) for ends in zip(before, after)])
    order = np.lexsort((source, (draw + 0.5) / weights[source]))
    return source[order], draw[order], before
