"""The verifier math: what algebra finds the same, and that nothing in an answer can stop or fill the trainer."""

import json
import sys
from pathlib import Path

import pytest

from dqo.errors import UserError
from dqo.grading.math_grader import reference_answer
from dqo.grading.pool import VerifierPool

pytest.importorskip("math_verify")
MATH500 = Path(__file__).parents[4] / "shared" / "data" / "math500" / "test500.jsonl"


@pytest.fixture(scope="module")
def pool():
    with VerifierPool("math", processes=1, timeout=20) as made:
        yield made


def graded(pool, given, expected):
    return pool.grade([f"\\boxed{{{given}}}"], [{"answer": expected}])[0]


@pytest.mark.parametrize(
    "given, expected",
    [
        ("\\sqrt{12}", "2\\sqrt{3}"),
        ("$(x+1)^2$.", "x^2+2x+1"),
        ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt2}{2}"),
        ("2^{10}", "1024"),
        ("1/2", "0.5"),
    ],
)
def test_algebra_is_done(pool, given, expected):
    assert graded(pool, given, expected).right


@pytest.mark.parametrize(
    "given, expected",
    [
        ("2 1/4", "21/4"),
        ("2 3", "23"),
        ("\\sqrt{12}", "3\\sqrt{2}"),
        ("0.10000001", "0.1"),
        ("5 \\text{ cm}", "5 \\text{ m}"),
        ("\\frac{2", "2"),
        ("x", "y"),
        ("\\text{east}", "\\text{west}"),
        ("__import__('os')", "x"),
    ],
)
def test_what_differs_is_called_different(pool, given, expected):
    grade = graded(pool, given, expected)
    assert not grade.right and grade.error is None


def test_an_endless_comparison_is_killed_and_the_next_one_answered(caplog):
    with VerifierPool("math", processes=1, timeout=1) as pool:
        assert graded(pool, "9^{9^{9^9}}", "2").error == "timeout"
        assert "grading by math ended in timeout; the completion counts as wrong" in caplog.text
        assert graded(pool, "\\frac{2}{4}", "0.5").right
        assert pool.counts == {"timeout": 1, "right": 1}


@pytest.mark.parametrize(
    "module, said",
    [
        ("raise ImportError('antlr4 of another version')", "ImportError: antlr4 of another version; install it again"),
        ("import no_such_part", "cannot be loaded: No module named 'no_such_part'; install it again"),
        (
            "raise ModuleNotFoundError('gone', name='math_verify')",
            "math needs the package math-verify: pip install 'math-verify",
        ),
    ],
)
def test_a_missing_or_broken_math_verify_is_named_with_its_cure(monkeypatch, tmp_path, module, said):
    (tmp_path / "math_verify.py").write_text(module)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(UserError) as caught:
        VerifierPool("math", processes=1)
    assert said in str(caught.value)


def test_completions_are_graded_by_their_final_answer(pool):
    cases = [
        ("so $x$ is \\boxed{\\frac{2}{\\sqrt{2}}}.", "\\sqrt{2}", "right"),
        ("#### 1,000", "$1000$", "right"),
        ("The answer is $\\sqrt{12}$.", "Thus it is \\boxed{2\\sqrt{3}}.", "right"),
        ("\\sqrt{2}", "\\sqrt{2}", "unparsed"),  # no answer is marked
        ("", "2", "unparsed"),
    ]
    found = pool.grade([given for given, _, _ in cases], [{"answer": expected} for _, expected, _ in cases])
    assert [grade.outcome for grade in found] == [outcome for _, _, outcome in cases]


def test_equal_answers_have_one_canonical_form(pool):
    same = ["\\frac{1}{2}", "1/2", "0.5", "x = 0.50", "$\\frac12$."]
    assert {graded(pool, answer, "3").answer for answer in same} == {"1/2"}


def test_a_reference_without_an_answer_is_an_error():
    assert reference_answer("so \\boxed{2}") == reference_answer(" 2 ") == "2"
    with pytest.raises(ValueError, match="the reference answer is empty"):
        reference_answer(" ")
    with pytest.raises(ValueError, match="the reference answer has 1,001 characters, more than 1,000"):
        reference_answer("1" * 1001)


def test_the_solutions_of_math_500_are_right(pool):
    if not MATH500.exists():
        pytest.skip("MATH-500 is not beside the project")
    problems = [json.loads(line) for line in MATH500.read_text().splitlines()]
    grades = pool.grade([problem["solution"] for problem in problems], problems)
    assert [p["unique_id"] for p, grade in zip(problems, grades) if not grade.right] == []
    assert len(problems) == 500
