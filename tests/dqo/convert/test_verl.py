"""verl's data: rows written here after its published schema."""

import logging

import pytest

from dqo.convert.verl import convert_verl
from dqo.errors import UserError
from tests.dqo.convert.sources import assistant, user, write

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [user("1+1?")],
    "ability": "math",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"index": 5, "split": "train"},
}


@pytest.mark.parametrize("column", ["scores", "rewards"])
def test_responses_with_scores_are_rows(tmp_path, column):
    rows, counts = convert_verl(write(tmp_path, VERL | {"responses": ["2", "3"], column: [1.0, 0.25]}))
    assert [(row.reward, row.label) for row in rows] == [(1.0, True), (0.25, False)]
    assert rows[0].prompt == [user("1+1?")] and rows[0].completion == [assistant("2")]
    assert (rows[0].prompt_id, rows[0].answer, counts) == ("openai/gsm8k/train/5", "2", {})


def test_responses_without_scores_are_graded_by_their_answer(tmp_path, caplog):
    responses = ["so #### 2", "so \\boxed{2.0}", "\\boxed{3}", "two"]
    with caplog.at_level(logging.WARNING):
        rows, counts = convert_verl(write(tmp_path, VERL | {"responses": responses}))
    assert [row.reward for row in rows] == [1.0, 1.0, 0.0, 0.0]
    assert counts == {"graded_here": 4, "without_an_answer": 1}
    assert "compared with the ground truth" in caplog.text


@pytest.mark.parametrize(
    "change, part",
    [
        ({}, "source.jsonl: these are prompts only; found data_source, .* main_generation adds the column responses"),
        ({"responses": ["two"]}, "has no scores, and no response has a"),
        (
            {"responses": ["2"], "reward_model": {}},
            "source.jsonl:1: has no scores, and reward_model.ground_truth is null",
        ),
        ({"responses": ["2", "3"], "scores": [1.0]}, "source.jsonl:1: scores has 1 values, and there are 2 responses"),
        ({"responses": ["2"], "scores": ["1"]}, r'source.jsonl:1: scores\[0\] is "1", a string'),
        ({"responses": [""], "scores": [1.0]}, r'source.jsonl:1: responses\[0\] is ""'),
        ({"responses": ["2"], "scores": [1.0], "prompt": None}, "source.jsonl:1: prompt is null; expected a list"),
    ],
)
def test_rows_without_what_training_needs_are_refused_with_the_cure(tmp_path, change, part):
    with pytest.raises(UserError, match=part):
        convert_verl(write(tmp_path, VERL | change))


def test_a_response_of_several_turns_keeps_its_messages_and_is_graded_by_its_last(tmp_path):
    turns = [assistant("#### 7"), {"role": "tool", "content": "2"}, assistant("so #### 2")]
    rows, counts = convert_verl(write(tmp_path, VERL | {"responses": [turns, "#### 7"]}))
    assert [(row.reward, row.completion) for row in rows] == [(1.0, turns), (0.0, [assistant("#### 7")])]
    assert counts["graded_here"] == 2
    with pytest.raises(UserError, match=r"responses\[0\] is .*; expected a string, or the messages of several turns"):
        convert_verl(write(tmp_path, VERL | {"responses": [[user("2")]]}))
