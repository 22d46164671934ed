"""The table of verifiers, and answers of eval_tasks: read before training."""

import json

import pytest

from dqo.config.options import load_options, options_of
from dqo.errors import UserError
from dqo.evaluation.tasks import read_tasks
from dqo.grading.arith import arith_grade
from dqo.grading.grade import Grade, grade_of
from dqo.grading.pool import check_answers
from dqo.grading.verifiers import VERIFIERS


def task(answer, line=1):
    return {"prompt": "p", "answer": answer, "source": f"tasks.jsonl:{line}"}


@pytest.mark.parametrize(
    "verifier, answer, said",
    [
        ("gsm8k", "four", "the reference answer 'four' is no number"),
        ("gsm8k", "", "the reference answer '' is no number"),
        ("gsm8k", "9" * 501, "is no number"),
        ("math", " ", "the reference answer is empty"),
    ],
)
def test_an_answer_that_cannot_be_graded_by_is_named_before_training(tmp_path, verifier, answer, said):
    if verifier == "math":
        pytest.importorskip("math_verify")
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "p", "answer": a}) for a in ("4", answer)))
    with pytest.raises(UserError) as caught:
        read_tasks(str(path), verifier)
    first, cure = str(caught.value).splitlines()
    assert first.startswith("tasks.jsonl:2: ") and said in first
    assert cure == (
        f"the verifier {verifier} cannot grade by it; mend the answer, drop the row, or choose another verifier"
    )


def test_many_such_answers_are_counted():
    with pytest.raises(UserError, match=r"tasks.jsonl:5: .*\n\.\.\. and 3 more\n"):
        check_answers([task("?", i) for i in range(1, 9)], "gsm8k")


def test_the_demonstration_grades_by_its_prompt():
    with pytest.raises(UserError, match="tasks.jsonl:3: the prompt 'p' is no chain such as"):
        check_answers([task("3", 3)], "arith")
    grades = [arith_grade(text, {"prompt": "1+2="}) for text in ("1+2=3\n#3", "1+2=4\n#4", "1+2=3\n3", "#3")]
    assert [(g.outcome, g.answer) for g in grades] == [
        ("right", "3"),
        ("wrong", "4"),
        ("unparsed", None),
        ("wrong", "3"),
    ]


def test_a_problem_without_an_answer_is_named():
    with pytest.raises(UserError, match=r"rows.jsonl:2: there is no answer \(a string\)"):
        check_answers([{"prompt": "p", "source": "rows.jsonl:2"}], "number")


def test_strict_and_flexible_graders_differ_where_only_the_form_is_wrong():
    problem = {"answer": "18"}
    for text in ("\\boxed{18}", "The answer is 18.", "**18**"):
        assert VERIFIERS["gsm8k"].grade(text, problem).outcome == "unparsed"
        assert VERIFIERS["number"].grade(text, problem) == Grade(1.0, True, "18")
    assert VERIFIERS["gsm8k"].grade("#### 18", problem) == VERIFIERS["number"].grade("#### 18", problem)
    assert VERIFIERS["gsm8k"].grade("#### 19", problem) == Grade(0.0, True, "19")


def test_what_a_verifier_returns_is_a_grade():
    import numpy
    import torch

    for true in (True, 1, 1.0, numpy.bool_(True), numpy.float32(1), torch.tensor(True), torch.tensor(1.0), Grade(1.0)):
        assert grade_of(true) == Grade(1.0)
    for wrong in (None, "1", float("nan"), float("-inf"), 1e39, [], numpy.nan, Grade(float("inf"))):
        with pytest.raises(ValueError, match="a verifier returns True, False or a finite number"):
            grade_of(wrong)


def test_the_option_takes_the_verifiers_of_the_table_and_its_help_says_what_each_compares(capsys):
    for name in VERIFIERS:
        assert load_options(["--eval_tasks", "x.jsonl", "--verifier", name]).train.verifier == name
    with pytest.raises(SystemExit):
        load_options(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(f"{name} {verifier.what}" in shown for name, verifier in VERIFIERS.items())
    assert options_of({"verifier": "python:package.module:function"}, "here").train.verifier
    with pytest.raises(UserError, match=r"verifier must be .*gsm8k.*, got gsm9k"):
        options_of({"verifier": "gsm9k"}, "here")
