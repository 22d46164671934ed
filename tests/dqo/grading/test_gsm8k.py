import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqo.grading.gsm8k import (
    annotation_correct,
    calculator_steps,
    evaluate_expression,
    gsm8k_answer,
    gsm8k_correct,
    number,
)

DATA = Path(__file__).parents[4] / "shared" / "data" / "gsm8k"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("7-2-1", 4),
        ("8/4/2", 1),
        ("10/3", Fraction(10, 3)),
        ("0.1+0.2", Fraction(3, 10)),
        (".5*4", 2),
        ("5.*2", 10),
        ("-3*-2", 6),
        ("2-(-3)", 5),
        ("1,200 + 1,050,000.5", Fraction(2102401, 2)),
        ("$2 x $3", 6),
        ("2 X 3 × 4 · 5", 120),
        ("9÷3−1", 2),
        ("50000*5%", 2500),
        ("(10+10)%*5", 1),
        (" 4 ", 4),
        ("1+" * 99 + "1", 100),
    ],
)
def test_expressions_have_their_exact_value(text, value):
    assert evaluate_expression(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "2x", "2(3)", "4*mugs", "1+", "*2", "(1", "1)", "()", "1 2", "1..2", "1.2.3", "2**3", "2//3",
        "1/0", "1/(2-2)", "12,00", "1,2345", "1:30", "25k", "¾*4", "3*(2+150%)", "100-20%", "1e3", "٣+1",
        "2\n+;", "__import__('os')",
    ],
)  # fmt: skip
def test_what_is_no_arithmetic_has_no_value(text):
    assert evaluate_expression(text) is None


@pytest.mark.parametrize("text", ["-" * 1900 + "1", "(" * 900, "9" * 10**6, "9*" * 10**5 + "9"])
def test_hostile_expressions_end_quickly_without_a_value(text):
    assert evaluate_expression(text) is None


def expressions():
    leaf = st.integers(0, 999).map(str) | st.decimals(0, 99, places=2).map(str)

    def compound(inner):
        parts = st.tuples(inner, st.sampled_from("+-*/"), inner)
        return parts.map("".join) | inner.map(lambda text: f"({text})") | inner.map(lambda text: f"(-{text})")

    return st.recursive(leaf, compound, max_leaves=12)


@given(expressions())
def test_values_are_those_of_exact_arithmetic(text):
    import re

    exact = re.sub(r"[0-9.]+", lambda match: f"Fraction('{match[0]}')", text)
    try:
        expected = eval(exact, {"Fraction": Fraction})
    except ZeroDivisionError:
        expected = None
    assert evaluate_expression(text) == expected


@given(st.text(alphabet="0123456789.,+-*/()%$x= ", max_size=30))
def test_no_text_breaks_the_grader(text):
    evaluate_expression(text)
    annotation_correct(text)
    calculator_steps(f"<<{text}>>{text}\n#### {text}")
    gsm8k_answer(f"#### {text}")


@pytest.mark.parametrize(
    ("annotation", "correct"),
    [
        ("48/2=24", True),
        ("48/2=25", False),
        ("20*1=20.0", True),
        ("10/3=3.3333", True),
        ("10/3=3.33", True),
        ("10/3=3.34", False),
        ("10/3=3.3334", False),
        ("2/3=0.66", False),  # cut, not rounded
        ("2/3=0.67", True),
        ("1/8=0.12", True),  # a tie may go either way
        ("1/8=0.13", True),
        ("800/3=266.6666666666667", True),
        ("10/3=3.3333333333333335", True),  # a double's last digit
        ("20/100*41.472=8.294400000000001", True),
        ("10/3=3", False),  # whole numbers are not roundings
        ("1/3=0", False),
        ("1/3=33.33%", True),
        ("1/3=33.4%", False),
        ("12*20,000=240,000", True),
        ("9*2=$18", True),
        ("5*2/5=2.0=2.0", True),
        ("50=50-20-60=50", False),
        ("4=2+2", True),
        ("-5+2=-3", True),
        ("x+56=86", None),
        ("400-250=150 000", None),
        ("11", None),
        ("=3", None),
        ("3=", None),
        ("", None),
    ],
)
def test_annotations_are_judged_exactly_or_by_the_decimals_they_show(annotation, correct):
    assert annotation_correct(annotation) is correct


