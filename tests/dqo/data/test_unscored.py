"""Rows as `dqo sample` writes them, before they are graded."""

import pytest

from dqo.data.ends import ends_of
from dqo.data.rows import read_rows, write_rows
from dqo.data.tokens import tokenize_rows
from dqo.errors import UserError
from tests.dqo.helpers import tokenizer

SAMPLED = {
    "prompt": "1+2=",
    "completion": "3",
    "prompt_ids": [1, 4, 5],
    "completion_ids": [6, 2],
    "logprobs": [-0.5, -0.25],
    "sampling": {"model": "m"},
}


def test_training_says_how_to_score_them():
    with pytest.raises(
        UserError, match="no row has reward .or label.; .* nobody has graded: score them with `dqo score`"
    ):
        read_rows([SAMPLED])
    with pytest.raises(UserError, match="row 2: reward is missing, and other rows have it"):
        read_rows([SAMPLED | {"reward": 1.0}, SAMPLED])


def test_they_are_read_where_they_are_wanted_and_are_written_as_they_were(tmp_path):
    rows = read_rows([SAMPLED, SAMPLED | {"reward": 1}], scored=False)
    assert [(row.reward, row.label) for row in rows] == [(None, None), (1.0, True)]
    write_rows(tmp_path / "rows.jsonl", rows[:1])
    assert read_rows(tmp_path / "rows.jsonl", scored=False)[0].completion_ids == [6, 2]
    with pytest.raises(UserError, match="no row has reward"):
        read_rows(tmp_path / "rows.jsonl")


def test_every_other_check_is_made():
    with pytest.raises(UserError, match="1 logprobs for 2 completion_ids"):
        read_rows([SAMPLED | {"logprobs": [-1.0]}], scored=False)


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_response_that_is_nothing_but_its_end_is_a_row(text):
    made, empty = tokenizer(), SAMPLED | {"completion": text, "completion_ids": [2], "logprobs": [-0.5], "reward": 0.0}
    (tokens,) = tokenize_rows(read_rows([empty]), made, ends_of(made), 19, 64)
    assert (tokens.completion, tokens.logprobs) == ([2], [-0.5])
    without = {key: value for key, value in empty.items() if key not in ("prompt_ids", "completion_ids", "logprobs")}
    with pytest.raises(UserError, match="completion is empty or only whitespace"):
        read_rows([without])


def test_an_option_of_training_is_not_advised_to_those_who_score():
    rows = [SAMPLED | {"reward": 1.0}, SAMPLED | {"reward": 1.0, "prompt": 3}]
    with pytest.raises(UserError, match="prompt is 3.*\n1 rows fit: --skip_bad_rows"):
        read_rows(rows)
    with pytest.raises(UserError, match="prompt is 3") as found:
        read_rows(rows, scored=False)
    assert "skip_bad_rows" not in str(found.value)
