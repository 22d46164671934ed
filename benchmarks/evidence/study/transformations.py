"""Rollout files made of others: what each task of the study keeps, pays and labels. Rows are those of `graded_rows`, whose
step_rewards are 0 for a right step and -1 for a wrong one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dqo.data.rows import Row
from dqo.demo.half_right import RIGHT, by_prompt, wrong_steps


def strictly(rows: Sequence[Row]) -> list[Row]:
    """Right are only the responses of which every step is."""
    right = [row.label and not wrong_steps(row) for row in rows]
    return [replace(row, label=label, reward=float(label)) for row, label in zip(rows, right)]


def first_samples(rows: Sequence[Row], count: int) -> list[Row]:
    """The first responses to each prompt."""
    return [row for found in by_prompt(rows).values() for row in found[:count]]


def few_positives(rows: Sequence[Row], rng: random.Random, without: float, most: int | None) -> list[Row]:
    """A share `without` of the prompts keeps no right response, the others one at most; every wrong one stays."""
    kept: list[Row] = []
    for found in by_prompt(rows).values():
        wanted = int(rng.random() >= without)
        positives = [row for row in found if row.label][:wanted]
        kept += [row for row in found if not row.label or any(row is one for one in positives)]
    return kept[:most]


def stitching(rows: Sequence[Row]) -> list[Row]:
    """The wrong responses to prompts whose every step is right in one of them; the reward is minus the number of wrong steps, the
    label says the best to its prompt that is not also the worst."""
    kept: list[Row] = []
    for prompt, found in by_prompt(rows).items():
        wrong = [row for row in found if not row.label and wrong_steps(row)]
        lines = (len(prompt) - 2) // 2 + 1  # one a step, and the answer
        right_somewhere = {i for row in wrong for i, reward in enumerate(row.step_rewards or ()) if reward == RIGHT}
        if not right_somewhere >= set(range(lines)):
            continue
        counts = [wrong_steps(row) for row in wrong]
        kept += [
            replace(row, reward=-float(count), label=count == min(counts) < max(counts))
            for row, count in zip(wrong, counts)
        ]
    return kept


def paid_at_steps(rows: Sequence[Row]) -> list[Row]:
    """The same returns as those of `stitching`, paid where a step is wrong in the place of at the end."""
    return [replace(row, reward=0.0) for row in rows]


def right_answers_and_prefixes(rows: Sequence[Row]) -> list[Row]:
    """Responses whose answer is right as they are, whatever their steps are labelled, and of the others what stands before the
    first step that is labelled wrong. Others without such a step are left out: some label of theirs is wrong."""
    cut = right_prefixes([row for row in rows if not row.label and wrong_steps(row)])
    return [*(row for row in rows if row.label), *cut]


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
