"""Step-labelled sets: small rows written here, and the real rows beside the project where they are."""

import json
import logging
from pathlib import Path

import pytest

from dqo.convert.entry import convert
from dqo.convert.steps import convert_math_aps, convert_math_shepherd, convert_prm800k
from dqo.data.episodes import make_episodes
from dqo.data.rows import read_rows
from dqo.errors import UserError
from tests.dqo.helpers import tokenizer

SAMPLES = Path(__file__).parents[4] / "shared" / "data" / "process_samples"


def write(folder, *rows):
    path = folder / "source.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def step(*completions, chosen=0, human=None):
    made = [{"text": text, "rating": rating, "flagged": False} for text, rating in completions]
    human = None if human is None else {"text": human, "rating": None, "source": "human", "flagged": False}
    return {"completions": made, "human_completion": human, "chosen_completion": chosen}


def tree(*steps, finish="solution", truth="29", **more):
    question = {"problem": " Cost? ", "ground_truth_answer": truth}
    return {"question": question, "label": {"steps": list(steps), "finish_reason": finish}, **more}


def paths(rows):
    return [(row.completion, row.step_rewards, row.reward, row.finish_reason) for row in rows]


def test_prm800k_every_leaf_is_a_row_and_unfinished_ones_were_cut(tmp_path, caplog):
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
def test_prm800k_a_labellers_solution_is_right_though_the_answer_is_written_otherwise(tmp_path, finish, reward):
    rows, _ = convert_prm800k(write(tmp_path, tree(step(("# Answer\n\n29 marbles", 1)), finish=finish)))
    assert rows[0].reward == reward


def test_prm800k_flagged_and_unrated_completions_and_what_follows_them_are_left_out(tmp_path):
    flagged, unrated = step(("b", 1), ("c", 1)), step(("d", None), ("e", 1))
    flagged["completions"][0]["flagged"] = True
    rows, counts = convert_prm800k(write(tmp_path, tree(step(("a", 1)), flagged, step(("z", 1))), tree(unrated)))
    assert [row.completion for row in rows] == ["a\nc", "e"]
    assert (counts["left_out_flagged_steps"], counts["left_out_unrated_steps"]) == (1, 1)


def test_prm800k_a_path_whose_last_step_is_left_out_ends_before_it(tmp_path):
    empty = {"completions": None, "human_completion": None, "chosen_completion": None}
    rows, _ = convert_prm800k(write(tmp_path, tree(step(("a", 1)), empty)))
    assert paths(rows) == [("a", [1.0], 0.0, "length")]


def test_prm800k_control_questions_are_left_out_and_counted(tmp_path):
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
def test_prm800k_rows_of_another_form_are_refused(tmp_path, row, part):
    with pytest.raises(UserError, match=part):
        convert_prm800k(write(tmp_path, row))


GOOD = "Q: 1 ки? Step 1: a\nb  ки\nStep 2: so c The answer is: 3 ки"


def shepherd(text, signs="+-", mark="ки"):
    label = text
    for sign in signs:
        label = label.replace(mark, sign, 1)
    return {"input": text, "label": label, "task": "MATH"}


def test_math_shepherd_marks_become_step_rewards_and_the_last_one_the_outcome(tmp_path):
    text = "How much?  Step 1: a\nb  ки\nStep 2: so c. The answer is: 3 ки"
    rows, counts = convert_math_shepherd(write(tmp_path, shepherd(text), shepherd(text, "-+")))
    assert [(row.step_rewards, row.reward, row.label) for row in rows] == [
        ([1.0, 0.0], 0.0, False),
        ([0.0, 1.0], 1.0, True),
    ]
    row = rows[0]
    assert row.prompt == "How much?\n" and row.finish_reason == "stop" and row.sampling == {"task": "MATH"}
    assert [row.completion[a:b] for a, b in row.steps] == ["Step 1: a\nb\n", "Step 2: so c. The answer is: 3"]
    assert counts == {"left_out_mislabelled": 0, "by_task": {"MATH": 0.5}}


def test_math_shepherd_a_solution_without_an_answer_was_cut(tmp_path):
    rows, _ = convert_math_shepherd(write(tmp_path, shepherd("Q? Step 1: a ки\nStep 2: b ки", "++")))
    assert (rows[0].reward, rows[0].finish_reason) == (0.0, "length")


