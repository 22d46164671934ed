"""What a row may say of its turns, and what is said against it."""

import pytest

from dqo.data.rows import read_rows
from dqo.data.together import check_process_reward
from dqo.errors import UserError
from tests.dqo.row_cases import ASSISTANT, USER, refusal, says, write

TOOL = {"role": "tool", "content": "4"}
CHAT = {"prompt": [USER], "completion": [ASSISTANT, TOOL, ASSISTANT], "reward": 1.0}
MASKED = {
    "prompt": "1+1=",
    "completion": "2 yes 2",
    "prompt_ids": [1, 2],
    "completion_ids": [3, 4, 5],
    "logprobs": [-0.5, None, -0.25],
    "env_mask": [1, 0, 1],
    "reward": 1.0,
}
SPANS = {"prompt": "1+1=", "completion": "2 yes 2", "turn_spans": [[0, 2], [6, 7]], "reward": 1.0}


@pytest.mark.parametrize("row", [CHAT, MASKED, SPANS], ids=["messages", "ids", "spans"])
def test_turns_are_counted_and_paid_one_by_one(row):
    (read,) = read_rows([row | {"turn_rewards": [0.5, 1]}])
    assert (read.turns, read.turn_rewards, read.process_rewards) == (2, [0.5, 1.0], [0.5, 1.0])
    message = refusal([row | {"turn_rewards": [0.5]}])
    says(message, "row 1: turn_rewards has 1 values but the row has 2 turns; expected one for each")


def test_log_probabilities_of_the_environment_may_be_anything():
    for other in (None, 0.0, 7.5, "none"):
        (row,) = read_rows([MASKED | {"logprobs": [-0.5, other, -0.25]}])
        assert row.logprobs == [-0.5, 0.0, -0.25]
    says(refusal([MASKED | {"logprobs": [None, 0.0, -0.25]}]), "logprobs[0] is null; expected a number")


@pytest.mark.parametrize("name", ["env_mask", "response_mask", "completion_mask", "assistant_masks", "tool_mask"])
def test_a_mask_of_ids_is_known_by_every_usual_name_and_may_cover_the_prompt(name, caplog):
    row = {key: value for key, value in MASKED.items() if key != "env_mask"}
    for mask in ([1, 0, 1], [0, 0, 1, 0, 1], [True, False, True], [1.0, 0.0, 1.0]):
        (read,) = read_rows([row | {name: mask}])
        assert read.env_mask == [1, 0, 1]
    assert "not used" not in caplog.text
    says(refusal([row | {name: [1, 0]}]), f"row 1: {name} has 2 values for 3 completion_ids; expected one for each")


def test_a_mask_of_ones_says_what_no_mask_says():
    row = MASKED | {"env_mask": [1, 1, 1], "logprobs": [-1.0, -1.0, -1.0]}
    (masked,), (plain,) = (read_rows([row | extra]) for extra in ({}, {"env_mask": None}))
    assert masked == plain and masked.turns == 1
    (read,) = read_rows([{"prompt": "1", "completion": "2", "turn_spans": [[0, 1]], "reward": 1.0}])
    assert read.turn_spans is None and read.turns == 1


def test_ids_of_one_turn_beside_several_messages_are_one_turn():
    ids = {"completion_ids": [3, 4], "env_mask": [1, 1], "turn_rewards": [0.5]}
    for more in (
        {"completion": [ASSISTANT, ASSISTANT]},
        {"completion": [ASSISTANT, TOOL]},
        {"finish_reason": "length"},
    ):
        (row,) = read_rows([CHAT | ids | more])
        assert (row.turns, row.turn_rewards) == (1, [0.5])
    says(
        refusal([CHAT | ids]),
        "row 1: env_mask has no 0, and completion has a message of tool between those of assistant",
    )
    says(refusal([CHAT | ids | {"completion": [ASSISTANT, ASSISTANT], "turn_rewards": [1, 2]}]), "the row has 1 turns")


