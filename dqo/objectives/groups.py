"""Groups that objectives share: the responses of each prompt, and pairs of a better and a worse one."""

from __future__ import annotations

import numpy as np

from dqo.objectives.base import Columns


def by_prompt(prompt: np.ndarray) -> list[np.ndarray]:
    """Indices of each prompt's responses, in the order of the data, as the prompts are: by their first response."""
    order = np.argsort(prompt, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(prompt[order])) + 1) if len(order) else []
    return sorted(parts, key=lambda rows: rows[0])


def pairs(columns: Columns, most: int) -> np.ndarray:
    """(P, 2): indices of a better and a worse response to one prompt, at most `most` pairs of each prompt: its best with its
    worst, the next of each, and so on; every response is used before one is used again. Prompts whose responses share one
    reward give none."""
    found: list[tuple[int, int]] = []
    for rows in by_prompt(columns.prompt):
        ranked = rows[np.argsort(-columns.reward[rows], kind="stable")]  # the order of the data among equals
        rewards = columns.reward[ranked]
        better, worse = ranked[rewards > rewards[-1]], ranked[rewards < rewards[0]][::-1]
        for i in range(min(most, max(len(better), len(worse)))):
            chosen, rejected = better[i % len(better)], worse[i % len(worse)]
            if columns.reward[chosen] > columns.reward[rejected]:
                found.append((chosen, rejected))
    return np.array(found, dtype=np.int64).reshape(-1, 2)
