import math

import pytest

from dqo.data.fields import finite_number
from dqo.data.rows import read_rows
from dqo.errors import UserError
from tests.dqo.row_cases import ASSISTANT, GOOD, IDS, OTHER, USER, refusal, says, write

BAD = {
    "reward null": ({"reward": None}, "reward is null ... expected a number ... drop the row"),
    "reward NaN": ({"reward": math.nan}, "reward is NaN ... finite ... score the response again"),
    "reward infinite": ({"reward": -math.inf}, "reward is -Infinity ... finite"),
    "reward too large": ({"reward": 10**400}, "reward is Infinity ... finite"),
    "reward string": ({"reward": "0.5"}, 'reward is "0.5", a string ... float()'),
    "reward true": (
        {"reward": "true"},
        'reward is "true", a string; expected a number: 1.0, or use the label column with true',
    ),
    "reward no": (
        {"reward": "No"},
        'reward is "No", a string; expected a number: 0.0, or use the label column with false',
    ),
    "reward word": ({"reward": "high"}, 'reward is "high", a string; expected a number, or drop the row'),
    "reward bool": ({"reward": True}, "reward is true, a bool ... 1.0 ... label"),
    "reward list": ({"reward": [1]}, "reward is [1] ... expected a number"),
    "label number": (
        {"label": 0.3},
        "label is 0.3; labels are true or false ... graded scores ... reward column",
    ),
    "label integer": ({"label": 1}, "label is 1; labels are true or false: write true. For graded scores"),
    "label zero": ({"label": 0}, "label is 0; labels are true or false: write false"),
    "label yes": ({"label": "yes"}, 'label is "yes"; labels are true or false: write true'),
    "label minus": ({"label": "-"}, 'label is "-"; labels are true or false: write false'),
    "label word": ({"label": "maybe"}, 'label is "maybe"; labels are true or false. For graded scores'),
    "prompt empty": ({"prompt": ""}, "prompt is empty"),
    "prompt number": ({"prompt": 3}, "prompt is 3 ... expected a string or a list of messages"),
    "completion empty": ({"completion": ""}, 'completion is empty or only whitespace ("") ... drop the row'),
    "completion blank": (
        {"completion": " \n"},
        'completion is empty or only whitespace (" \\n") ... drop the row',
    ),
    "completion surrogate": (
        {"completion": "a\ud800"},
        "completion has half a surrogate pair at character 1",
    ),
    "completion messages": (
        {"completion": [ASSISTANT]},
        "prompt is a string but completion is a list of messages",
    ),
    "steps gap": (
        {"steps": [[0, 5], [7, 18]]},
        "steps[1] begins at 7, expected 5 ... gap ... cover the completion",
    ),
    "steps overlap": (
        {"steps": [[0, 9], [7, 18]]},
        "steps[1] begins at 7, expected 9 ... overlaps ... cover",
    ),
    "steps short": (
        {"steps": [[0, 7], [7, 15]]},
        "steps end at 15 but the completion has 18 characters ... cover",
    ),
    "steps long": ({"steps": [[0, 19]]}, "steps end at 19 but the completion has 18 characters"),
    "steps none": ({"steps": []}, "steps end at 0 but the completion has 18"),
    "steps empty": ({"steps": [[0, 0], [0, 18]]}, "steps[0] is [0, 0], an empty step"),
    "steps floats": ({"steps": [[0, 18.0]]}, "steps[0] is [0, 18.0] ... [start, end] in characters"),
    "steps bools": ({"steps": [[False, 18]]}, "steps[0] is [false, 18]"),
    "steps flat": ({"steps": [0, 18]}, "steps[0] is 0"),
    "step_rewards count": (
        {"steps": [[0, 7], [7, 15], [15, 18]], "step_rewards": [0, 0, 0, 0]},
        "step_rewards has 4 values but steps has 3 spans ... one for each step",
    ),
    "step_rewards lines": (
        {"step_rewards": [0.0]},
        "step_rewards has 1 values but the completion has 3 lines",
    ),
    "step_rewards NaN": ({"step_rewards": [0.0, math.nan, 0.0]}, "step_rewards[1] is NaN ... finite"),
    "step_rewards bool": ({"step_rewards": [True, 0, 0]}, "step_rewards[0] is true, a bool; expected a number: 1.0"),
    "step_rewards number": ({"step_rewards": 1.0}, "step_rewards is 1.0; expected a list"),
    "ids without completion": ({"prompt_ids": [1]}, "prompt_ids without completion_ids ... both, or neither"),
    "ids negative": ({"completion_ids": [1, -100]}, "completion_ids[1] is -100 ... integers from 0 up"),
    "ids float": ({"completion_ids": [1.0]}, "completion_ids[0] is 1.0 ... integers from 0 up"),
    "ids bool": ({"completion_ids": [True]}, "completion_ids[0] is true ... integers from 0 up"),
    "ids empty": ({"completion_ids": []}, "completion_ids is an empty list ... no column completion_ids"),
    "prompt ids string": ({"prompt_ids": "1 2"}, 'prompt_ids is "1 2"; expected a list'),
    "finish_reason": ({"finish_reason": "eos"}, 'finish_reason is "eos" ... "stop" ... "length"'),
    "answer": ({"answer": 1.5}, "answer is 1.5; expected a string"),
    "prompt_id": ({"prompt_id": [1]}, "prompt_id is [1]; expected a string"),
    "sampling": ({"sampling": "t=1"}, 'sampling is "t=1"; expected an object ... temperature'),
    "env_mask": ({"env_mask": [1, 0]}, "env_mask has zeros, and there are no completion_ids ... store the sampler's"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_field_is_refused_with_its_line_and_its_cure(name, tmp_path):
    change, parts = BAD[name]
    message = refusal(write(tmp_path, GOOD, {**GOOD, **change}, OTHER))
    assert message.startswith("rollouts.jsonl:2: ")
    says(message, parts, "2 rows fit: --skip_bad_rows")


def test_the_cure_for_a_bool_in_the_place_of_a_number_is_a_label_for_the_outcome_alone():
    for name, told in (("reward", True), ("step_rewards[0]", False)):
        for value in (True, "yes"):
            with pytest.raises(UserError) as refused:
                finite_number(value, name)
            assert ("label column" in str(refused.value)) == told and "1.0" in str(refused.value)


BAD_LOGPROBS = {
    "too few": ({"logprobs": [-0.1]}, "logprobs: 1 logprobs for 3 completion_ids ... EOS included"),
    "none": ({"logprobs": []}, "logprobs: 0 logprobs for 3 completion_ids"),
    "positive": ({"logprobs": [-0.1, 0.2, -1.0]}, "logprobs[1] is 0.2 ... never above 0"),
    "NaN": ({"logprobs": [-0.1, -0.2, math.nan]}, "logprobs[2] is NaN ... finite"),
    "infinite": ({"logprobs": [-math.inf, -0.2, -0.1]}, "logprobs[0] is -Infinity ... finite"),
    "missing": (
        {"logprobs": None},
        "logprobs is missing, and other rows have it ... for every row, or for none",
    ),
    "no ids": ({"completion_ids": None, "prompt_ids": None}, "logprobs without completion_ids"),
}


@pytest.mark.parametrize("name", BAD_LOGPROBS)
def test_bad_log_probabilities_are_refused_with_their_line_and_cure(name, tmp_path):
    change, parts = BAD_LOGPROBS[name]
    message = refusal(write(tmp_path, {**GOOD, **IDS}, {**GOOD, **IDS, **change}))
    assert message.startswith("rollouts.jsonl:2: ")
    says(message, parts)


BAD_MESSAGES = {
    "no role": ({"prompt": [{"content": "x"}]}, 'prompt[0] is {"content": "x"} ... "role"'),
    "no content": ({"prompt": [{"role": "user"}]}, "prompt[0].content is null; expected a string"),
    "image": ({"prompt": [{**USER, "content": [{}]}]}, "prompt[0].content is [{}]; expected a string"),
    "string": ({"prompt": ["hi"]}, 'prompt[0] is "hi"'),
    "no messages": ({"prompt": []}, "prompt is empty"),
    "whole dialogue": (
        {"completion": [USER, ASSISTANT]},
        'completion has messages of ["user", "assistant"] ... belongs to prompt',
    ),
    "wrong role": ({"completion": [USER]}, 'completion has messages of ["user"]; expected the first of assistant'),
    "blank": ({"completion": [{**ASSISTANT, "content": " "}]}, "completion is empty or only whitespace"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages_are_refused_with_their_line_and_cure(name, tmp_path):
    change, parts = BAD_MESSAGES[name]
    row = {"prompt": [USER], "completion": [ASSISTANT], "reward": 1}
    message = refusal(write(tmp_path, row, {**row, **change}))
    assert message.startswith("rollouts.jsonl:2: ")
    says(message, parts)


def test_mixed_kinds_of_prompts_are_refused(tmp_path):
    messages = {"prompt": [USER], "completion": [ASSISTANT], "reward": 1}
    message = refusal(write(tmp_path, GOOD, OTHER, messages))
    says(message, "rollouts.jsonl:3: prompt is a list of messages but most rows have a string", "one kind")


def test_a_row_without_a_reward_among_rows_with_one_is_refused(tmp_path):
    message = refusal(write(tmp_path, GOOD, {"prompt": "p", "completion": "c", "label": True}))
    says(message, "rollouts.jsonl:2: reward is missing, and other rows have it", "every row a reward")


def test_a_row_without_label_among_labelled_rows_is_refused(tmp_path):
    row = {"prompt": "p", "completion": "c"}
    message = refusal(write(tmp_path, {**row, "label": True}, row))
    says(message, "rollouts.jsonl:2: reward and label are missing; give one of them")


def test_rewards_that_are_all_null_are_refused(tmp_path):
    says(refusal(write(tmp_path, {**GOOD, "reward": None})), "rollouts.jsonl:1: reward is null")


CHAT = {
    "prompt": [{"role": "user", "content": "1"}],
    "completion": [{"role": "assistant", "content": "2"}],
    "reward": 1.0,
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tools": "no JSON"}, 'tools is "no JSON", a string that is not JSON; expected a list of objects'),
        ({"tools": {"name": "add"}}, 'tools is {"name": "add"}; expected a list of objects'),
        ({"tools": ["add"]}, 'tools is ["add"]; expected a list of objects'),
        ({"chat_template_kwargs": ["x"]}, 'chat_template_kwargs is ["x"]; expected an object'),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs sets tokenize, which is decided here"),
    ],
)
def test_what_templates_are_told_of_has_its_kind(change, message):
    assert message in refusal([CHAT | change])


def test_tools_may_be_their_json_text():
    (row,) = read_rows([CHAT | {"tools": '[{"name": "add"}]'}])
    assert row.tools == [{"name": "add"}]


@pytest.mark.parametrize("value", [1e39, -1e39, 10**200, 1.7e308])
def test_numbers_that_float32_cannot_hold_are_refused_with_the_row(tmp_path, value):
    for field, row in {
        "reward": GOOD | {"reward": value},
        "step_rewards[1]": GOOD | {"step_rewards": [0.0, value, 1.0]},
        "logprobs[2]": GOOD | IDS | {"logprobs": [-0.1, -0.2, -abs(value)]},
    }.items():
        others = OTHER | (IDS if "logprobs" in row else {})
        says(refusal(write(tmp_path, others, row)), f"rollouts.jsonl:2: {field} is", "float32 holds at most 3.4e+38")


def test_the_largest_number_of_float32_is_a_number(tmp_path):
    rows = read_rows(write(tmp_path, GOOD | {"reward": 3.4e38}, OTHER))
    assert rows[0].reward == 3.4e38
