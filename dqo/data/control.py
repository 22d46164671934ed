"""A control: rows with each other's rewards. What a run still gains on them, it does not gain by the rewards."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np

from dqo.data.rows import Row
from dqo.errors import UserError

_STREAM = 0x5AFE  # of the generator, beside the seed: no other use of the seed draws the same numbers


def with_shuffled_rewards(rows: list[Row], seed: int, steps_used: bool) -> tuple[list[Row], str]:
    """The rows with their rewards permuted over all of them, and a line that says how many changed.

    A reward moves with its label. Where step rewards are used it moves with those too, and only between rows with the same number
    of steps: what the number of steps alone tells of a reward stays. The prompt's own value stays with the prompt.

    Raises:
        UserError: where no row gets a different reward, so that it would be no control.
    """
    alike: dict[int | None, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        alike[len(row.step_rewards or ()) if steps_used else None].append(i)
    random = np.random.default_rng([seed, _STREAM])
    shuffled, moved = list(rows), 0
    for members in alike.values():
        for i, source in zip(members, random.permutation(members)):
            other = rows[source]
            bundle = {"reward": other.reward, "label": other.label}
            if steps_used:
                bundle["step_rewards"] = other.step_rewards
            shuffled[i] = replace(rows[i], **bundle)
            moved += any(getattr(rows[i], name) != value for name, value in bundle.items())
    if not moved:
        raise UserError(
            "shuffle_rewards changes no row's reward: there are too few rows, or no two with the same number of steps"
        )
    alone = sum(len(members) == 1 for members in alike.values())
    kept = f"; {alone:,} rows keep theirs, as no other has so many steps" if alone else ""
    return shuffled, (
        f"CONTROL (shuffle_rewards): {moved:,} of {len(rows):,} rows have a reward that is not theirs{kept}. What this run gains "
        "is not gained by the rewards"
    )
