"""Answers to eval_tasks: on the tokens of training, of the model before and after it."""

from dqo import DQOConfig
from dqo.data.prompts import Prompt
from dqo.evaluation import run as evaluation
from tests.dqo.helpers import tokenizer

TOKENIZER = tokenizer()
TASKS = [Prompt("<bos><bos>1+2=", "3", source="tasks.jsonl:1")]


def test_problems_have_the_prompts_of_training():
    (problem,) = evaluation.problems_of(TASKS, TOKENIZER)
    assert (problem.row["prompt"], problem.row["answer"]) == ("<bos><bos>1+2=", "3")
    assert problem.prompt_ids == [1, *TOKENIZER("1+2=")["input_ids"]]


class Run:
    """Of a training run only what answering needs."""

    class prepared:
        tokenizer = TOKENIZER

        class learner:
            policy = "trained"


def test_the_base_is_loaded_again_only_where_its_answers_are_not_given(monkeypatch):
    options = DQOConfig(method="rft", model_name_or_path="folder").options
    monkeypatch.setattr(evaluation, "load_policy", lambda path: f"loaded from {path}")
    monkeypatch.setattr(evaluation, "answers", lambda options, model, tokenizer, tasks, name: (model, name))
    assert evaluation.answers_of(options, Run, []) == {}
    found = evaluation.answers_of(options, Run, TASKS)
    assert found == {"base": ("loaded from folder", "base"), "rft": ("trained", "rft")}
    assert evaluation.answers_of(options, Run, TASKS, base="given")["base"] == "given"
