"""Comparing final answers: what is the same, what is not, and nothing that a model writes takes long."""

import json
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqo.grading.answers import LONGEST, boxed, canonical, final_answer, same_answer, verdict

MATH500 = Path(__file__).parents[4] / "shared" / "data" / "math500" / "test500.jsonl"


@pytest.mark.parametrize(
    "given, expected",
    [
        ("29", "29"),
        (" $29$. ", "29"),
        ("\\(29\\)", "\\boxed{29}"),
        ("\\dfrac{11}{36}", "\\frac{11}{36}"),
        ("\\frac12", "0.5"),
        ("\\frac{270}7", "270/7"),
        ("1/2", "\\frac{1}{2}"),
        ("-\\frac{1}{3}", "\\frac{-1}{3}"),
        ("2/4", ".5"),
        ("2 1/4", "\\frac{9}{4}"),
        ("2\\frac14", "2.25"),
        ("-2 \\frac{1}{4}", "-9/4"),
        ("40,\\!000", "40000"),
        ("40,000", "40000"),
        ("11,\\! 111,\\! 100", "11111100"),
        ("1 + 2\\sqrt{3}", "1+2\\sqrt{3}"),
        ("2\\sqrt{3}+1", "1+2\\sqrt3"),
        ("\\frac{3\\sqrt{3}}{4}", "3\\sqrt3/4"),
        ("(11+9a)/20", "\\frac{11+9a}{20}"),
        ("2\\cdot\\pi", "2π"),
        ("x^{10}", "x^10"),
        ("52_{8}", "52_8"),
        ("\\text{Tuesday}", "Tuesday"),
        ("\\text{(C)}", "C"),
        ("90^\\circ", "90"),
        ("90°", "90^{\\circ}"),
        ("90 degrees", "90^\\circ"),
        ("50\\%", "50"),
        ("50\\%", "1/2"),
        ("\\$36", "36"),
        ("5.4 \\text{ cents}", "5.4"),
        ("864 \\mbox{ inches}^2", "864 \\text{ inches}^{2}"),
        ("x = 5", "5"),
        ("x = 1, y = 2", "y = 2, x = 1"),
        ("5 \\text{ lbs}", "5 \\text{ lb}"),
        ("x \\in [-2,7]", "[-2, 7]"),
        ("\\left(1, 2\\right)", "(1,2)"),
        ("\\{1, 2\\}", "2,1"),
        ("1 \\text{ or } 2", "2, 1"),
        ("(0,9) \\cup (9,\\infty)", "(9, ∞)∪(0,9)"),
        ("\\begin{pmatrix} -1/3 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}-\\frac13\\\\ 2\\end{pmatrix}"),
        ("-3", "-3.0"),
    ],
)
def test_answers_that_are_the_same(given, expected):
    assert same_answer(given, expected) and same_answer(expected, given)


@pytest.mark.parametrize(
    "given, expected",
    [
        ("28", "29"),
        ("", ""),
        ("$$", ""),
        ("\\frac{11}{35}", "\\frac{11}{36}"),
        ("x+1", "x+2"),
        ("2 1/4", "21/4"),
        ("2\\,1/4", "21/4"),
        ("2\\frac{1}{4}", "2\\cdot\\frac{1}{4}"),
        ("2 3", "23"),
        ("1 2 3", "123"),
        ("1,2", "12"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "\\{1,2\\}"),
        ("(1,234)", "1234"),
        ("(3,4]", "(3,4)"),
        ("(1,2) \\cup (3,4)", "(1,2), (3,4)"),
        ("1, 1, 2", "1, 2, 2"),
        ("x=5", "y=5"),
        ("x=1, y=2", "2, 1"),
        ("x=1, y=2", "y=1, x=2"),
        (r"5 \text{ ms}", r"5 \text{ m}"),
        (r"5 \text{ s}", r"5 \text{ m}"),
        ("2^" * 499 + "2", "2"),
        ("\\sin" * 240 + " x", "x"),
        ("5 \\text{ cm}", "5 \\text{ m}"),
        ("36^\\circ", "\\$36"),
        ("5\\%", "50\\%"),
        ("0.333", "1/3"),
        ("2x", "2"),
        ("2xy \\text{ cm}", "2"),
        ("52_8", "52"),
        ("x^{10}", "x^1 0"),
        ("\\frac{1}{2x}", "\\frac{1}{2}x"),
        ("\\sin 2x", "2\\sin x"),
        ("\\sin(x)y", "\\sin(xy)"),
        ("f(2)", "2f"),
        ("\\text{no}", "\\text{on}"),
        ("A", "a"),
        ("1/0", "2/0"),
    ],
)
def test_answers_that_are_not(given, expected):
    assert not same_answer(given, expected) and not same_answer(expected, given)


