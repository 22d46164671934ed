"""TRL's data: rows written here after its published schemas."""

import pytest

from dqo.convert.trl import convert_trl_kto, convert_trl_preference, convert_trl_stepwise
from dqo.errors import UserError
from tests.dqo.convert.sources import assistant, user, write


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
