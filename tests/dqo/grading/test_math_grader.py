"""The verifier math: what algebra finds the same, and that nothing in an answer can stop or fill the trainer."""

import json
import re
import threading
from pathlib import Path

import pytest

from dqo.errors import UserError
from dqo.grading.math_grader import MathGrader, math_correct

pytest.importorskip("math_verify")
MATH500 = Path(__file__).parents[4] / "shared" / "data" / "math500" / "test500.jsonl"


@pytest.fixture(scope="module")
def grader():
    grader = MathGrader(seconds=20)
    yield grader
    grader.close()


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
def test_algebra_is_done(grader, given, expected):
    assert grader.same(given, expected)


@pytest.mark.parametrize(
    "given, expected",
    [
        ("2 1/4", "21/4"),
        ("2 3", "23"),
        ("\\sqrt{12}", "3\\sqrt{2}"),
        ("0.10000001", "0.1"),
        ("5 \\text{ cm}", "5 \\text{ m}"),
        ("\\frac{", "2"),
        ("", "x"),
        ("x", ""),
        ("\\text{east}", "\\text{west}"),
        ("__import__('os')", "x"),
    ],
)
def test_what_differs_is_called_different(grader, given, expected):
    assert not grader.same(given, expected)
    assert not grader.unfinished


def test_an_endless_comparison_is_killed_and_the_next_one_answered(caplog):
    grader = MathGrader(seconds=1)
    assert not grader.same("9^{9^{9^9}}", "2")
    assert grader.unfinished == 1
    assert "math-verify did not finish comparing '9^{9^{9^9}}' with '2': they count as different" in caplog.text
    grader.seconds = 20
    assert grader.same("\\sqrt{12}", "2\\sqrt{3}")
    grader.close()


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="reads the limit from /proc")
def test_memory_is_limited_and_running_out_of_it_is_no_verdict(monkeypatch, caplog):
    grader = MathGrader(memory=3 * 2**30)
    grader.ready()
    limits = Path(f"/proc/{grader._process.pid}/limits").read_text()
    assert re.search(r"Max address space +3221225472 ", limits)
    monkeypatch.setattr(grader, "_ask", lambda question, seconds: "MemoryError")
    assert not grader.same("\\sqrt{12}", "2\\sqrt{3}")
    assert grader.unfinished == 1 and grader._process is None
    assert "did not finish" in caplog.text


def test_a_worker_that_died_is_replaced(grader):
    grader.ready()
    grader._process.kill()
    grader._process.wait()
    assert grader.same("\\sqrt{12}", "2\\sqrt{3}")
    assert not grader.unfinished


def test_threads_share_the_worker(grader):
    found = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(grader.same(f"\\sqrt{{{n * n * 3}}}", f"{n}\\sqrt{{3}}")))
        for n in range(2, 6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_without_math_verify_the_cure_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="the verifier math needs the package math-verify: pip install 'math-verify"):
        MathGrader().ready()


def test_a_broken_math_verify_is_named(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('antlr4 of another version')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded: ImportError: antlr4 of another version; install it again"):
        MathGrader().ready()


def test_completions_are_graded_by_their_final_answer():
    assert math_correct("so $x$ is \\boxed{\\frac{2}{\\sqrt{2}}}.", "\\sqrt{2}")
    assert math_correct("#### 1,000", "$1000$")
    assert math_correct("The answer is $\\sqrt{12}$.", "Thus it is \\boxed{2\\sqrt{3}}.")
    assert not math_correct("\\sqrt{2}", "\\sqrt{2}")  # no answer is marked
    assert not math_correct("", "2")
    with pytest.raises(ValueError, match="the reference answer is empty"):
        math_correct("2", " ")
    with pytest.raises(ValueError, match="the reference answer has 1,001 characters, more than 1,000"):
        math_correct("2", "1" * 1001)


def test_the_solutions_of_math_500_are_right():
    if not MATH500.exists():
        pytest.skip("MATH-500 is not beside the project")
    problems = [json.loads(line) for line in MATH500.read_text().splitlines()]
    assert [p["unique_id"] for p in problems if not math_correct(p["solution"], p["answer"])] == []
