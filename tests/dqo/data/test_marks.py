"""Labels of steps count whatever training pays for them."""

import pytest

from dqo.data.episodes import make_episodes
from dqo.data.marks import Marks
from dqo.data.rows import read_rows
from tests.dqo.helpers import tokenizer

OPTIONS = ("none", "additive", "potential")


def stepwise(*labels):
    return [{"prompt": f"{i}+2=", "completions": ["1", "2", "3"], "labels": of} for i, of in enumerate(labels)]


def first_wrong(rows, process_reward, marks=None):
    tok = tokenizer()
    settings = {"vocab_size": len(tok), "max_length": 64, "process_reward": process_reward, "marks": marks}
    return [e.first_wrong_step for e in make_episodes(read_rows(rows), tok, **settings)]


@pytest.mark.parametrize("process_reward", OPTIONS)
def test_an_episode_knows_its_wrong_step_under_every_option(process_reward):
    assert first_wrong(stepwise([True, False, False], [True] * 3), process_reward) == [1, None]
    assert first_wrong(stepwise([0, 1, -1], [1, 0, 1]), process_reward) == [2, None]  # PRM800K's
    assert first_wrong(stepwise([0.5, 0.5, 0], [1, 1, 1]), process_reward) == [2, None]


def test_rows_of_one_file_are_marked_alike_though_they_are_placed_apart():
    rows = stepwise([1, 0, 1], [1, 1, -1])
    marks = Marks.of_rows(read_rows(rows), "none")
    assert first_wrong(rows[:1], "none", marks) == [None]
    assert first_wrong(rows[:1], "none") == [1]


def test_nothing_is_not_a_wrong_turn_unless_it_is_a_pass_rate():
    row = {"prompt": "1+2=", "completion": "33", "turn_spans": [[0, 1], [1, 2]], "reward": 1.0}
    for rewards, found in (([0.0, 1.0], [None, None, 0]), ([1.0, -1.0], [1, 1, None])):
        rows = [row | {"turn_rewards": rewards}]
        assert [first_wrong(rows, option)[0] for option in OPTIONS] == found


def test_values_of_a_model_mark_nothing_and_are_known_by_the_prompts():
    row = {"prompt": "1+2=", "completion": "33", "steps": [[0, 1], [1, 2]], "step_rewards": [0.0, -0.7], "reward": 1.0}
    assert first_wrong([row], "none") == [1]
    assert first_wrong([row | {"prompt_value": 0.0}], "none") == first_wrong([row], "potential") == [None]
