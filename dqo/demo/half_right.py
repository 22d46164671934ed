"""Half-right responses of graded samples. Rows are those of `graded_rows`, whose step_rewards are 0 for a right step and -1 for a
wrong one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dqo.data.rows import Row, read_rows, write_rows
from dqo.demo.recipe import HALF_RIGHT, NOISY, Recipe
from dqo.demo.rollouts import rng_of

RIGHT, WRONG = 0.0, -1.0


def by_prompt(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row.prompt), []).append(row)
    return found


def wrong_steps(row: Row) -> int:
    return sum(reward != RIGHT for reward in row.step_rewards or ())


def half_right(rows: Sequence[Row], rng: random.Random, positives: float, most: int | None) -> list[Row]:
    """Wrong responses with at least half of their steps right, and right responses to the same prompts, drawn, which are a share
    `positives` of all where there are so many; `most` rows at most."""
    wrong = [row for row in rows if not row.label and 0 < 2 * wrong_steps(row) <= len(row.step_rewards or ())]
    count = min(most or len(rows), int(len(wrong) / (1 - positives)))
    wrong = wrong[: count - round(count * positives)]
    prompts = {row.prompt for row in wrong}
    right = [row for row in rows if row.label and row.prompt in prompts]
    few = rng.sample(right, min(len(right), count - len(wrong)))
    mixed = rng.sample([*wrong, *few], len(wrong) + len(few))
    return [row for found in by_prompt(mixed).values() for row in found]


def noisy_steps(rows: Sequence[Row], rng: random.Random, share: float) -> list[Row]:
    """A share of all labels of steps, drawn, is turned over; equal responses to a prompt keep equal labels."""
    known = {(str(row.prompt), str(row.completion)): len(row.step_rewards or ()) for row in rows}
    places = [(response, step) for response, steps in known.items() for step in range(steps)]
    turned = set(rng.sample(places, round(share * len(places))))

    def labels(row: Row) -> list[float]:
        response = str(row.prompt), str(row.completion)
        return [WRONG - r if (response, i) in turned else r for i, r in enumerate(row.step_rewards or ())]

    return [replace(row, step_rewards=labels(row)) for row in rows]


def write_half_right(recipe: Recipe, rollouts: Path, directory: Path, seed: int) -> None:
    """half_right.jsonl: the half-right ones of a file of graded samples, and a few that are right; noisy_labels.jsonl: the same,
    with a share of wrong labels."""
    rows = half_right(read_rows(str(rollouts)), rng_of(seed, "half right"), recipe.right_share, recipe.rows)
    write_rows(directory / HALF_RIGHT, rows)
    write_rows(directory / NOISY, noisy_steps(rows, rng_of(seed, "noise"), recipe.wrong_labels))
