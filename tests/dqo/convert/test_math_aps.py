"""MATH-APS's prefixes: small rows written here."""

import logging

import pytest

from dqo.convert.entry import convert
from dqo.convert.math_aps import convert_math_aps
from dqo.data.episodes import make_episodes
from dqo.data.rows import read_rows
from dqo.errors import UserError
from tests.dqo.convert.sources import write
from tests.dqo.helpers import tokenizer


def aps(*prefixes, question="Q?", answer="4"):
    steps = [{"solution_prefix": question + text, "mc_value": value} for text, value in prefixes]
    return {"question": question, "final_answer": answer, "question_id": "7", "reasoning_steps": steps}


def test_every_leaf_of_the_prefixes_is_a_row_with_the_values_on_its_way(tmp_path, caplog):
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
def test_rows_of_another_form_are_refused(tmp_path, row, part):
    with pytest.raises(UserError, match=f"source.jsonl:1: .*{part}"):
        convert_math_aps(write(tmp_path, row))


def test_values_become_potentials_of_their_prefixes(tmp_path):
    source = write(tmp_path, aps(("\n3", 0.25), ("\n3\n12", 0.5), question="1+2="))
    convert("math-aps", source, tmp_path / "out.jsonl")
    tok = tokenizer()
    options = {"vocab_size": len(tok), "max_length": 64, "process_reward": "potential", "truncation": "bootstrap"}
    (episode,) = make_episodes(read_rows(tmp_path / "out.jsonl"), tok, **options)
    assert tok.decode(episode.completion_ids) == "3\n12"
    assert episode.rewards.tolist() == [0.25, 0, 0, 0.25]
