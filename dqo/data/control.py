"""A control: rows with each other's rewards. What a run still gains on them, it does not gain by the rewards."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np

from dqo.data.rows import Row
from dqo.errors import UserError

_STREAM = 0x5AFE  # of the generator, beside the seed: no other use of the seed draws the same numbers


def with_shuffled_rewards(rows: list[Row], seed: int, process_used: bool) -> tuple[list[Row], str]:
    """The rows with their rewards permuted over all of them, and a line that says how many changed.

    A reward moves with its label. Where rewards of steps or turns are used it moves with those too, and only between rows with
    the same number of them: what that number alone tells of a reward stays. The prompt's own value stays with the prompt.

    Raises:
        UserError: where no row gets a different reward, so that it would be no control.
    """
    names = ("reward", "label", *(("step_rewards", "turn_rewards") if process_used else ()))
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        counts = len(row.step_rewards or ()), len(row.turn_rewards or ())
        alike[counts if process_used else ()].append(i)
    random = np.random.default_rng([seed, _STREAM])
    shuffled, moved = list(rows), 0
    for members in alike.values():
        for i, source in zip(members, random.permutation(members)):
            bundle = {name: getattr(rows[source], name) for name in names}
            shuffled[i] = replace(rows[i], **bundle)
            moved += any(getattr(rows[i], name) != value for name, value in bundle.items())
    if not moved:
        raise UserError(
            "shuffle_rewards changes no row's reward: there are too few rows, or no two with the same number of steps or turns"
        )
    alone = sum(len(members) == 1 for members in alike.values())
    kept = f"; {alone:,} rows keep theirs, as no other has so many steps or turns" if alone else ""
    return shuffled, (
        f"CONTROL (shuffle_rewards): {moved:,} of {len(rows):,} rows have a reward that is not theirs{kept}. What this run gains "
        "is not gained by the rewards"
    )
