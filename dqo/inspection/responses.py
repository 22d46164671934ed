"""Which rows of a file are shown, and what is shown of each response."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dqo.credit.implied import Implied, Start
from dqo.credit.steps import step_index, step_sums
from dqo.data.marks import Marks
from dqo.data.rows import Row
from dqo.data.stored import column
from dqo.errors import UserError

_LINE = re.compile(r"(\d+)(?:, [^,]*)?$")  # of "rollouts.jsonl:12" and "rollouts.jsonl:12, completion 3"
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Response:
    """One response on its tokens. T is the number of its actions, L of its tokens with the environment's among them."""

    source: str
    prompt: str
    label: bool
    reward: float  # of the outcome, as the run was paid
    texts: list[str]  # (L,)
    actions: np.ndarray  # (T,) places of the actions among the texts
    scores: dict[str, np.ndarray]  # (T,) each: the views, and logprobs and ref_logprobs
    rewards: np.ndarray  # (T,) what each token is paid
    step_ends: list[int]  # index of the last action of each step
    first_wrong_step: int | None  # counted from 0; None: no step is wrong, or none is labelled
    labelled: bool  # whether its steps have labels
    implied: Implied | None  # None: the discount is 0
    start: Start
    terminated: bool  # whether its last state is worth nothing

    @property
    def step_sums(self) -> np.ndarray:
        """(S,) the advantage of each step."""
        return step_sums(self.scores["advantage"], self.step_ends)

    @property
    def lowest_step(self) -> int | None:
        return int(self.step_sums.argmin()) if self.step_ends else None

    @property
    def step_of_text(self) -> np.ndarray:
        """(L,) the step of each token; the environment's belong to the step before them."""
        found = np.zeros(len(self.texts), int)
        found[self.actions] = step_index(self.step_ends, len(self.actions))
        return np.maximum.accumulate(found)

    @property
    def action_of_text(self) -> list[int | None]:
        """(L,) the index of each token among the actions; None: the environment wrote it."""
        index: list[int | None] = [None] * len(self.texts)
        for t, place in enumerate(self.actions):
            index[place] = t
        return index


@dataclass(frozen=True)
class Inspection:
    """What is known of the responses that are shown."""

    directory: str
    method: str
    beta: float
    responses: list[Response]
    scales: dict[str, float]  # {view: the size that has its full colour}
    notes: list[str]  # what a reader must know of all of them

    @property
    def found(self) -> tuple[int, int, float]:
        """Responses whose lowest step is the first wrong one, those that have a wrong step, and how many chance would find."""
        wrong = [r for r in self.responses if r.first_wrong_step is not None]
        hits = sum(r.lowest_step == r.first_wrong_step for r in wrong)
        return hits, len(wrong), sum(1 / len(r.step_ends) for r in wrong)


def chosen(rows: Sequence[Row], count: int, lines: Sequence[str], marks: Marks) -> list[int]:
    """Indices of the rows to show: those of the `lines`, "12" or "3-7"; without any `count` of distinct prompts, right and wrong
    ones alike, and of wrong ones those whose wrong step is known first. `marks`: of wrong steps.

    Raises:
        UserError: for lines that are none, or have no row.
    """
    if lines:
        return _of_lines(rows, lines)
    labels, of_prompt = column(rows, "label"), column(rows, "prompt").tolist()
    wrong, paid = np.flatnonzero(~labels).tolist(), column(rows, "paid") > 0
    unknown = {i: not paid[i] or marks.first_wrong(rows[i]) is None for i in wrong}
    waiting = {False: iter(sorted(wrong, key=unknown.__getitem__)), True: iter(np.flatnonzero(labels).tolist())}
    prompts: set[int] = set()
    found: dict[bool, list[int]] = {False: [], True: []}
    left = [False, True]
    while left:  # a wrong one and a right one by turns
        for kind in tuple(left):
            taken = next((i for i in waiting[kind] if of_prompt[i] not in prompts), None)
            if taken is None:
                left.remove(kind)
            elif len(prompts) < count:
                prompts.add(of_prompt[taken])
                found[kind].append(taken)
        if len(prompts) == count:
            break
    return found[False] + found[True]


def _of_lines(rows: Sequence[Row], lines: Sequence[str]) -> list[int]:
    by_line: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        number = _LINE.search(row.source)
        by_line.setdefault(int(number.group(1)) if number else i + 1, []).append(i)
    found: dict[int, None] = {}
    for text in lines:
        span = _RANGE.fullmatch(text)
        if span is None:
            raise UserError(f"rows: {text!r} is no line; give lines such as 12, or 3-7")
        first, last = int(span.group(1)), int(span.group(2) or span.group(1))
        there = [i for line in by_line if first <= line <= last for i in by_line[line]]
        if not there:
            raise UserError(
                f"rows: no row is in line {text}; the file has rows in lines {min(by_line)} to {max(by_line)}"
            )
        found |= dict.fromkeys(there)
    return list(found)


def siblings(rows: Sequence[Row], shown: Sequence[int]) -> list[int]:
    """Indices of all other rows with the prompts of those that are shown."""
    prompts = column(rows, "prompt")
    same = np.isin(prompts, prompts[list(shown)])
    same[list(shown)] = False
    return np.flatnonzero(same).tolist()
