"""The answers of a run's models to eval_tasks, before and after training."""

from __future__ import annotations

from dataclasses import asdict

from dqo.config.options import Options
from dqo.data.prompts import Prompt, prompt_token_ids
from dqo.evaluation.accuracy import Accuracy, Problem, evaluate
from dqo.grading.pool import VerifierPool
from dqo.models.named import tokenizer_of
from dqo.models.policy import load_policy, ready
from dqo.train.run import Run


def problems_of(tasks: list[Prompt], tokenizer) -> list[Problem]:
    """Tasks on tokens."""
    return [Problem(ids, asdict(task)) for task, ids in zip(tasks, prompt_token_ids(tokenizer, tasks))]


def answers(options: Options, model, tokenizer, tasks: list[Prompt], name: str) -> Accuracy:
    """Answers of `model` to eval_tasks, graded; greedy and sampled."""
    config = options.train
    assert config.verifier is not None  # options with eval_tasks and no verifier are refused
    with VerifierPool(config.verifier) as pool:
        return evaluate(
            model,
            tokenizer,
            problems_of(tasks, tokenizer),
            pool.grade,
            num_generations=config.num_generations,
            max_new_tokens=config.max_completion_length,
            seed=config.seed,
            batch_size=64,
            description=name,
        )


def base_answers(options: Options, model, tokenizer, tasks: list[Prompt]) -> Accuracy:
    """Those of a model object before it is trained in place."""
    tokenizer = tokenizer_of(options.train.model_name_or_path, tokenizer)
    return answers(options, ready(model, model.device), tokenizer, tasks, "base")


def answers_of(options: Options, run: Run, tasks: list[Prompt], base: Accuracy | None = None) -> dict[str, Accuracy]:
    """The answers of the model before training, by the name "base", and of the trained one, by that of its method; {} without
    tasks. `base`: the first, where they were taken before a model object was trained; None: it is loaded again."""
    if not tasks:
        return {}
    config, tokenizer = options.train, run.prepared.tokenizer
    if base is None:
        base = answers(options, load_policy(config.model_path), tokenizer, tasks, "base")
    return {"base": base, config.method: answers(options, run.prepared.learner.policy, tokenizer, tasks, config.method)}