BAD = {
    "mask value": (MASKED | {"env_mask": [1, 2, 1]}, "env_mask[1] is 2; expected 1 (a token of the model) or 0"),
    "mask string": (MASKED | {"env_mask": "101"}, 'env_mask is "101"; expected a list'),
    "no action": (MASKED | {"env_mask": [0, 0, 0]}, "env_mask has no 1 ... there is no action; drop the row"),
    "no ids": (
        {"prompt": "1", "completion": "2", "env_mask": [1, 0], "reward": 1.0},
        "env_mask has zeros, and there are no completion_ids ... store the sampler's ids, or give the completion as messages",
    ),
    "ids without mask": (
        CHAT | {"completion_ids": [1, 2]},
        "completion has 3 messages, and completion_ids do not tell ... add env_mask",
    ),
    "first of user": (
        CHAT | {"completion": [USER, ASSISTANT]},
        'messages of ["user", "assistant"] ... belongs to prompt',
    ),
    "empty turn": (
        CHAT | {"completion": [ASSISTANT, TOOL, {"role": "assistant", "content": " "}]},
        "completion[2] is a message of assistant without content ... drop the row",
    ),
    "spans of messages": (CHAT | {"turn_spans": [[0, 1]]}, "turn_spans are of a string ... drop them"),
    "spans with ids": (
        SPANS | {"completion_ids": [1]},
        "turn_spans are characters; beside completion_ids give env_mask, or drop the ids",
    ),
    "span beyond": (SPANS | {"turn_spans": [[0, 2], [6, 8]]}, "turn_spans[1] is [6, 8], not within 2 and 7"),
    "span overlap": (SPANS | {"turn_spans": [[0, 2], [1, 7]]}, "turn_spans[1] is [1, 7], not within 2 and 7"),
    "span empty": (SPANS | {"turn_spans": [[0, 0]]}, "turn_spans[0] is [0, 0], an empty turn"),
    "span flat": (SPANS | {"turn_spans": [0, 2]}, "turn_spans[0] is 0; turn_spans are [start, end]"),
    "span number": (SPANS | {"turn_spans": 3}, "turn_spans[0] is 3; turn_spans are [start, end]"),
    "no span": (SPANS | {"turn_spans": []}, "turn_spans is an empty list ... there is no action; drop the row"),
    "steps": (SPANS | {"steps": [[0, 7]]}, "steps and step_rewards are of a completion of one turn"),
    "steps of messages": (CHAT | {"step_rewards": [1.0]}, "steps and step_rewards are of a completion of one turn"),
    "both rewards": (
        {"prompt": "1", "completion": "2", "step_rewards": [1.0], "turn_rewards": [1.0], "reward": 1.0},
        "turn_rewards and steps or step_rewards are both given; drop one",
    ),
    "reward null": (SPANS | {"turn_rewards": [1.0, None]}, "turn_rewards[1] is null; expected a number"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_with_its_line_and_its_cure(name, tmp_path):
    row, parts = BAD[name]
    message = refusal(write(tmp_path, row))
    assert message.startswith("rollouts.jsonl:1: ") and "\n" not in message
    says(message, parts)


def test_turn_rewards_need_a_choice_as_step_rewards_do():
    rows = read_rows([SPANS | {"turn_rewards": [0.0, 1.0]}])
    with pytest.raises(
        UserError, match=r"f.jsonl has turn_rewards; choose .* additive \(added on the last token of their turn"
    ):
        check_process_reward(rows, "f.jsonl", None)
    check_process_reward(rows, "f.jsonl", "additive")


def test_the_turns_of_grouped_and_of_preference_rows_are_read():
    grouped = {
        "prompt": "1+1=",
        "completions": ["2 yes 2", "3"],
        "rewards": [1.0, 0.0],
        "turn_spans": [[[0, 2], [6, 7]], None],
        "turn_rewards": [[0.5, 1.0], [0.0]],
    }
    assert [(row.turns, row.turn_rewards) for row in read_rows([grouped])] == [(2, [0.5, 1.0]), (1, [0.0])]
    pair = {"prompt": [USER], "chosen": [ASSISTANT, USER, ASSISTANT], "rejected": [ASSISTANT]}
    assert [row.turns for row in read_rows([pair])] == [2, 1]
