"""An inspection as text: what a reader sees, with colours and without; no character of data moves the terminal."""

import re

import pytest

from dqo.credit.implied import ITSELF, Start
from dqo.inspection.terminal import implied_text, summary_of, text_of, verdict_of
from tests.dqo.inspection.stored import HOSTILE, inspection, response

SGR = re.compile(r"\x1b\[[0-9;]*m")


def test_a_step_is_a_row_with_its_sum_and_its_marks():
    one = response([0.1, -0.9, 0.0, 0.25], step_ends=[0, 1, 3], first_wrong=1, texts=["a", "b\n", "c", "</s>"])
    text = text_of(inspection(one), "advantage", colour=False)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "out: method dqo, beta 0.1; tokens by advantage, β·log(π/ref), full colour at 1"
    assert "rows.jsonl:1: wrong, reward 0, 4 tokens, advantage -0.550 in all" in lines
    at = lines.index("  step      sum  implied")
    assert lines[at + 1 : at + 4] == [
        "   1     +0.100    0.500  a",
        "   2✗▾   -0.900    0.600  b↵{-0.90}",
        "   3     +0.250   -0.300  c</s>",
    ]
    assert "The lowest step is 2 (-0.900), the first wrong one; the implied value begins at 0.500" in text
    assert "step with the lowest sum is the first wrong one in 1 of the 1 responses" in text and "find 0.3." in text


def test_with_colours_the_words_are_the_same():
    one = response([0.1, -0.9, 0.5], step_ends=[1, 2], first_wrong=0, texts=["a\nb", "E", "c", "d"], env=(1,))
    plain, painted = (text_of(inspection(one), "advantage", colour) for colour in (False, True))
    bare = SGR.sub("", painted)
    assert re.sub(r"\{[-+.\d]+\}|[⟦⟧]", "", plain).splitlines()[1:] == bare.splitlines()[2:]  # a legend is more
    assert "⟦E⟧" in plain and "\x1b[2mE\x1b[0m" in painted
    assert "\x1b[30;48;5;209mc\x1b[0m" in painted and "\x1b[30;48;5;153md\x1b[0m" in painted
    assert "\x1b[30;48;5;" not in text_of(inspection(response([0.05, -0.05])), "advantage", True).split("\n\n", 1)[1]
    assert "\x1b[30;48;5;219md" in text_of(inspection(one), "kl", True)


@pytest.mark.parametrize("colour", [False, True])
def test_escapes_in_data_are_written_out(colour):
    one = response([1.0, 1.0], texts=[HOSTILE, "b"], prompt=HOSTILE, source=f"{HOSTILE}:1")
    text = text_of(inspection(one, directory=HOSTILE, notes=[HOSTILE]), "advantage", colour)
    assert "\\x1b]0;owned\\x07<script>" in text
    assert not {c for c in SGR.sub("", text) if ord(c) < 32} - {"\n"}


def test_without_steps_the_text_is_shown_as_it_is():
    text = text_of(inspection(response([0.1, 0.9], texts=["a\n", "b"], implied=None)), "advantage", colour=False)
    assert "\na↵\nb{+0.90}\nWith a discount of 0 no value is implied." in text and "step" not in text


def test_what_is_said_of_the_lowest_step():
    sums = [0.5, -0.5, -0.25]
    assert verdict_of(response(sums, [0, 1, 2], 1)) == "the lowest step is 2 (-0.500), the first wrong one"
    assert verdict_of(response(sums, [0, 1, 2], 2)).endswith("; the first wrong one is 3 (-0.250)")
    assert verdict_of(response(sums, [0, 1, 2], labelled=True)).endswith(", and no step reward calls one wrong")
    assert verdict_of(response(sums, [0, 1, 2])).endswith("; which one is wrong is not known")
    assert verdict_of(response(sums)) == "" and summary_of(inspection(response(sums, [0, 1, 2]))) == []


def test_what_is_said_of_the_implied_value():
    one = response([0.5, -0.25])
    assert implied_text(one) == (
        "the implied value begins at 0.500, the mean of 3 other responses to the prompt; +0.750 remains at the end, where 0 is "
        "expected"
    )
    assert "where the response was cut, it is +0.750" in implied_text(response([0.5, -0.25], terminated=False))
    assert "nothing can remain" in implied_text(response([0.5], start=Start(0.5, ITSELF, 1)))