def test_what_is_not_recognised_is_called_different_but_not_known_to_be():
    assert not same_answer("\\sqrt{12}", "2\\sqrt{3}")
    assert verdict("\\sqrt{12}", "2\\sqrt{3}") is None
    assert verdict("1/3", "0.333") is verdict("5 \\text{ cm}", "5 \\text{ m}") is verdict("(1, 2)", "(1, 3)") is False


@given(st.fractions(-500, 500, max_denominator=60), st.fractions(-500, 500, max_denominator=60), st.randoms())
def test_numbers_are_the_same_when_their_values_are_however_they_are_written(a, b, random):
    assert same_answer(_written(a, random), _written(a, random))
    assert same_answer(_written(a, random), _written(b, random)) == (a == b)


def _written(value: Fraction, random) -> str:
    sign, (p, q) = "-" * (value < 0), abs(value).as_integer_ratio()
    factor = random.choice([1, 1, 3])
    forms = [f"{p * factor}/{q * factor}", f"\\frac{{{p}}}{{{q}}}", f"\\tfrac{{ {p * factor} }}{{{q * factor}}}"]
    if p > q > 1:
        forms += [f"{p // q} {p % q}/{q}", f"{p // q}\\frac{{{p % q}}}{{{q}}}"]
    if q == 1:
        forms += [f"{p:,}", f"{p}.0", f"{p:,}".replace(",", ",\\!")]
    if 1000 % q == 0:
        forms += [f"{float(abs(value)):.3f}"]
    written = sign + random.choice(forms)
    return random.choice(["{}", "${}$", "\\({}\\).", "x = {}", "\\boxed{{{}}}"]).format(written)


@given(st.lists(st.text(alphabet="0123456789 ,./()[]{}\\+-=^_%$xπ!", max_size=12), min_size=2, max_size=2))
def test_no_text_breaks_the_comparison_and_it_has_no_side(texts):
    assert verdict(*texts) == verdict(*texts[::-1])
    if re.sub(r"[^0-9]", "", texts[0]) != re.sub(r"[^0-9]", "", texts[1]) and not any(
        set("./+-*%()") & set(t) for t in texts
    ):
        assert not same_answer(*texts)  # other digits, and nothing that calculates


@pytest.mark.parametrize(
    "text, found",
    [
        ("is \\boxed{4}.", "4"),
        ("\\boxed{1} then \\boxed{\\frac{1}{2}} there", "\\frac{1}{2}"),
        ("\\boxed{1} and \\boxed{2", "1"),
        ("\\boxed{a \\boxed{b} c}", "b"),
        ("} \\boxed {\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("{ \\boxed{2}", "2"),
        ("nothing", None),
        ("\\boxed{2", None),
    ],
)
def test_the_last_closed_box(text, found):
    box = boxed(text)
    assert (box and box[0]) == found
    if box:
        assert text[: box[1]].endswith(found + "}")


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "a", "\\"]), max_size=14).map("".join))
def test_boxes_are_those_of_counting_braces_from_each(text):
    text = re.sub(r"\\(?!boxed)", "", text)

    def inside(start):
        depth = 1
        for i in range(start, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start:i], i + 1
        return None

    found = [inside(match.end()) for match in re.finditer(r"\\boxed\{", text)]
    assert boxed(text) == ([box for box in found if box] or [None])[-1]


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so \\boxed{4}\n#### 5", "4"),
        ("#### 1\n#### 5 \nend", "5"),
        ("The answer is: 7", "7"),
        ("The final answer is $\\frac12$.\n", "$\\frac12$."),
        ("\\boxed{}", None),
        ("7", None),
        ("", None),
    ],
)
def test_the_final_answer_is_in_a_box_or_behind_a_mark(text, answer):
    assert final_answer(text) == answer