def test_math_shepherd_mislabelled_rows_are_named_and_left_out(tmp_path, caplog):
    good = "Q? Step 1: a ки\nStep 2: b. The answer is: 3 ки"
    bad = [
        ({"input": good, "label": good.replace("ки", "+", 1)}, "mark 2 has no + or - in label"),
        ({"input": good, "label": good.replace("ки", "+") + " more"}, "text after the last mark"),
        ({"input": good, "label": "other " + good.replace("ки", "+")}, "mark 1 has no + or - in label"),
        (shepherd("Q ки? Step 1: a ки", "++"), "a mark inside the question"),
        (shepherd("Q? a ки", "+"), 'no "Step 1:"'),
        (shepherd("Q? Step 1: a ки ки", "++"), "an empty question or step"),
    ]
    with caplog.at_level(logging.WARNING):
        rows, counts = convert_math_shepherd(write(tmp_path, shepherd(good), *[row for row, _ in bad]))
    assert len(rows) == 1 and counts["left_out_mislabelled"] == len(bad)
    for number, (_, why) in list(enumerate(bad, start=2))[:5]:
        assert f"source.jsonl:{number} ({why})" in caplog.text
    assert "6 mislabelled rows are left out" in caplog.text and "..." in caplog.text


def aps(*prefixes, question="Q?", answer="4"):
    steps = [{"solution_prefix": question + text, "mc_value": value} for text, value in prefixes]
    return {"question": question, "final_answer": answer, "question_id": "7", "reasoning_steps": steps}


def test_math_aps_every_leaf_of_the_prefixes_is_a_row_with_the_values_on_its_way(tmp_path, caplog):
    prefixes = [
        ("", 0.5),
        ("\n\n a\n\nb is \\boxed{4}.", 1.0),
        ("\n\n a", 0.25),
        ("\n\n a", 0.75),  # measured twice
        ("\n\n a\n\nc", 0.0),
        ("\n\n d \\boxed{5}", 1.0),
        ("\n\n e \\boxed{4}.\ngarbage", 1.0),
    ]
    with caplog.at_level(logging.WARNING):
        rows, counts = convert_math_aps(write(tmp_path, aps(*prefixes)))
    found = {row.completion: row for row in rows}
    assert {text: (row.step_rewards, row.reward, row.finish_reason) for text, row in found.items()} == {
        "a\n\nb is \\boxed{4}.": ([0.5, 1.0], 1.0, "stop"),
        "a\n\nc": ([0.5, 0.0], 0.0, "length"),
        "d \\boxed{5}": ([1.0], 0.0, "stop"),
        "e \\boxed{4}.\ngarbage": ([1.0], 0.0, "length"),
    }
    assert found["a\n\nc"].steps == [(0, 1), (1, 4)]
    assert {(row.prompt, row.prompt_id, row.answer) for row in rows} == {("Q?\n", "math-aps/7", "4")}
    assert counts == {"merged_prefixes": 1, "graded_right_without_the_answer": 2}
    assert "2 of 4 responses did not end" in caplog.text


@pytest.mark.parametrize(
    "row, part",
    [
        (aps(("x", 1.5)), r"reasoning_steps\[0\].mc_value is 1.5; expected a share in \[0, 1\]"),
        (aps(("x", True)), r"mc_value is true"),
        (aps() | {"reasoning_steps": [{"solution_prefix": "other", "mc_value": 1}]}, r"solution_prefix is \"other\""),
        (aps() | {"reasoning_steps": None}, r"reasoning_steps is null; expected a list"),
    ],
)
def test_math_aps_rows_of_another_form_are_refused(tmp_path, row, part):
    with pytest.raises(UserError, match=f"source.jsonl:1: .*{part}"):
        convert_math_aps(write(tmp_path, row))


def test_math_aps_values_become_potentials_of_their_prefixes(tmp_path):
    source = write(tmp_path, aps(("\n3", 0.25), ("\n3\n12", 0.5), question="1+2="))
    convert("math-aps", source, tmp_path / "out.jsonl")
    tok = tokenizer()
    options = {"vocab_size": len(tok), "max_length": 64, "process_reward": "potential", "truncation": "bootstrap"}
    (episode,) = make_episodes(read_rows(tmp_path / "out.jsonl"), tok, **options)
    assert tok.decode(episode.completion_ids) == "3\n12"
    assert episode.rewards.tolist() == [0.25, 0, 0, 0.25]


@pytest.mark.parametrize(
    "format, rows, correct, not_ended",
    [("prm800k", 35, 9, 26), ("math-shepherd", 7, 0, 0), ("math-aps", 124, 115, 8)],
)
def test_published_rows_become_rows_that_pass_every_check(format, rows, correct, not_ended, tmp_path):
    source = SAMPLES / f"samples_{format}.jsonl"
    if not source.exists():
        pytest.skip("the sample rows are not beside the project")
    summary = convert(format, source, tmp_path / "out.jsonl")
    read = read_rows(tmp_path / "out.jsonl")
    assert len(read) == summary["rows"] == rows
    assert sum(row.label for row in read) == correct
    assert summary["not_ended"] == not_ended
    assert all(row.step_rewards is not None for row in read)
