import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dqo import DQOConfig, DQOTrainer
from dqo.commands.train import train_command
from dqo.data.overlap import check_unseen, problem_keys, trained_problems
from dqo.data.prompts import Prompt
from dqo.data.rows import Row
from dqo.errors import UserError
from tests.dqo.helpers import arguments, rollout_rows

PROBLEM = "What is  2 + ½?\nAnswer:"
SAME = ["what is 2 + ½? answer:", " WHAT IS 2\u00a0+ ½?\n\n\nAnswer: ", "What is 2 + 1⁄2? Answer:"]
OTHERS = ["What is 2 + ½? Answer", "What is 2+½?\nAnswer:", "", " \n"]


def said(text, role="user"):
    return [{"role": "system", "content": "Think."}, {"role": role, "content": text}]


@pytest.mark.parametrize("text", [PROBLEM, *SAME])
def test_a_problem_is_known_in_strings_and_in_messages_alike(text):
    for prompt in (text, said(text), [*said("Earlier."), {"role": "assistant", "content": "x"}, *said(text)[1:]]):
        for trained in (PROBLEM, said(PROBLEM)):
            assert problem_keys(prompt) & problem_keys(trained)


@pytest.mark.parametrize("text", OTHERS)
def test_another_problem_and_another_speaker_are_not_it(text):
    assert not problem_keys(text) & problem_keys(PROBLEM)
    assert not problem_keys(said(text)) & problem_keys(PROBLEM)
    assert not problem_keys(said(PROBLEM, "assistant")) & problem_keys(PROBLEM)
    assert problem_keys("") == problem_keys([{"role": "user"}]) == set()


@settings(max_examples=30, deadline=None)
@given(st.text(), st.text(alphabet=" \t\n\u2003"), st.text())
def test_white_space_and_case_alone_make_no_other_problem(left, space, right):
    if space:
        assert problem_keys(f"{left} {right}") == problem_keys(f"{space}{left}{space}{right}{space}")
    folded = f"{left}{right}".casefold()
    assert problem_keys(folded) == problem_keys(folded.casefold())


def test_the_first_ones_and_their_number_are_named():
    tasks = [Prompt(f"problem {i}", source=f"tasks.jsonl:{i + 1}") for i in range(9)]
    trained = trained_problems(
        Row(prompt=said(f"PROBLEM {i}"), completion=said("x", "assistant")[1:]) for i in (0, 2, 8)
    )
    with pytest.raises(UserError) as caught:
        check_unseen(tasks, trained, "tasks.jsonl", "rollouts.jsonl")
    assert str(caught.value).startswith(
        "3 of 9 problems of tasks.jsonl are prompts of rollouts.jsonl too, up to case and white space (tasks.jsonl:1, "
        "tasks.jsonl:3, tasks.jsonl:9): accuracy"
    )
    with pytest.raises(UserError, match=r"9 of 9 .*tasks.jsonl:5, \.\.\.\)"):
        check_unseen(tasks, trained_problems(Row(prompt=task.prompt, completion="x") for task in tasks), "t", "r")
    check_unseen(tasks, trained_problems([Row(prompt="problem 10", completion="x")]), "t", "r")


def test_worked_examples_that_all_prompts_share_are_no_problems():
    example = [*said("1 + 1?"), {"role": "assistant", "content": "2"}]
    trained = trained_problems([Row(prompt=[*example, *said("2 + 2?")[1:]], completion=said("4", "assistant")[1:])])
    check_unseen([Prompt([*example, *said("3 + 3?")[1:]])], trained, "t", "r")
    for problem in ("2 + 2?", "1 + 1?"):
        with pytest.raises(UserError, match="1 of 1 problems"):
            check_unseen([Prompt([*example, *said(problem)[1:]])], trained, "t", "r")


@pytest.mark.parametrize("how", ["command", "dry run", "python", "python, begun"])
def test_tasks_that_are_trained_on_are_refused_before_a_model_is_loaded(files, how):
    prompts = list(dict.fromkeys(row["prompt"] for row in rollout_rows(prompts=12)))
    tasks = [{"prompt": prompt.upper() + " ", "answer": "3"} for prompt in prompts]
    (files / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    options = {"eval_tasks": str(files / "tasks.jsonl"), "verifier": "gsm8k"}
    if how != "python, begun":
        (files / "model" / "model.safetensors").unlink()  # loading it would fail with another message
    message = (
        rf"problems of {files}/tasks.jsonl are prompts of {files}/rollouts.jsonl too.*tasks.jsonl:1, tasks.jsonl:2"
    )
    with pytest.raises(UserError, match=message):
        if how.startswith("python"):
            args = DQOConfig(output_dir=str(files / "out"), eval_fraction=0.0, **options)
            trainer = DQOTrainer(str(files / "model"), args, str(files / "rollouts.jsonl"))
            if how == "python, begun":
                trainer.evaluate()
            trainer.train()
        else:
            more = ["--dry_run"] if how == "dry run" else []
            train_command([*arguments(files, eval_fraction=0, **options), *more])
    assert how == "python, begun" or not (files / "out").exists()


def test_tasks_that_are_held_out_are_not_refused(files, capsys):
    (files / "tasks.jsonl").write_text(json.dumps({"prompt": "9+9=", "answer": "3"}))
    train_command([*arguments(files, eval_tasks=files / "tasks.jsonl", verifier="gsm8k"), "--dry_run"])


def test_a_problem_that_a_user_asks_in_the_course_of_a_completion_is_trained_on():
    turns = [{"role": "assistant", "content": "4"}, *said("3 + 3?")[1:], {"role": "assistant", "content": "6"}]
    trained = trained_problems([Row(prompt=said("2 + 2?"), completion=turns)])
    with pytest.raises(UserError, match="1 of 2 problems of t are prompts of r too"):
        check_unseen([Prompt("3 + 3?", source="t:1"), Prompt("6", source="t:2")], trained, "t", "r")
