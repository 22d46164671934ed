"""Solutions whose steps are labelled right or wrong, of public sets, and how well scores of steps agree with the labels."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dqo.convert.entry import FORMATS
from dqo.convert.gsm8k import without_annotations
from dqo.credit.quality import auc_within_prompt, chance_of_wrong, lowest_is_wrong
from dqo.data.rows import Row
from dqo.errors import UserError
from dqo.stats import Interval, auc_interval

# format: (files, whether a step's number in the set calls it wrong)
SETS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "prm800k": ("*prm800k*.jsonl", lambda rating: rating < 0),
    "math-shepherd": ("*math-shepherd*.jsonl", lambda some_completion_is_right: some_completion_is_right == 0),
    "math-aps": ("*math-aps*.jsonl", lambda share_of_right_completions: share_of_right_completions == 0),
    "gsm8k-solutions": ("*example_model_solutions*.jsonl", lambda penalty: penalty < 0),
}
NEEDS = (
    "it needs the published files of PRM800K (phase2_test.jsonl renamed to prm800k.jsonl), Math-Shepherd (math-shepherd.jsonl), "
    "MATH-APS (math-aps.jsonl) or GSM8K (example_model_solutions.jsonl), of which at least one set has step labels and one "
    "problems with right and wrong solutions that ended; a part of each set will do"
)
RESPONSES_A_PROBLEM = 4


def problem_of(row: Row) -> str:
    """Letters and digits of the prompt: one problem in two sets is one problem."""
    assert isinstance(row.prompt, str)  # as the converters write it
    return "".join(filter(str.isalnum, row.prompt.lower()))


def read_sets(data: Path) -> dict[str, list[Row]]:
    """{format: its distinct solutions}, with step_rewards 1 (right) and 0 (wrong), without calculator annotations.

    Raises:
        UserError: where no file of any set lies below `data`.
    """
    found: dict[str, list[Row]] = {}
    for name, (pattern, wrong) in SETS.items():
        distinct: dict[tuple[str, str], Row] = {}
        for path in sorted(data.rglob(pattern)):
            for row in FORMATS[name](path).rows:
                labels = [float(not wrong(number)) for number in row.step_rewards or ()]
                row = without_annotations(replace(row, step_rewards=labels, sampling={"set": name}))
                distinct.setdefault((problem_of(row), str(row.completion)), row)
        if distinct:
            found[name] = list(distinct.values())
    if not found:
        raise UserError(f"{data}: no set of labelled solutions lies there; {NEEDS}")
    return found


def first_wrong(row: Row) -> int | None:
    """The first step, from 0, whose label is wrong."""
    return next((i for i, label in enumerate(row.step_rewards or ()) if label == 0), None)


def labelled_solutions(sets: dict[str, list[Row]], count: int, fits: Callable[[Row], bool]) -> list[Row]:
    """At most `count` solutions of two steps or more that fit: of each set in turn, in each set of problem after problem, those
    with a wrong step first."""
    queues = [_in_turn([row for row in _testable(name, rows) if fits(row)]) for name, rows in sets.items()]
    chosen: list[Row] = []
    while len(chosen) < count and any(queues):
        chosen += [queue.pop(0) for queue in queues if queue][: count - len(chosen)]
    return chosen


def _testable(name: str, rows: list[Row]) -> list[Row]:
    """Calculator annotations call few of GSM8K's steps wrong: there problems with such a step are taken, and the rest trains."""
    rows = [row for row in rows if row.steps and len(row.steps) > 1]
    if name != "gsm8k-solutions":
        return rows
    problems = {problem_of(row) for row in rows if first_wrong(row) is not None}
    return [row for row in rows if problem_of(row) in problems]


def _in_turn(rows: list[Row]) -> list[Row]:
    problems: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: first_wrong(row) is None):
        problems[problem_of(row)].append(row)
    longest = max(map(len, problems.values()), default=0)
    return [found[i] for i in range(longest) for found in problems.values() if i < len(found)]


def outcome_rows(
    sets: dict[str, list[Row]], tested: Iterable[Row], count: int, fits: Callable[[Row], bool], seed: int
) -> list[Row]:
    """About `count` solutions that ended, without steps: all that is known of them is whether their answer is right. Of problems
    that have right and wrong ones, and none of which is tested.

    Raises:
        UserError: where no problem is left.
    """
    taken = {problem_of(row) for row in tested}
    problems: dict[str, list[Row]] = defaultdict(list)
    for rows in sets.values():
        for row in rows:
            if problem_of(row) not in taken and row.finish_reason == "stop" and fits(row):
                problems[problem_of(row)].append(replace(row, steps=None, step_rewards=None))
    mixed = [rows for _, rows in sorted(problems.items()) if len({row.label for row in rows}) == 2]
    rng = random.Random(seed)
    rng.shuffle(mixed)
    chosen: list[Row] = []
    for rows in mixed:
        if len(chosen) >= count:
            break
        right, wrong = ([row for row in rows if row.label == kind] for kind in (True, False))
        both = [row for pair in zip(right, wrong) for row in pair]
        chosen += (both + right[len(wrong) :] + wrong[len(right) :])[:RESPONSES_A_PROBLEM]
    if not chosen:
        raise UserError(f"no problem with right and wrong solutions that ended is left to train on; {NEEDS}")
    return chosen


def agreement(rows: Sequence[Row], scores: Sequence[np.ndarray]) -> dict[str, Interval | None]:
    """How well `scores`, (S,) of each row's steps, agree with its labels.

    Steps behind the first wrong one are left out: what follows an error is labelled otherwise in each set. Solutions of a tree
    share their first steps, and each counts once.

    Returns:
        auc: of right against wrong steps; auc_of_a_state: the same among steps that follow the same text, so that position and
        difficulty are out of it; lowest: the share of solutions whose lowest step is the first wrong one; chance: that share for
        a step drawn at random. Intervals are over problems, that of auc_of_a_state over states.
    """
    distinct: dict[tuple[str, str], tuple[float, bool, str, str]] = {}
    for row, values in zip(rows, scores):
        wrong = first_wrong(row)
        judged = list(zip(row.steps or (), values))[: None if wrong is None else wrong + 1]
        for i, ((begin, end), value) in enumerate(judged):
            before, text = str(row.completion)[:begin], str(row.completion)[:end]
            problem = problem_of(row)
            distinct.setdefault((problem, text), (float(value), i != wrong, problem, f"{problem} {before}"))
    values, labels, problems, states = map(list, zip(*distinct.values()))
    steps = [(problem_of(row), np.asarray(found), first_wrong(row)) for row, found in zip(rows, scores)]
    return {
        "auc": auc_interval(values, labels, problems),
        "auc_of_a_state": auc_within_prompt(values, labels, states),
        "lowest": lowest_is_wrong(steps),
        "chance": chance_of_wrong(steps),
    }


def counted(rows: Sequence[Row]) -> dict[str, int]:
    """How many problems, solutions, solutions with a wrong step, and steps up to it that are right and wrong."""
    found = [first_wrong(row) for row in rows]
    right = sum(len(row.steps or ()) if wrong is None else wrong for row, wrong in zip(rows, found))
    return {
        "problems": len({problem_of(row) for row in rows}),
        "solutions": len(rows),
        "with_a_wrong_step": sum(wrong is not None for wrong in found),
        "right_steps": right,
    }
