import json

import pytest

from dqo.convert.entry import convert
from dqo.data.ends import ends_of
from dqo.data.rows import read_rows
from dqo.data.tokens import tokenize_rows
from dqo.errors import UserError
from tests.dqo.helpers import tokenizer

# the fields of vllm.outputs.RequestOutput and CompletionOutput, of vllm.logprobs.Logprob; as vars() and json.dumps give them
FIRST = {
    "index": 0,
    "text": "3",
    "token_ids": [6, 2],
    "cumulative_logprob": -0.75,
    "logprobs": [
        {"6": {"logprob": -0.5, "rank": 1, "decoded_token": None}},
        {
            "2": {"logprob": -0.25, "rank": 2, "decoded_token": None},
            "4": {"logprob": -0.1, "rank": 1, "decoded_token": None},
        },
    ],
    "finish_reason": "stop",
    "stop_reason": None,
}
SECOND = {**FIRST, "index": 1, "text": "33", "token_ids": [6, 6], "finish_reason": "length"}
SECOND["logprobs"] = [{"6": {"logprob": -0.5}}, {"6": {"logprob": -1.5}}]
REQUEST = {
    "request_id": "0",
    "prompt": "1+2=",
    "prompt_token_ids": [4, 13, 5, 16],
    "prompt_logprobs": None,
    "outputs": [FIRST, SECOND],
    "finished": True,
    "num_cached_tokens": 0,
}


def converted(tmp_path, *requests, **options):
    source, destination = tmp_path / "outputs.jsonl", tmp_path / "rollouts.jsonl"
    source.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return convert("vllm", source, destination, **options), destination


def test_each_output_is_a_row_with_what_the_sampler_said_of_it(tmp_path, caplog):
    counts, path = converted(tmp_path, {**REQUEST, "rewards": [1, 0], "answer": "3"})
    first, second = rows = read_rows(path)
    assert (first.prompt, first.completion, first.reward, first.answer) == ("1+2=", "3", 1.0, "3")
    assert (first.prompt_ids, first.completion_ids, first.logprobs) == ([4, 13, 5, 16], [6, 2], [-0.5, -0.25])
    assert (second.finish_reason, second.logprobs, second.reward) == ("length", [-0.5, -1.5], 0.0)
    assert counts["correct"] == 0.5 and counts["not_ended"] == 1
    assert "logprobs_mode='processed_logprobs', or at temperature 1 without top_p and top_k" in caplog.text
    made = tokenizer()
    assert [t.completion for t in tokenize_rows(rows, made, ends_of(made), 19, 64)] == [[6, 2], [6, 6]]


def test_outputs_without_rewards_are_to_be_scored(tmp_path):
    counts, path = converted(tmp_path, REQUEST)
    assert counts["correct"] == "not scored yet" and counts["rows"] == 2
    assert [row.reward for row in read_rows(path, scored=False)] == [None, None]
    with pytest.raises(UserError, match="no row has reward"):
        read_rows(path)


def test_messages_stand_in_the_place_of_the_rendered_prompt(tmp_path):
    messages = [{"role": "user", "content": "1+2"}]
    _, path = converted(tmp_path, {**REQUEST, "messages": messages, "rewards": [1, 0]})
    row = read_rows(path)[0]
    assert (row.prompt, row.completion) == (messages, [{"role": "assistant", "content": "3"}])


def test_a_stop_string_is_no_token_and_leaves_no_logprobs(tmp_path, caplog):
    at_text = {**SECOND, "index": 0, "finish_reason": "stop", "stop_reason": "\n"}
    counts, path = converted(tmp_path, {**REQUEST, "outputs": [at_text, SECOND], "rewards": [1, 0]})
    assert counts["ended_at_a_stop_string"] == 1 and "logprobs are left out of all rows" in caplog.text
    rows, made = read_rows(path), tokenizer()
    assert [row.logprobs for row in rows] == [None, None]
    assert tokenize_rows(rows, made, ends_of(made), 19, 64)[0].completion == [6, 6, 2]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"prompt": None},
            "outputs.jsonl:1: prompt is null; vLLM has no text of a prompt that was given as token ids: add it",
        ),
        ({"outputs": []}, r"outputs.jsonl:1: outputs is \[\]; expected a list"),
        ({"outputs": None}, "outputs.jsonl:1: outputs is null; expected a list"),
        (
            {"outputs": ["3"]},
            'outputs.jsonl:1, output 1: is "3"; expected an object with text, token_ids and finish_reason',
        ),
        (
            {"outputs": [FIRST, {**FIRST, "finish_reason": "abort"}]},
            'outputs.jsonl:1, output 2: finish_reason is "abort"',
        ),
        (
            {"outputs": [{**FIRST, "logprobs": FIRST["logprobs"][:1]}]},
            "logprobs has 1 steps, and token_ids has 2 tokens",
        ),
        (
            {"outputs": [{**FIRST, "logprobs": [{"6": -0.5}, {"4": -1}]}]},
            r"logprobs\[1\] has no number for token 2; found",
        ),
        ({"rewards": [1]}, "outputs.jsonl:1: rewards has 1 values, and there are 2 responses; expected one for each"),
        ({"rewards": [1, None]}, "outputs.jsonl:1, output 2: reward is null; expected a number, or drop the row"),
        ({"rewards": [1, "x"]}, 'outputs.jsonl:1, output 2: its score is "x", a string'),
    ],
)
def test_outputs_that_do_not_fit_are_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        converted(tmp_path, {**REQUEST, **change})
