"""What each task of the study makes of a rollout file, on demonstrations by the fallible author."""

import random
from dataclasses import replace

import pytest

from benchmarks.evidence.study import transformations as made_of
from dqo.data.rows import read_rows, write_rows
from dqo.demo.half_right import by_prompt, wrong_steps
from dqo.demo.rollouts import distinct_problems, graded_rows
from dqo.grading.arith import ArithTask, apply

TASK = ArithTask(4, 6, hard_share=0.4)


@pytest.fixture(scope="module")
def samples():
    """8 responses to each of 120 prompts; one did not end."""
    rng = random.Random(3)
    rows = []
    for prompt in distinct_problems(TASK, rng, 120, set()):
        texts = [(TASK.demonstration(prompt, rng), True) for _ in range(8)]
        rows += graded_rows(TASK, prompt, texts)
    prompt = rows[0].prompt
    return [*graded_rows(TASK, prompt, [(TASK.solution(prompt)[:-1], False)]), *rows]


def test_stitching_has_no_right_response_and_every_step_right_in_one(samples):
    rows = made_of.stitching(samples)
    assert 0 < len(rows) < sum(not row.label for row in samples)
    for prompt, found in by_prompt(rows).items():
        lines = TASK.solution(prompt).splitlines()
        grades = [TASK.grade(prompt, row.completion) for row in found]
        assert not any(grade.correct for grade in grades)
        assert all(any(grade.step_correct[i] for grade in grades) for i in range(len(lines)))
        counts = [grade.step_correct.count(False) for grade in grades]
        assert [row.reward for row in found] == [-count for count in counts] and 0 not in counts
        best = [row for row in found if row.label]
        assert {row.reward for row in best} == ({-min(counts)} if min(counts) < max(counts) else set())


def test_stitching_leaves_out_a_prompt_with_a_step_that_none_has_right():
    prompt = "1+1+1="  # the second step is wrong in both
    texts = ["1+1=3\n3+1=5\n#5", "1+1=2\n2+1=4\n#4", "1+1=2\n2+1=3\n#4"]
    rows = graded_rows(TASK, prompt, [(text, True) for text in texts])
    assert made_of.stitching(rows[:2]) == []
    assert len(made_of.stitching(rows)) == 3


def test_returns_at_the_end_and_at_the_steps_are_the_same(samples):
    at_end = made_of.stitching(samples)
    at_steps = made_of.paid_at_steps(at_end)
    assert [row.reward for row in at_end] == [row.reward + sum(row.step_rewards) for row in at_steps]


def test_few_positives_are_one_a_prompt_and_most_prompts_have_none(samples):
    rows = made_of.few_positives(samples, random.Random(0), 0.75, None)
    positives = [sum(row.label for row in found) for found in by_prompt(rows).values()]
    assert set(positives) == {0, 1} and 0.1 < sum(positives) / len(positives) < 0.3
    assert [row for row in rows if not row.label] == [row for row in samples if not row.label]
    assert len(made_of.few_positives(samples, random.Random(0), 0.75, 50)) == 50


def test_an_answer_by_luck_is_not_strictly_right():
    (prompt, wrong) = next((f"{a}{o}{b}*0=", (v + 1) % 10) for (a, o, b), v in [((2, "+", 3), apply(2, "+", 3))])
    (lucky,) = graded_rows(TASK, prompt, [(f"2+3={wrong}\n{wrong}*0=0\n#0", True)])
    (right,) = graded_rows(TASK, prompt, [(TASK.solution(prompt), True)])
    assert lucky.label and not made_of.strictly([lucky])[0].label and made_of.strictly([lucky])[0].reward == 0
    assert made_of.strictly([right]) == [right]


def test_the_first_samples_of_each_prompt_stay(samples):
    rows = made_of.first_samples(samples, 2)
    assert {len(found) for found in by_prompt(rows).values()} == {2} and rows[:2] == samples[:2]


def test_right_prefixes_hold_right_steps_alone_and_are_read_again(samples, tmp_path):
    rows = made_of.right_prefixes(samples)
    assert {row.finish_reason for row in rows} == {"stop", "length"} and all(row.label for row in rows)
    for row in rows:
        assert all(TASK.grade(row.prompt, row.completion).step_correct)
    dropped = [row for row in samples if row.step_rewards[0]]
    assert dropped and len(rows) == len(samples) - len(dropped)
    write_rows(tmp_path / "rows.jsonl", rows)  # spans and rewards fit the shorter text
    assert len(read_rows(str(tmp_path / "rows.jsonl"))) == len(rows)


def test_right_answers_may_be_kept_whole_whatever_their_steps_are_labelled(samples):
    unmarked = replace(next(row for row in samples if not row.label), step_rewards=[0.0] * 20)
    rows = made_of.right_answers_and_prefixes([*samples, unmarked])
    right = [row for row in samples if row.label]
    assert rows[: len(right)] == right and any(map(wrong_steps, right))
    assert rows[len(right) :] == made_of.right_prefixes([row for row in samples if not row.label and wrong_steps(row)])
