"""The table of credit: its rows, its numbers, and responses whose mistakes training never saw."""

import pytest

from benchmarks.evidence.credit import METHODS, Unseen, summary, table, unseen_rows
from benchmarks.evidence.objective_options import OPTIONS
from dqo.grading.arith import ArithTask, apply
from dqo.objectives.registry import OBJECTIVES


def test_the_methods_are_such_and_have_options():
    assert set(METHODS) <= set(OBJECTIVES) and set(METHODS) <= set(OPTIONS)


def test_unseen_mistakes_are_at_entries_that_the_demonstrations_have_right():
    known = ArithTask(6, 10)
    task = Unseen(6, 10, seed=1, known=known)
    assert 40 < len(task.mistakes) < 75 and not task.mistakes.keys() & known.mistakes.keys()
    rows = unseen_rows(problems=20, samples=4)
    assert {row.label for row in rows} == {True, False} and len(rows) == 80
    made = 0
    for row in rows:
        for (begin, end), reward in zip(row.steps[:-1], row.step_rewards):
            value, operator, operand = (
                int(row.completion[begin]),
                row.completion[begin + 1],
                int(row.completion[begin + 2]),
            )
            right = int(row.completion[end - 2]) == apply(value, operator, operand)
            assert right == (reward == 0)
            made += not right
            assert right or (value, operator, operand) in task.mistakes
    assert made > 40


def predictor(auc, found, **more):
    interval = [auc - 0.02, auc + 0.02]
    return {
        "name": "a score",
        "method": "m",
        "auc": auc,
        "interval": interval,
        "n": 9,
        "within": None,
        "found": found,
    } | more


def test_seeds_are_averaged_and_their_range_is_kept():
    seeds = [predictor(0.8, [0.6, 0.5, 0.7]), predictor(0.9, [0.7, 0.6, 0.8])]
    rows = summary({"m": seeds, "initial model": [predictor(0.7, None)]})
    assert [(row["method"], row["score"], row["seeds"]) for row in rows] == [
        ("m", "a score", 2),
        ("initial model", "a score", 1),
    ]
    assert rows[0]["auc"] == pytest.approx({"mean": 0.85, "low": 0.83, "high": 0.87, "least": 0.8, "most": 0.9})
    assert rows[0]["found"]["mean"] == pytest.approx(0.65) and "within" not in rows[0] and "found" not in rows[1]
    chance = {"found": [0.11, 0.1, 0.12], "found_in_half": None, "n": 5}
    lines = table(rows, chance).splitlines()
    assert lines[2] == "| m | a score | 0.850 (0.830–0.870) |  | 65.0 (55.0–75.0) |  |"
    assert lines[4] == "| | a step drawn by chance | 0.500 | 0.500 | 11.0 |  |"
    assert len({line.count("|") for line in lines}) == 1
