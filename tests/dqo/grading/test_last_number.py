"""The verifier number: an answer is found however it is written, and what is no answer is not taken for one."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqo.grading.last_number import answered_number, last_number_grade

WAYS = [  # of writing an answer
    "\\boxed{%s}",
    "Thus $\\boxed{%s}$ in 4 days.",
    "\\boxed{\\$%s}",
    "\\boxed{%s \\text{ dollars}}",
    "\\boxed{x = %s}",
    "The answer is %s.",
    "The answer is **%s** because 2 < 3",
    "So the final answer is: $%s.",
    "Answer: %s",
    "the answer is 3 * 4 = %s",
    "The answer is %s dollars for 4 days.",
    "2 + 3 = 5\n#### %s",
    "#### $%s dollars",
    "**%s**",
    "It makes 3 of 4, so %s",
    "4 - 1 = %s",
    "4*5 is %s!",
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("written, value", [("18", 18), ("1,234", 1234), ("2.50", Fraction(5, 2))])
def test_every_way_of_writing_an_answer_is_read(way, written, value):
    grade = last_number_grade(way % written, {"answer": str(float(value))})
    assert grade.right and grade.answer == str(value)


@pytest.mark.parametrize(
    "text, value",
    [
        ("20-2", 2),  # a minus between numbers is no sign
        ("20 - 2", 2),
        ("-2", -2),
        ("so -$2", -2),
        ("$-2", -2),
        ("it is −7.", -7),
        ("\\boxed{\\frac{1}{2}}", Fraction(1, 2)),
        ("\\boxed{50\\%}", 50),
        ("\\boxed{3} and \\boxed{4}", 4),
        ("\\boxed{?} 5", 5),
        ("#### none\nbut 6", 6),
        ("The answer is not known. 7 of 9", 9),
        ("the answer is 3. The answer is 8.", 8),
        ("no answer", None),
        ("", None),
        ("1" * 600, None),
    ],
)
def test_the_number_that_is_meant_is_taken(text, value):
    assert answered_number(text) == value


@given(st.text(alphabet="#0123456789.,-$%\\boxed{} =answeris:\n*", max_size=200))
def test_no_text_is_an_error(text):
    assert answered_number(text) is None or isinstance(answered_number(text), Fraction)


@given(st.integers(-(10**9), 10**9), st.sampled_from(WAYS[:9]))
def test_any_integer_is_read_back(value, way):
    assert answered_number(way % value) == value
