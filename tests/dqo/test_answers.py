import pytest

from dqo.answers import boxed, same_answer


@pytest.mark.parametrize(
    "given, expected",
    [
        ("29", "29"),
        (" $29$. ", "29"),
        ("\\dfrac{11}{36}", "\\frac{11}{36}"),
        ("\\frac12", "0.5"),
        ("1/2", "\\frac{1}{2}"),
        ("40,\\!000", "40000"),
        ("40,000", "40000"),
        ("1 + 2\\sqrt{3}", "1+2\\sqrt{3}"),
        ("\\text{Tuesday}", "Tuesday"),
        ("90^\\circ", "90"),
        ("\\left(1, 2\\right)", "(1,2)"),
        ("-3", "-3.0"),
    ],
)
def test_answers_that_are_the_same(given, expected):
    assert same_answer(given, expected) and same_answer(expected, given)


@pytest.mark.parametrize(
    "given, expected",
    [("28", "29"), ("", ""), ("\\frac{11}{35}", "\\frac{11}{36}"), ("x+1", "x+2"), ("(1,2)", "(2,1)"), ("1,2", "12")],
)
def test_answers_that_are_not(given, expected):
    assert not same_answer(given, expected)


def test_what_is_not_recognised_is_called_different():
    assert not same_answer("2\\sqrt{3}+1", "1+2\\sqrt{3}")


@pytest.mark.parametrize(
    "text, found",
    [
        ("is \\boxed{4}.", "4"),
        ("\\boxed{1} then \\boxed{\\frac{1}{2}} there", "\\frac{1}{2}"),
        ("\\boxed{1} and \\boxed{2", "1"),
        ("nothing", None),
        ("\\boxed{2", None),
    ],
)
def test_the_last_closed_box(text, found):
    box = boxed(text)
    assert (box and box[0]) == found
    if box:
        assert text[: box[1]].endswith(found + "}")
