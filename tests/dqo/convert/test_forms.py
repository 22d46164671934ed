"""Other trainers' data: rows written here after their published schemas."""

import json
import logging

import pytest

from dqo.convert.forms import (
    convert_open_r1,
    convert_oreo,
    convert_trl_kto,
    convert_trl_preference,
    convert_trl_stepwise,
    convert_verl,
)
from dqo.errors import UserError


def write(folder, *rows):
    path = folder / "source.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_preference_rows_are_two_rows(tmp_path):
    rows, counts = convert_trl_preference(
        write(tmp_path, {"prompt": "The sky is", "chosen": " blue", "rejected": " red"})
    )
    assert [(row.prompt, row.completion, row.reward) for row in rows] == [
        ("The sky is", " blue", 1.0),
        ("The sky is", " red", 0.0),
    ]
    assert counts == {"pairs": 1, "implicit_prompts": 0}


@pytest.mark.parametrize(
    "chosen, rejected, prompt, completions",
    [
        ("The sky is blue.", "The sky is black.", "The sky is", [" blue.", " black."]),
        ("sky?\n\nyes", "sky?\n\nno", "sky?\n\n", ["yes", "no"]),
        ("The sky is", "The sky is", None, None),
        (
            [user("sky?"), assistant("blue")],
            [user("sky?"), assistant("red")],
            [user("sky?")],
            [[assistant("blue")], [assistant("red")]],
        ),
        ("a", "b", None, None),
    ],
)
def test_an_implicit_prompt_is_what_both_begin_with(tmp_path, chosen, rejected, prompt, completions):
    source = write(tmp_path, {"chosen": chosen, "rejected": rejected})
    if prompt is None:
        with pytest.raises(UserError, match="source.jsonl:1: .*(share no beginning|do not differ)"):
            convert_trl_preference(source)
        return
    rows, counts = convert_trl_preference(source)
    assert [row.prompt for row in rows] == [prompt, prompt]
    assert [row.completion for row in rows] == completions
    assert counts["implicit_prompts"] == 1


def test_conversations_that_repeat_the_prompt_lose_it(tmp_path):
    both = {"prompt": "sky?", "chosen": [user("sky?"), assistant("blue")], "rejected": [user("sky?"), assistant("red")]}
    rows, _ = convert_trl_preference(write(tmp_path, both))
    assert rows[0].prompt == [user("sky?")] and rows[0].completion == [assistant("blue")]


def test_turns_that_both_share_follow_the_prompt(tmp_path):
    shared = [assistant("blue"), user("sure?")]
    turns = {"prompt": [user("sky?")], "chosen": [*shared, assistant("yes")], "rejected": [*shared, assistant("no")]}
    rows, _ = convert_trl_preference(write(tmp_path, turns))
    assert rows[0].prompt == [user("sky?"), *shared] and rows[1].completion == [assistant("no")]


def test_unpaired_preferences_are_rows_with_labels(tmp_path):
    labelled = {"prompt": "The sky is", "completion": " blue", "label": True}
    rows, _ = convert_trl_kto(write(tmp_path, labelled, labelled | {"completion": " red", "label": False}))
    assert [(row.reward, row.label) for row in rows] == [(1.0, True), (0.0, False)]
    with pytest.raises(UserError, match="no row has label"):
        convert_trl_kto(write(tmp_path, {"prompt": "p", "completion": "c", "reward": 1.0}))


def test_stepwise_rows_are_one_row_of_steps(tmp_path):
    rows, _ = convert_trl_stepwise(write(tmp_path, {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}))
    assert (rows[0].completion, rows[0].step_rewards, rows[0].reward) == ("a\nb", [1.0, 0.0], 0.0)


def test_oreo_rows_are_rows(tmp_path):
    rows, _ = convert_oreo(write(tmp_path, {"prompt": "p", "response": "r", "reward": 0.5}))
    assert (rows[0].completion, rows[0].reward) == ("r", 0.5)


def test_rows_of_another_form_are_named_by_their_columns(tmp_path):
    source = write(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"})
    with pytest.raises(UserError, match="has the columns prompt, response, reward; found prompt, chosen, rejected"):
        convert_oreo(source)


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


def test_open_r1_generations_are_rows_and_any_grader_calls_them_right(tmp_path):
    rows, _ = convert_open_r1(write(tmp_path, OPEN_R1))
    assert [row.completion for row in rows] == OPEN_R1["generations"]
    assert [row.label for row in rows] == [True, False, False, True]
    assert [row.finish_reason for row in rows] == ["stop", "stop", "length", "stop"]
    assert {(row.prompt, row.answer, row.prompt_id) for row in rows} == {("1+1?\n", "2", "u1")}
    assert rows[1].source == "source.jsonl:1, generation 2"


def test_open_r1_without_finish_reasons_incomplete_reasoning_was_cut(tmp_path):
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
def test_open_r1_rows_of_another_form_are_refused(tmp_path, change, part):
    with pytest.raises(UserError, match=f"source.jsonl:1: {part}"):
        convert_open_r1(write(tmp_path, OPEN_R1 | change))


VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [user("1+1?")],
    "ability": "math",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"index": 5, "split": "train"},
}


@pytest.mark.parametrize("column", ["scores", "rewards"])
def test_verl_responses_with_scores_are_rows(tmp_path, column):
    rows, counts = convert_verl(write(tmp_path, VERL | {"responses": ["2", "3"], column: [1.0, 0.25]}))
    assert [(row.reward, row.label) for row in rows] == [(1.0, True), (0.25, False)]
    assert rows[0].prompt == [user("1+1?")] and rows[0].completion == [assistant("2")]
    assert (rows[0].prompt_id, rows[0].answer, counts) == ("openai/gsm8k/train/5", "2", {})


def test_verl_responses_without_scores_are_graded_by_their_answer(tmp_path, caplog):
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
def test_verl_rows_without_what_training_needs_are_refused_with_the_cure(tmp_path, change, part):
    with pytest.raises(UserError, match=part):
        convert_verl(write(tmp_path, VERL | change))
