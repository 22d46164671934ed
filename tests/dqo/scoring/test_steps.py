"""Steps cover the response, none is blank, and a user's own are checked."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqo.errors import UserError
from dqo.scoring.steps import SPLITTERS, line_steps, sentence_steps, step_splitter

TEXTS = st.text(alphabet='ab12.!?)"(* \n\t\u00e9', max_size=60)


@given(TEXTS, st.sampled_from(sorted(SPLITTERS)))
def test_steps_cover_the_text_and_none_is_blank(text, name):
    spans = SPLITTERS[name](text)
    assert "".join(text[start:end] for start, end in spans) == text
    assert all(start < end for start, end in spans)
    assert all(text[start:end].strip() for start, end in spans) or not text.strip()


def pieces(split, text):
    return [text[start:end] for start, end in split(text)]


def test_blank_lines_belong_to_the_line_before():
    assert pieces(line_steps, "\n\na\n\n \nb\n") == ["\n\na\n\n \n", "b\n"]


@pytest.mark.parametrize(
    "expected",
    [
        ["He has 2.5 of 3. ", 'He says "no!" ', "So it is 18."],
        ["First:\n", "1. Add 2 and 3. ", "It is 5.\n", "2) Go on\n\n", "**Done.** ", "#### 5"],
        ["Is it 5? ", "Yes"],
        ["a"],
    ],
)
def test_sentences(expected):
    assert pieces(sentence_steps, "".join(expected)) == expected


def test_a_splitter_of_the_users_is_checked(tmp_path, monkeypatch):
    (tmp_path / "own_steps.py").write_text(
        "def words(text): return text.replace(' ', ' |').split('|')\n"
        "def loses(text): return text.split()\n"
        "def fails(text): return text.nothing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert pieces(step_splitter("python:own_steps:words"), "a b c") == ["a ", "b ", "c"]
    with pytest.raises(UserError, match=r"steps by python:own_steps:loses must be strings.*\['a', 'b'\] for 'a b'"):
        step_splitter("python:own_steps:loses")("a b")
    with pytest.raises(UserError, match="AttributeError: .*at 'a b'"):
        step_splitter("python:own_steps:fails")("a b")
    with pytest.raises(UserError, match="has no function none"):
        step_splitter("python:own_steps:none")
    sys.modules.pop("own_steps")
