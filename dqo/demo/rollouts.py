"""The demonstration's data: problems, demonstrations by a fallible author, and graded samples of a model."""

from __future__ import annotations

import random
from pathlib import Path

from dqo.data.rows import Row, write_rows
from dqo.demo.recipe import Recipe
from dqo.grading.arith import ArithTask


def rng_of(seed: int, purpose: str) -> random.Random:
    return random.Random(f"{purpose}/{seed}")


def distinct_problems(task: ArithTask, rng: random.Random, count: int, taken: set[str]) -> list[str]:
    """`count` problems that are not in `taken`, which they join."""
    problems: list[str] = []
    while len(problems) < count:
        problem = task.problem(rng)
        if problem not in taken:
            taken.add(problem)
            problems.append(problem)
    return problems


def write_demonstrations(task: ArithTask, recipe: Recipe, path: Path, seed: int, taken: set[str]) -> None:
    """Demonstrations by the fallible author; all are trained on, so all have reward 1."""
    rng = rng_of(seed, "demonstrations")
    problems = distinct_problems(task, rng, recipe.demonstrations, taken)
    write_rows(path, [Row(prompt=p, completion=task.demonstration(p, rng), reward=1.0) for p in problems])


def graded_rows(
    task: ArithTask, problem: str, texts: list[tuple[str, bool]], sampling: dict | None = None
) -> list[Row]:
    """Rollout rows of one problem's responses, (text, ended) each; a wrong step is worth -1 in step_rewards. `sampling`: what
    sampled them."""
    rows = []
    for text, ended in texts:
        if not text.strip():
            continue
        grade = task.grade(problem, text)
        rows.append(
            Row(
                prompt=problem,
                completion=text,
                reward=float(grade.correct and ended),
                label=grade.correct and ended,
                steps=grade.steps,
                step_rewards=[0.0 if right else -1.0 for right in grade.step_correct],
                finish_reason="stop" if ended else "length",
                answer=task.answer(problem),
                sampling=sampling,
            )
        )
    return rows


def write_rollouts(task: ArithTask, recipe: Recipe, base: Path, path: Path, seed: int, problems: list[str]) -> None:
    """The base model's own samples, graded: the offline data set."""
    from dqo.models.generate import Request, Sampling, generate, in_order
    from dqo.models.identity import model_identity
    from dqo.models.named import load_config, load_tokenizer
    from dqo.models.policy import load_policy

    policy, tokenizer = load_policy(str(base)), load_tokenizer(str(base))
    prompts, samples = tokenizer(problems)["input_ids"], recipe.samples
    responses = in_order(
        generate(
            policy,
            [Request(ids, (problem, k)) for problem, ids in zip(problems, prompts) for k in range(samples)],
            Sampling(max_new_tokens=recipe.max_new_tokens, seed=seed),
            stop_ids=[tokenizer.eos_token_id],
            pad_id=tokenizer.pad_token_id,
        )
    )
    answers = [responses[i : i + samples] for i in range(0, len(responses), samples)]
    sampled = {
        "model": str(base),
        "model_hash": model_identity(str(base), load_config(str(base))),
        "temperature": 1.0,
        "seed": seed,
    }
    write_graded(task, problems, tokenizer, answers, path, sampled)


def write_graded(
    task: ArithTask, problems: list[str], tokenizer, answers: list[list], path: Path, sampling: dict | None = None
) -> None:
    """Rows of the responses that a model gave to each problem. `sampling`: how it was asked, by which DQO knows its weights."""
    from dqo.models.generate import text_of  # imports torch

    rows = []
    for problem, responses in zip(problems, answers):
        texts = [(text_of(tokenizer, r), r.ended) for r in responses]
        rows += graded_rows(task, problem, texts, sampling)
    write_rows(path, rows)
