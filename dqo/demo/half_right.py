"""Half-right responses of graded samples. Rows are those of `graded_rows`, whose step_rewards are 0 for a right step and -1 for a
wrong one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dqo.data.rows import Row, read_rows, write_rows
from dqo.demo.recipe import Recipe
from dqo.demo.rollouts import rng_of

RIGHT = 0.0


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


def right_prefixes(rows: Sequence[Row]) -> list[Row]:
    """Each response up to its first wrong step, to be imitated; without the end token, where something is cut off."""
    kept = []
    for row in rows:
        rewards, steps = row.step_rewards or [], row.steps or []
        first = next((i for i, reward in enumerate(rewards) if reward != RIGHT), None)
        if first is None:
            kept.append(replace(row, label=True, reward=1.0))
        elif first > 0:
            text = str(row.completion)[: steps[first][0]]
            cut: dict[str, Any] = {"completion": text, "steps": steps[:first], "step_rewards": rewards[:first]}
            kept.append(replace(row, label=True, reward=1.0, finish_reason="length", **cut))
    return kept


def write_half_right(recipe: Recipe, rollouts: Path, directory: Path, seed: int) -> None:
    """half_right.jsonl: the half-right ones of a file of graded samples, and a few that are right; right_steps.jsonl: what is
    right of each."""
    rows = half_right(read_rows(str(rollouts)), rng_of(seed, "half right"), recipe.right_share, recipe.rows)
    write_rows(directory / "half_right.jsonl", rows)
    write_rows(directory / "right_steps.jsonl", right_prefixes(rows))
