"""Answers of eval_tasks: read before training, and no completion's grading ends a run."""

import json

import pytest

from dqo.config.options import load_options, options_of
from dqo.errors import UserError
from dqo.evaluation.tasks import read_tasks
from dqo.grading.math_grader import GRADER
from dqo.grading.verifiers import VERIFIERS, Verifier, check_answers, graded_by


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


def test_a_verifier_that_fails_names_the_problem_and_calls_the_completion_wrong(monkeypatch, caplog):
    def fails(completion, answer):
        raise RecursionError("too deep") if completion == "odd" else ZeroDivisionError

    monkeypatch.setitem(VERIFIERS, "gsm8k", Verifier(fails, ""))
    correct = graded_by("gsm8k", task("4", 7))
    assert correct("odd") is False
    assert (
        "tasks.jsonl:7: grading by gsm8k failed (RecursionError: too deep); the completion counts as wrong: 'odd'"
        in (caplog.text)
    )
    assert correct("x" * 10**6) is False and len(caplog.records[-1].message) < 300


def test_what_can_be_graded_is():
    correct = graded_by("gsm8k", task("1,000"))
    assert correct("#### 1000") and not correct("#### 1001")


def test_a_missing_math_verify_is_named_before_training(monkeypatch):
    GRADER.close()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package math-verify: pip install 'math-verify>=0.8'"):
        check_answers([task("4")], "math")


def test_the_option_takes_the_verifiers_of_the_table_and_its_help_says_what_each_compares(capsys):
    for name in VERIFIERS:
        assert load_options(["--eval_tasks", "x.jsonl", "--verifier", name]).train.verifier == name
    with pytest.raises(SystemExit):
        load_options(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(f"{name} {verifier.what}" in shown for name, verifier in VERIFIERS.items())
    with pytest.raises(UserError, match=r"verifier must be .*gsm8k.*, got 'gsm9k'"):
        options_of({"verifier": "gsm9k"}, "here")
