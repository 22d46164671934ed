"""PRM800K's trees: small ones written here."""

import logging

import pytest

from dqo.convert.prm800k import convert_prm800k
from dqo.errors import UserError
from tests.dqo.convert.sources import write


def step(*completions, chosen=0, human=None):
    made = [{"text": text, "rating": rating, "flagged": False} for text, rating in completions]
    human = None if human is None else {"text": human, "rating": None, "source": "human", "flagged": False}
    return {"completions": made, "human_completion": human, "chosen_completion": chosen}


def tree(*steps, finish="solution", truth="29", **more):
    question = {"problem": " Cost? ", "ground_truth_answer": truth}
    return {"question": question, "label": {"steps": list(steps), "finish_reason": finish}, **more}


def paths(rows):
    return [(row.completion, row.step_rewards, row.reward, row.finish_reason) for row in rows]


def test_every_leaf_is_a_row_and_unfinished_ones_were_cut(tmp_path, caplog):
    source = write(
        tmp_path,
        tree(
            step(("a", 1), ("b", -1)),
            step(("c", -1), chosen=None, human="h"),
            step(("d\n\n# Answer\n\n29", 0), ("e\n\n# Answer\n\n30", 1), ("f # Answer\n29", -1)),
        ),
    )
    with caplog.at_level(logging.WARNING):
        rows, counts = convert_prm800k(source)
    assert paths(rows) == [
        ("b", [-1.0], 0.0, "length"),
        ("a\nc", [1.0, -1.0], 0.0, "length"),
        ("a\nh\ne\n\n# Answer\n\n30", [1.0, 1.0, 1.0], 0.0, "stop"),
        ("a\nh\nf # Answer\n29", [1.0, 1.0, -1.0], 1.0, "stop"),  # a right answer is one, whatever its steps
        ("a\nh\nd\n\n# Answer\n\n29", [1.0, 1.0, 0.0], 1.0, "stop"),
    ]
    assert rows[0].prompt == "Cost?\n" and rows[0].answer == "29" and rows[0].source == "source.jsonl:1"
    assert [rows[2].completion[a:b] for a, b in rows[2].steps] == ["a\n", "h\n", "e\n\n# Answer\n\n30"]
    assert counts["human_steps"] == 1 and counts["trees"] == 1
    assert "2 of 5 responses did not end: their reward of 0 is no verdict" in caplog.text


@pytest.mark.parametrize("finish, reward", [("solution", 1.0), ("give_up", 0.0)])
def test_a_labellers_solution_is_right_though_the_answer_is_written_otherwise(tmp_path, finish, reward):
    rows, _ = convert_prm800k(write(tmp_path, tree(step(("# Answer\n\n29 marbles", 1)), finish=finish)))
    assert rows[0].reward == reward


def test_flagged_and_unrated_completions_and_what_follows_them_are_left_out(tmp_path):
    flagged, unrated = step(("b", 1), ("c", 1)), step(("d", None), ("e", 1))
    flagged["completions"][0]["flagged"] = True
    rows, counts = convert_prm800k(write(tmp_path, tree(step(("a", 1)), flagged, step(("z", 1))), tree(unrated)))
    assert [row.completion for row in rows] == ["a\nc", "e"]
    assert (counts["left_out_flagged_steps"], counts["left_out_unrated_steps"]) == (1, 1)


def test_a_path_whose_last_step_is_left_out_ends_before_it(tmp_path):
    empty = {"completions": None, "human_completion": None, "chosen_completion": None}
    rows, _ = convert_prm800k(write(tmp_path, tree(step(("a", 1)), empty)))
    assert paths(rows) == [("a", [1.0], 0.0, "length")]


def test_control_questions_are_left_out_and_counted(tmp_path):
    asked = tree(step(("a # Answer\n29", 1)))
    rows, counts = convert_prm800k(
        write(
            tmp_path,
            asked,
            asked | {"is_quality_control_question": True},
            asked | {"is_initial_screening_question": True},
        )
    )
    assert len(rows) == 1 and counts["left_out_quality_control"] == 2


@pytest.mark.parametrize(
    "row, part",
    [
        ({"question": {}}, "source.jsonl:1: question.problem is null; expected a string"),
        ({"question": {"problem": "q"}, "label": {}}, "source.jsonl:1: label.steps is null; expected a list"),
        ("{", "source.jsonl:1: not valid JSON"),
    ],
)
def test_rows_of_another_form_are_refused(tmp_path, row, part):
    with pytest.raises(UserError, match=part):
        convert_prm800k(write(tmp_path, row))
