"""Evaluation of the demonstration's models and its report."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqo.demo.recipe import DemoConfig, Recipe
from dqo.evaluation.accuracy import Accuracy, Problem, evaluate
from dqo.grading.arith import arith_grade
from dqo.grading.grade import Grade
from dqo.models.named import load_tokenizer
from dqo.models.policy import load_policy
from dqo.report.build import report_of
from dqo.report.page import console_table, write_report
from dqo.report.runs import read_run
from dqo.report.store import store_results
from dqo.train.run import Run


@dataclass(frozen=True)
class EvaluatedModel:
    name: str
    problems: list[Problem]
    tokenizer: Any
    accuracy: Accuracy
    run: Run | None  # None for the base


def evaluate_model(
    name: str, model: Path, problems: list[str], recipe: Recipe, seed: int, run: Run | None = None
) -> EvaluatedModel:
    """Greedy and sampling accuracy of the model in a directory, on the same problems for every model."""
    tokenizer = load_tokenizer(str(model))
    ids = tokenizer(problems)["input_ids"]
    asked = [Problem(prompt_ids, {"prompt": prompt}) for prompt, prompt_ids in zip(problems, ids)]

    def grade(completions: list[str], rows: list[dict]) -> list[Grade]:
        return [arith_grade(completion, row) for completion, row in zip(completions, rows)]

    accuracy = evaluate(
        load_policy(str(model)),
        tokenizer,
        asked,
        grade,
        num_generations=recipe.eval_samples,
        max_new_tokens=recipe.max_new_tokens,
        seed=seed + 1,
        description=name,
    )
    return EvaluatedModel(name, asked, tokenizer, accuracy, run)


def write_demo_report(
    output: Path, config: DemoConfig, recipe: Recipe, results: list[EvaluatedModel], command: str, seconds: float
) -> Path:
    """report.html, report.md and report.json in `output`; prints the table."""
    base, *trained = results
    names, runs = [], []
    for result in trained:
        assert result.run is not None  # only the base has none
        store_results(result.run, {"base": base.accuracy, result.name: result.accuracy})
        names.append(result.name)
        runs.append(read_run(result.run.output_dir))
    report = report_of(
        runs,
        names=names,
        title="Direct Q-function Optimization: the demonstration",
        command=command,
        seed=config.seed,
        wall_seconds=seconds,
        options=dataclasses.asdict(recipe),
        options_of={},
        notes=NOTES,
    )
    path = write_report(output, report)
    print(console_table(report["methods"], "base"))
    return path


NOTES = [
    "The task is built so that the base model knows the right step but does not prefer it; gains on it say that the methods "
    "work, not how much they would gain on another task.",
    "The data are nine tenths wrong responses with at least half of their steps right, and one tenth right ones. rft, dpo, kto "
    "and dqo read outcomes alone. rft-steps and dqo-steps read labels of the steps too, rft-noisy and dqo-noisy labels of which "
    "a fifth are wrong; rft then imitates what stands before the first step that is labelled as wrong.",
    "One seed. Every method makes the same number of updates of the policy from batches of the same number of responses (pairs "
    "for DPO); DQO also trains a value model, first alone for 32 updates more.",
    "The value model estimates what the trained policy will earn, the held-out responses are the base model's: predictions above "
    "the outcomes are to be expected.",
    "Options are the best of nine settings of each method on another base model.",
]
