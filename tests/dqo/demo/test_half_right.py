"""Half-right responses, of demonstrations by the fallible author."""

import random

import pytest

from dqo.demo.half_right import half_right, noisy_steps
from dqo.demo.rollouts import distinct_problems, graded_rows
from dqo.grading.arith import ArithTask

TASK = ArithTask(4, 6, hard_share=0.4)


@pytest.fixture(scope="module")
def samples():
    """8 responses to each of 120 prompts; one did not end."""
    rng = random.Random(3)
    rows = []
    for prompt in distinct_problems(TASK, rng, 120, set()):
        rows += graded_rows(TASK, prompt, [(TASK.demonstration(prompt, rng), True) for _ in range(8)])
    prompt = rows[0].prompt
    return [*graded_rows(TASK, prompt, [(TASK.solution(prompt)[:-1], False)]), *rows]


def test_half_right_responses_are_wrong_with_half_of_the_steps_right_and_a_tenth_is_right(samples):
    rows = half_right(samples, random.Random(0), 0.1, 200)
    assert len(rows) == 200 and sum(row.label for row in rows) == 20
    for row in rows:
        grade = TASK.grade(row.prompt, row.completion)
        assert row.label or 2 * grade.step_correct.count(True) >= len(grade.step_correct) > grade.step_correct.count(
            True
        )
    assert {row.prompt for row in rows if row.label} <= {row.prompt for row in rows if not row.label}  # for pairs
    whole = half_right(samples, random.Random(0), 0.1, None)
    assert len(whole) > 200 and sum(row.label for row in whole) == round(0.1 * len(whole))
    prompts = [row.prompt for row in rows]
    assert len(set(prompts)) == 1 + sum(a != b for a, b in zip(prompts, prompts[1:]))  # one behind the other


def test_where_few_are_right_all_of_them_are_taken(samples):
    few = [row for row in samples if not row.label] + [row for row in samples if row.label][:3]
    rows = half_right(few, random.Random(0), 0.1, 200)
    assert 0 < sum(row.label for row in rows) <= 3 and sum(not row.label for row in rows) == 180


def test_noise_turns_a_fifth_of_the_labels_over_and_nothing_else(samples):
    noisy = noisy_steps(samples, random.Random(0), 0.2)
    pairs = [(a, b) for row, other in zip(samples, noisy) for a, b in zip(row.step_rewards, other.step_rewards)]
    assert {a for a, b in pairs if a != b} == {0.0, -1.0} == {b for _, b in pairs}  # both ways
    distinct = {(row.prompt, row.completion): len(row.step_rewards) for row in samples}
    turned = {
        (row.prompt, row.completion, i)
        for row, other in zip(samples, noisy)
        for i, (a, b) in enumerate(zip(row.step_rewards, other.step_rewards))
        if a != b
    }
    assert len(distinct) < len(samples) and len(turned) == round(0.2 * sum(distinct.values()))
    labels = {(row.prompt, row.completion, *row.step_rewards) for row in noisy}
    assert len(labels) == len(distinct)  # one annotator's for each response
    assert [(r.prompt, r.completion, r.reward) for r in noisy] == [(r.prompt, r.completion, r.reward) for r in samples]
    assert noisy_steps(samples, random.Random(1), 0.2) != noisy
