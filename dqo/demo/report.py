"""Evaluation of the demonstration's models and its report."""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqo.demo.recipe import DemoConfig, Recipe
from dqo.evaluation.accuracy import Accuracy, Problem, evaluate
from dqo.grading.arith import arith_grade
from dqo.grading.grade import Grade
from dqo.models.policy import load_policy, load_tokenizer
from dqo.report import findings
from dqo.report.page import console_table, write_report
from dqo.report.schema import Flip, Flips, Method, Report
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
    methods = [_method(result) for result in results]
    dqo = next(result for result in results if result.name == "dqo")
    assert dqo.run is not None  # only the base has none
    curves = [c for r in results if r.run for c in findings.curves(r.name, r.run.output_dir / "metrics.jsonl")]
    report: Report = {
        "title": "Direct Q-function Optimization: the demonstration",
        "command": command,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seed": config.seed,
        "wall_seconds": seconds,
        "options": dataclasses.asdict(recipe),
        "baseline": "base",
        "headline": "dqo",
        "methods": methods,
        "curves": curves,
        "flips": _flips(results[0], dqo),
        "data": findings.data_findings(dqo.run.prepared.episodes()),
        "notes": NOTES,
        **findings.machine(),
        **findings.value_findings(dqo.run),
    }
    path = write_report(output, report)
    print(console_table(methods, "base"))
    return path


def _method(result: EvaluatedModel) -> Method:
    row: Method = {"name": result.name, **result.accuracy.scores()}  # type: ignore[typeddict-item]  # of known keys
    if result.run is not None:
        row |= {
            "seconds": result.run.seconds,
            "tokens_per_second": result.run.tokens_per_second,
            "updates": result.run.steps,
        }
    return row


def _flips(before: EvaluatedModel, after: EvaluatedModel, each: int = 5) -> Flips:
    fixed: list[Flip] = []
    broken: list[Flip] = []
    for i, problem in enumerate(before.problems):
        was, now = before.accuracy.greedy[i], after.accuracy.greedy[i]
        if was.right != now.right:
            flip: Flip = {"prompt": problem.row["prompt"], "before": was.text, "after": now.text}
            (fixed if now.right else broken).append(flip)
    return {"fixed": fixed[:each], "broken": broken[:each]}


NOTES = [
    "The task is built so that the base model knows the right step but does not prefer it; gains on it say that the methods "
    "work, not how much they would gain on another task.",
    "One seed. Every method makes the same number of updates of the policy from batches of the same number of responses (pairs "
    "for DPO); DQO also trains a value model, first alone, which costs time.",
    "The value model estimates what the trained policy will earn, the held-out responses are the base model's: predictions above "
    "the outcomes are to be expected.",
    "Learning rates and betas come from settings tried on another seed: sft 4, rft 7, dpo 13, dqo 6.",
]
