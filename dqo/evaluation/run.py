"""The answers of a run's models to eval_tasks, before and after training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dqo.config.options import Options
from dqo.data.tokens import string_prompt_ids
from dqo.evaluation.accuracy import Accuracy, Problem, evaluate
from dqo.grading.pool import VerifierPool
from dqo.models.policy import load_policy, ready, tokenizer_of
from dqo.train.run import Run


def problems_of(rows: list[dict], tokenizer, pool: VerifierPool) -> list[Problem]:
    """Tasks on tokens, each with its grader."""

    def graded_by(row: dict) -> Callable[[str], bool]:
        return lambda completion: pool.grade([completion], [row])[0].right

    ids = string_prompt_ids(tokenizer, [row["prompt"] for row in rows])
    return [Problem(row["prompt"], prompt, graded_by(row)) for row, prompt in zip(rows, ids)]


def answers(options: Options, model, tokenizer, tasks: list[dict], name: str) -> Accuracy:
    """Answers of `model` to eval_tasks, graded; greedy and sampled."""
    config = options.train
    settings: dict[str, Any] = {
        "num_generations": config.num_generations,
        "max_new_tokens": config.max_completion_length,
    }
    assert config.verifier is not None  # options with eval_tasks and no verifier are refused
    with VerifierPool(config.verifier, processes=1) as pool:
        problems = problems_of(tasks, tokenizer, pool)
        return evaluate(model, tokenizer, problems, seed=config.seed, description=name, batch_size=64, **settings)


def base_answers(options: Options, model, tokenizer, tasks: list[dict]) -> Accuracy:
    """Those of a model object before it is trained in place."""
    tokenizer = tokenizer_of(options.train.model_name_or_path, tokenizer)
    return answers(options, ready(model, model.device), tokenizer, tasks, "base")


def answers_of(options: Options, run: Run, tasks: list[dict], base: Accuracy | None = None) -> dict[str, Accuracy]:
    """The answers of the model before training, by the name "base", and of the trained one, by that of its method; {} without
    tasks. `base`: the first, where they were taken before a model object was trained; None: it is loaded again."""
    if not tasks:
        return {}
    config, tokenizer = options.train, run.prepared.tokenizer
    if base is None:
        base = answers(options, load_policy(config.model_path), tokenizer, tasks, "base")
    return {"base": base, config.method: answers(options, run.prepared.learner.policy, tokenizer, tasks, config.method)}