HOSTILE = [
    "9",
    "\\boxed{",
    "{",
    "}",
    "(",
    "\\{",
    "1,",
    "\\frac",
    "\\text{",
    "$",
    "\\,",
    " ",
    "9 ",
    "-",
    "x=",
    "####",
    "A:",
    "\t",
    "\n",
] + [
    "answer is ",
    "\\cup",
    "^",
    "\\sqrt[",
    "=\\in",
    "\\\\",
    "\\boxed {1}",
    "\\begin{pmatrix}",
    "<<",
    "<<1=1",
    "1,111",
    "1.",
]


@pytest.mark.slow
def test_long_texts_take_linear_time():
    code = (
        "import sys; from dqo.grading.answers import LONGEST, boxed, final_answer, verdict\n"
        "from dqo.grading.gsm8k import *\n"
        "for piece in sys.argv[1:]:\n"
        "    text = piece * (100_000 // len(piece)) + '!'\n"
        "    boxed(text), final_answer(text), verdict(text, text + '1'), gsm8k_answer('####' + text), gsm8k_answer(text)\n"
        "    number(text), number(text[:-1]), evaluate_expression(text), line_spans(text)\n"
        "    calculator_steps(text), calculator_steps('<<' + text), calculator_steps(text + '>>')\n"
        "    verdict(piece * (LONGEST // len(piece)), piece * (LONGEST // len(piece) - 1) + '1')"
    )
    subprocess.run(
        [sys.executable, "-c", code, *HOSTILE], check=True, timeout=60
    )  # seconds; the square would be minutes


def test_answers_of_more_than_a_thousand_characters_are_the_same_as_their_own_text():
    long = "1+" * LONGEST + "1"
    assert same_answer(long, f" {long} ")
    assert verdict(long, str(LONGEST + 1)) is False


def test_answers_of_math_500_are_the_same_as_nothing_but_themselves():
    if not MATH500.exists():
        pytest.skip("MATH-500 is not beside the project")
    answers = [json.loads(line)["answer"] for line in MATH500.read_text().splitlines()]
    assert all(same_answer(f"${answer}$.", f"\\boxed{{{answer}}}") for answer in answers)
    distinct = random.Random(0).sample(sorted(set(answers)), 120)
    same = {(a, b) for i, a in enumerate(distinct) for b in distinct[:i] if same_answer(a, b)}
    for a, b in same:  # in this sample the digits that are written say it
        assert re.findall(r"[0-9]", a) == re.findall(r"[0-9]", b) or {a, b} == {"1,-2", "-2,1"}


@pytest.mark.parametrize(
    "answers",
    [
        ("1/2", "\\frac12", "0.5", "x = \\frac{1}{2}"),
        ("1,234", "1234.0", "\\$1234"),
        ("\\frac{\\sqrt{3}}{2}", "\\sqrt3/2"),
        ("x^2+2x+1", "1+2x+x^{2}"),
        ("\\{1, 2\\}", "2, 1", "1 \\text{ and } 2"),
        ("(1, 2)", "\\left( 1, 2.0 \\right)"),
        ("\\text{east}", "east"),
        ("50\\%", "50"),
    ],
)
def test_answers_that_are_the_same_have_one_canonical_form(answers):
    assert len({canonical(answer) for answer in answers}) == 1


@pytest.mark.parametrize(
    "one, other", [("(1,2)", "1,2"), ("(1,2)", "(2,1)"), ("2 3", "23"), ("x", "y"), ("[1,2)", "(1,2)"), ("x^2", "2x")]
)
def test_answers_that_differ_have_two(one, other):
    assert canonical(one) != canonical(other)


@given(st.text(alphabet="0123456789x^+-*/(){}[]\\,;&% frac\u221a", max_size=60))
def test_any_text_has_a_canonical_form(text):
    assert isinstance(canonical(text), str)