@given(st.fractions(-1000, 1000, max_denominator=999), st.integers(1, 9))
def test_a_correct_rounding_is_right_and_the_next_decimal_is_wrong(exact, decimals):
    unit = Fraction(1, 10**decimals)
    rounded = round(exact / unit)
    sign = "-" if exact < 0 else ""
    written = f"{abs(rounded):0{decimals + 1}d}"
    written = f"{written[:-decimals]}.{written[-decimals:]}"
    expression = f"{sign}{abs(exact.numerator)}/{exact.denominator}"
    assert annotation_correct(f"{expression}={sign}{written}") is True
    above = f"{abs(rounded) + 2:0{decimals + 1}d}"
    assert annotation_correct(f"{expression}={sign}{above[:-decimals]}.{above[-decimals:]}") is False


def test_steps_are_the_lines_with_their_verdicts():
    text = "He has 2+2=<<2+2=4>>4\n\nwrong <<2*2=5>>5, <<1+1=2>>2\n<<x=3>>3 <<1+1=2>>2\nnothing\nA: 4"
    steps = calculator_steps(text)
    assert [text[step.start : step.end] for step in steps] == text.splitlines(keepends=True)
    assert [step.correct for step in steps] == [True, None, False, None, None, None]
    assert [(step.annotations, step.wrong, step.unparsed) for step in steps] == [
        (1, 0, 0),
        (0, 0, 0),
        (2, 1, 0),
        (2, 0, 1),
        (0, 0, 0),
        (0, 0, 0),
    ]


def test_an_annotation_without_an_end_cannot_be_read():
    (step,) = calculator_steps("it costs <<41.472+8.")
    assert (step.annotations, step.unparsed, step.correct) == (1, 1, None)


def test_a_wrong_annotation_outweighs_one_that_cannot_be_read():
    (step,) = calculator_steps("<<x=1>> <<1=2>>")
    assert step.correct is False


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2+2=4\n#### 4", 4),
        ("so\nA: 24", 24),
        ("A: -1,234.50", Fraction(-2469, 2)),
        ("#### $18", 18),
        ("#### -$18", -18),
        ("#### $-18.", -18),
        ("#### 20%", 20),
        ("  A:  7 ", 7),
        ("A: 1\nmore\nA: 2\nand then", 2),
        ("#### 1\nA: 2", 2),
        ("The answer is #### 5", 5),
        ("#### 10 dollars", None),
        ("A: 1/5", None),
        ("A: -1.8 billion", None),
        ("A: 10+John's age", None),
        ("A:", None),
        ("A: 12,34", None),
        ("A: 4\nA: four", None),
        ("BA: 4", None),
        ("the answer is 4", None),
        ("#### ٣", None),
        ("#### 1\r", 1),
        ("", None),
    ],
)
def test_the_answer_is_the_number_after_the_last_mark(text, answer):
    assert gsm8k_answer(text) == answer


def test_answers_are_compared_as_numbers():
    assert gsm8k_correct("A: 1,000.0", "1000")
    assert gsm8k_correct("#### 18.", "She makes $<<9*2=18>>18\n#### 18")
    assert not gsm8k_correct("A: 8.333333333333334", "8.333333333333333")
    assert not gsm8k_correct("no answer", "0")


def test_a_reference_without_a_number_is_an_error():
    with pytest.raises(ValueError, match="reference answer 'four' is no number"):
        gsm8k_correct("A: 4", "four")


def test_numbers_stand_alone():
    assert number(" 1,000 ") == 1000
    assert number("--1") is number("1 2") is number("") is number("-$-1") is number("9" * 5000) is None


def test_the_published_reference_solutions_are_right():
    if not DATA.exists():
        pytest.skip("GSM8K is not beside the project")
    steps = []
    for line in (DATA / "train.jsonl").read_text().splitlines():
        answer = json.loads(line)["answer"]
        assert gsm8k_answer(answer) is not None
        steps += calculator_steps(answer)
    assert sum(step.annotations for step in steps) > 23_000
    assert sum(step.wrong for step in steps) == 0
    assert sum(step.unparsed for step in steps) == 2  # floor divisions, "//"
