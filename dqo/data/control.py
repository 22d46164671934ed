"""A control: rows with each other's rewards. What a run still gains on them, it does not gain by the rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dqo.data.mixed import sources_of
from dqo.data.rows import Row
from dqo.data.stored import StoredRows, column
from dqo.errors import UserError

_STREAM = 0x5AFE  # of the generator, beside the seed: no other use of the seed draws the same numbers


def with_shuffled_rewards(rows: Sequence[Row], seed: int, process_used: bool) -> tuple[Sequence[Row], str]:
    """The rows with their rewards permuted over all of them, and a line that says how many changed.

    A reward moves with its label, between rows of one data set. Where rewards of steps or turns are used it moves with those too,
    and only between rows with the same number of them: what data set and number alone tell of a reward stays. The prompt's own
    value stays with the prompt.

    Raises:
        UserError: where no row gets a different reward, so that it would be no control.
    """
    names = ("reward", "label", *(("step_rewards", "turn_rewards") if process_used else ()))
    source, alone = np.arange(len(rows)), 0
    random = np.random.default_rng([seed, _STREAM])
    for members in _alike(rows, process_used):
        source[members] = random.permutation(members)
        alone += len(members) == 1
    moved = sum(
        any(getattr(rows[i], name) != getattr(rows[j], name) for name in names) for i, j in enumerate(source.tolist())
    )
    if not moved:
        raise UserError(
            "shuffle_rewards changes no row's reward: there are too few rows, or no two with the same number of steps or turns"
        )
    kept = f"; {alone:,} rows keep theirs, as no other has so many steps or turns" if alone else ""
    if isinstance(rows, StoredRows):
        shuffled: Sequence[Row] = rows.with_moved(source, names)
    else:
        shuffled = [
            replace(row, **{name: getattr(rows[j], name) for name in names}) for row, j in zip(rows, source.tolist())
        ]
    return shuffled, (
        f"CONTROL (shuffle_rewards): {moved:,} of {len(rows):,} rows have a reward that is not theirs{kept}. What this run gains "
        "is not gained by the rewards"
    )


def _alike(rows: Sequence[Row], process_used: bool) -> list[np.ndarray]:
    """Indices of rows of one data set with equal numbers of rewards of steps and of turns, by the first of each."""
    key = sources_of(rows)
    if process_used:
        paid, turns = np.maximum(column(rows, "paid"), 0), column(rows, "turns_paid")
        key = key * 2**40 + paid.astype(np.int64) * 2 + (turns & (paid > 0))
    _, first, kind = np.unique(key, return_index=True, return_inverse=True)
    return [np.flatnonzero(kind == i) for i in np.argsort(first, kind="stable")]
