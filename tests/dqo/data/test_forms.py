import math

import pytest

from dqo.data.rows import read_rows
from tests.dqo.row_cases import ASSISTANT, GOOD, OTHER, USER, refusal, says, write

# Other forms


def test_a_grouped_row_is_one_row_a_completion():
    grouped = {
        "prompt": "p",
        "answer": "4",
        "completions": ["a\nb", "c"],
        "rewards": [1, 0],
        "step_rewards": [[0.5, 0.5], [-1]],
        "finish_reasons": ["stop", "length"],
    }
    first, second = read_rows([grouped])
    assert (first.completion, first.reward, first.finish_reason) == ("a\nb", 1.0, "stop")
    assert (first.steps, first.step_rewards) == ([(0, 2), (2, 3)], [0.5, 0.5])
    assert (second.completion, second.reward, second.finish_reason) == ("c", 0.0, "length")
    assert (second.steps, second.step_rewards) == ([(0, 1)], [-1.0])
    assert first.answer == second.answer == "4"
    assert (first.source, second.source) == ("row 1, completion 1", "row 1, completion 2")


def test_a_preference_row_is_a_right_and_a_wrong_row(tmp_path):
    row = {"prompt": "p", "chosen": "good", "rejected": "bad", "score_chosen": 9}
    chosen, rejected = read_rows(write(tmp_path, row))
    assert (chosen.completion, chosen.reward, chosen.label) == ("good", 1.0, True)
    assert (rejected.completion, rejected.reward, rejected.label) == ("bad", 0.0, False)
    assert rejected.source == "rollouts.jsonl:1, rejected"


def test_a_stepwise_row_is_one_response_with_steps():
    (row,) = read_rows([{"prompt": "p", "completions": ["one", "two", "x"], "labels": [True, 1, False]}])
    assert row.completion == "one\ntwo\nx"
    assert [row.completion[a:b] for a, b in row.steps] == ["one\n", "two\n", "x"]
    assert (row.step_rewards, row.reward, row.label) == ([1.0, 1.0, 0.0], 0.0, False)


def test_a_stepwise_row_is_rewarded_when_every_step_is_right_or_by_its_own_reward():
    base = {"prompt": "p", "completions": ["one", "two"], "labels": [True, 0.8]}
    assert read_rows([base])[0].reward == 1.0
    assert read_rows([base], reward_threshold=0.9)[0].reward == 0.0
    assert read_rows([{**base, "reward": 0.25}])[0].reward == 0.25


def test_an_oreo_row_calls_the_completion_response():
    (row,) = read_rows([{"prompt": "p", "response": "r", "reward": 1}])
    assert (row.completion, row.reward) == ("r", 1.0)


BAD_FORMS = {
    "grouped count": (
        {"prompt": "p", "completions": ["a", "b"], "rewards": [1]},
        "completions has 2 values but rewards has 1 ... one for each",
    ),
    "grouped string": (
        {"prompt": "p", "completions": "ab", "rewards": [1, 0]},
        'completions is "ab"; expected a list',
    ),
    "grouped none": ({"prompt": "p", "completions": [], "rewards": []}, "completions is an empty list"),
    "grouped NaN": (
        {"prompt": "p", "completions": ["a"], "rewards": [math.nan]},
        ", completion 1: rewards[0] is NaN",
    ),
    "grouped blank": (
        {"prompt": "p", "completions": [" "], "rewards": [1]},
        "completions[0] is empty or only",
    ),
    "chosen empty": (
        {"prompt": "p", "chosen": "", "rejected": "b"},
        "chosen: chosen is empty ... drop the row",
    ),
    "chosen with prompt": (
        {"prompt": [USER], "chosen": [USER, ASSISTANT], "rejected": [ASSISTANT]},
        "chosen has messages of ... belongs to prompt",
    ),
    "stepwise count": (
        {"prompt": "p", "completions": ["a", "b"], "labels": [True]},
        "completions has 2 values but labels has 1",
    ),
    "stepwise empty step": (
        {"prompt": "p", "completions": ["a", ""], "labels": [True, True]},
        'completions[1] is ""',
    ),
    "stepwise label": (
        {"prompt": "p", "completions": ["a"], "labels": ["+"]},
        'labels[0] is "+" ... true, false or a number',
    ),
    "stepwise NaN": ({"prompt": "p", "completions": ["a"], "labels": [math.nan]}, "labels[0] is NaN"),
    "response blank": ({"prompt": "p", "response": " ", "reward": 1}, "response is empty or only whitespace"),
}


@pytest.mark.parametrize("name", BAD_FORMS)
def test_a_bad_row_of_another_form_is_refused_in_that_forms_words(name, tmp_path):
    row, parts = BAD_FORMS[name]
    message = refusal(write(tmp_path, row))
    assert message.startswith("rollouts.jsonl:1")
    says(message, parts)


