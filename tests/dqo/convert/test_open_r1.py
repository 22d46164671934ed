"""open-r1's data: rows written here after its published schema."""

import pytest

from dqo.convert.open_r1 import convert_open_r1
from dqo.errors import UserError
from tests.dqo.convert.sources import write

OPEN_R1 = {
    "problem": "1+1?",
    "answer": "2",
    "uuid": "u1",
    "generations": ["<think>a</think> 2", "<think>b</think> 3", "<think>c", "<think>d</think> two"],
    "correctness_math_verify": [True, False, False, False],
    "correctness_llama": [None, False, False, True],
    "correctness_count": 2,
    "is_reasoning_complete": [True, True, False, True],
    "finish_reasons": ["stop", "stop", "length", "stop"],
}


def test_generations_are_rows_and_any_grader_calls_them_right(tmp_path):
    rows, _ = convert_open_r1(write(tmp_path, OPEN_R1))
    assert [row.completion for row in rows] == OPEN_R1["generations"]
    assert [row.label for row in rows] == [True, False, False, True]
    assert [row.finish_reason for row in rows] == ["stop", "stop", "length", "stop"]
    assert {(row.prompt, row.answer, row.prompt_id) for row in rows} == {("1+1?\n", "2", "u1")}
    assert rows[1].source == "source.jsonl:1, generation 2"


def test_without_finish_reasons_incomplete_reasoning_was_cut(tmp_path):
    rows, _ = convert_open_r1(write(tmp_path, OPEN_R1 | {"finish_reasons": None, "correctness_llama": None}))
    assert [row.finish_reason for row in rows] == ["stop", "stop", "length", "stop"]
    assert [row.label for row in rows] == [True, False, False, False]


@pytest.mark.parametrize(
    "change, part",
    [
        ({"generations": None}, "generations is null; expected a list"),
        ({"generations": ["", "b", "c", "d"]}, r'generations\[0\] is ""; expected a string'),
        ({"correctness_llama": [True]}, "correctness_llama has 1 values, and there are 4 responses"),
        ({"correctness_llama": None, "correctness_math_verify": None}, "has no verdicts; expected a list such as"),
        (
            {"correctness_math_verify": ["yes", True, True, True]},
            r'correctness_math_verify\[0\] is "yes"; expected true',
        ),
    ],
)
def test_rows_of_another_form_are_refused(tmp_path, change, part):
    with pytest.raises(UserError, match=f"source.jsonl:1: {part}"):
        convert_open_r1(write(tmp_path, OPEN_R1 | change))
