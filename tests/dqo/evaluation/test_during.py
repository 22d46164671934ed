"""Answers while a model is trained: they are logged, move no number of the training, and come again when a run goes on."""

import json

import pytest
from transformers import TrainerCallback

from dqo import DQOConfig
from dqo.config.options import load_options
from dqo.data.prompts import Prompt, read_prompts
from dqo.evaluation.accuracy import Problem, evaluate
from dqo.evaluation.during import answering, some_of
from dqo.models.new import save
from dqo.models.policy import load_policy
from dqo.train.inputs import Given
from dqo.train.metrics import read_metrics
from dqo.train.run import begin
from tests.dqo.evaluation.test_evaluate import VERIFIER
from tests.dqo.evaluation.verifiers import digits
from tests.dqo.helpers import arguments, policy, rollout_rows, tokenizer


class StopAt(TrainerCallback):
    """Kills the run after a step, as a signal would not: nothing is saved for it."""

    def __init__(self, step):
        self.step = step

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("killed")


def run(files, name, callbacks=(), **changes):
    """Trains to the end; returns the loop's object."""
    told = {"per_device_train_batch_size": 8, "max_steps": 4, "eval_steps": 2, "save_steps": 1, "logging_steps": 1}
    told |= {"learning_rate": 1e-2, "eval_fraction": 0.2, "max_completion_length": 8, "method": "rft"}
    told |= {"output_dir": str(files / name), "model_name_or_path": str(files / "model")}
    options = DQOConfig(dataset_name=str(files / "rollouts.jsonl"), **told | changes).options
    tasks = read_prompts(options.train.eval_tasks) if options.train.eval_tasks else []
    trainer = begin(options, Given(callbacks=list(callbacks)), answers=answering(options, tasks))
    trainer.run("test")
    trainer.finish()
    return trainer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, its rollouts, and a run that was never killed, in whole/."""
    path = tmp_path_factory.mktemp("during")
    save(policy(), tokenizer(), path / "model")
    (path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rollout_rows(prompts=12)))
    return path


@pytest.fixture(scope="module")
def tasks(files):
    prompts = list(dict.fromkeys(row["prompt"] for row in rollout_rows(prompts=9)))[:7]
    rows = [{"prompt": prompt, "answer": str(i)} for i, prompt in enumerate(prompts)]
    (files / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {"eval_tasks": str(files / "tasks.jsonl"), "verifier": VERIFIER, "eval_task_problems": 6}
    run(files, "whole", **found)
    return found


def rows_of(files, name):
    """The metrics of a run without its speed."""
    rows = read_metrics(files / name / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


ANSWERED = {"eval_accuracy", "eval_unparsed"}


def test_answers_are_logged_at_every_evaluation_and_change_nothing_else(files, tasks):
    run(files, "plain")
    rows = rows_of(files, "whole")
    assert [row["step"] for row in rows if row.keys() >= ANSWERED] == [0, 2, 4]
    assert [{k: v for k, v in row.items() if k not in ANSWERED} for row in rows] == rows_of(files, "plain")

    lines = [json.loads(line) for line in (files / "whole" / "generations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [step for step in (0, 2, 4) for _ in range(5)]
    # the last row's accuracy is that of the final model's greedy answers
    asked = some_of(read_prompts(files / "tasks.jsonl"), 6)
    problems = [Problem(tokenizer()(task.prompt)["input_ids"], {"prompt": task.prompt}) for task in asked]

    def grade(completions, problems):
        return [digits(completion, problem) for completion, problem in zip(completions, problems)]

    found = evaluate(
        load_policy(str(files / "whole")),
        tokenizer(),
        problems,
        grade,
        num_generations=1,
        max_new_tokens=8,
        seed=0,
        quiet=True,
    )
    assert rows[-1]["eval_accuracy"] == pytest.approx(sum(a.right for a in found.greedy) / 6)
    assert [line["response"] for line in lines[-5:]] == [a.text for a in found.greedy[:5]]


def test_a_run_that_was_killed_logs_the_same_answers(files, tasks):
    with pytest.raises(RuntimeError, match="killed"):
        run(files, "killed", [StopAt(2)], **tasks)  # it has been answered at step 2, and the checkpoint is of step 1
    run(files, "killed", **tasks)
    assert rows_of(files, "killed") == rows_of(files, "whole")
    assert (files / "killed" / "generations.jsonl").read_text() == (files / "whole" / "generations.jsonl").read_text()


def test_the_best_checkpoint_may_be_the_one_that_answers_best(files, tasks):
    best = run(files, "best", eval_fraction=0.0, metric_for_best_model="accuracy", **tasks)
    logged = {row["step"]: row["eval_accuracy"] for row in rows_of(files, "best") if "eval_accuracy" in row}
    assert best.callbacks.state.best_metric == max(value for step, value in logged.items() if step > 0)


def options(files, **changes):
    return load_options(arguments(files, eval_tasks="t.jsonl", verifier="gsm8k", **changes))


def test_without_eval_steps_or_problems_nothing_is_answered_during_training(files):
    tasks = [Prompt("1+2=", "3")]
    assert answering(options(files), tasks) is None
    assert answering(options(files, eval_steps=2, eval_task_problems=0), tasks) is None
    assert answering(options(files, eval_steps=2), []) is None
    assert answering(options(files, eval_steps=2), tasks) is not None


def test_the_problems_are_spread_evenly():
    assert some_of(list(range(10)), 4) == [0, 2, 5, 7]
    assert some_of(list(range(3)), 9) == [0, 1, 2]