def test_a_row_of_another_form_than_most_is_refused(tmp_path):
    message = refusal(write(tmp_path, GOOD, OTHER, {"prompt": "p", "chosen": "a", "rejected": "b"}))
    says(message, "rollouts.jsonl:3: has no completion; found prompt, chosen, rejected", "one form")


# Columns of the whole file

COLUMNS = {
    "misspelt": (
        {"prompt": "p", "completon": "c", "reward": 1},
        ":1: unknown column 'completon' (in 1 of 1 rows) ... Did you mean 'completion'? ... Rename it",
    ),
    "misspelt optional": (
        {**GOOD, "step_reward": [1]},
        "unknown column 'step_reward' ... Did you mean 'step_rewards'?",
    ),
    "plural": (
        {"prompt": "p", "completion": "c", "rewards": 1},
        "unknown column 'rewards' ... Did you mean 'reward'?",
    ),
    "grouped singular": (
        {"prompt": "p", "completions": ["c"], "rewards": [1], "finish_reason": ["stop"]},
        "unknown column 'finish_reason' ... Did you mean 'finish_reasons'?",
    ),
    "no completion": (
        {"prompt": "p", "text": "x"},
        "no row has completion or reward (or label) ... found prompt, text",
    ),
    "no reward": (
        {"prompt": "p", "completion": "c"},
        "no row has reward (or label) ... demonstrations ... the reward 1.0",
    ),
    "preference": (
        {"chosen": "a", "rejected": "b"},
        "no row has prompt ... found chosen, rejected ... preference data",
    ),
    "chat": (
        {"messages": [USER, ASSISTANT]},
        "found messages ... chat data ... last assistant message to completion",
    ),
    "problems": ({"question": "q", "answer": "#### 3"}, "problems without responses ... sample responses"),
    "gsm8k": (
        {"question": "q", "ground_truth": "A: 3", "m": {}},
        "GSM8K's graded solutions ... gsm8k-solutions",
    ),
    "grouped": (
        {"prompt": "p", "completions": ["a"]},
        "no row has rewards ... prompt and completions and rewards",
    ),
    "oreo": ({"prompt": "p", "response": "r"}, "no row has reward ... found prompt, response"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_missing_and_misspelt_columns_are_refused_with_what_was_found(name, tmp_path):
    row, parts = COLUMNS[name]
    says(refusal(write(tmp_path, row)), "rollouts.jsonl", parts)


def test_a_misspelt_column_is_counted_and_cannot_be_skipped(tmp_path):
    path = write(tmp_path, GOOD, {**OTHER, "lable": True}, {**OTHER, "lable": False})
    message = refusal(path, skip_bad_rows=True)
    says(message, "rollouts.jsonl:2: unknown column 'lable' (in 2 of 3 rows). Did you mean 'label'?")


PAIR = {"prompt": "1+2=", "chosen": "3", "rejected": "4"}
STEPWISE = {"prompt": "1+2=", "completions": ["1+2=3", "#3"], "labels": [True, False]}


@pytest.mark.parametrize(
    "form, unused",
    [
        ({"prompt": "1+2=", "completion": "3", "reward": 1.0}, ["tools", "chat_template_kwargs"]),
        ({"prompt": "1+2=", "completions": ["3"], "rewards": [1.0]}, ["tools", "turns"]),
        (PAIR, ["score_chosen", "score_rejected", "label", "finish_reason"]),
        (STEPWISE, ["steps", "tools"]),
        ({"prompt": "1+2=", "response": "3", "reward": 1.0}, ["tools"]),
    ],
)
def test_columns_that_nothing_reads_are_named_once_with_their_rows(form, unused, caplog):
    read_rows([form | {"difficulty": 3, "answer": "3"} | dict.fromkeys(unused, [1]), form | {"difficulty": 4}])
    (line,) = [r.getMessage() for r in caplog.records if "not used" in r.getMessage()]
    assert line.startswith("rows: columns that are not used: 'difficulty' (in 2 rows)")
    assert all(f"{name!r} (in 1 rows)" in line for name in unused) and "answer" not in line
    assert ("write grouped rows (completions, rewards) for scores" in line) == ("score_chosen" in unused)


def test_columns_that_are_all_read_are_not_spoken_of(caplog):
    messages = {"prompt": [{"role": "user", "content": "1+2="}], "completion": [{"role": "assistant", "content": "3"}]}
    read_rows([messages | {"reward": 1.0, "tools": [{"name": "add"}], "chat_template_kwargs": {"x": 1}}])
    read_rows(
        [{"prompt": "1", "completion": "2", "label": True, "finish_reason": "stop", "sampling": {}, "extra": None}]
    )
    assert "not used" not in caplog.text
