"""Greedy and sampling accuracy of a policy on problems with a grader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from dqo.data.ends import ends_of
from dqo.models.generate import Response, generate
from dqo.models.policy import stop_ids


@dataclass(frozen=True)
class Problem:
    prompt: str
    prompt_ids: list[int]
    grade: Callable[[str], bool]  # of a completion's text without its end token


@dataclass(frozen=True)
class Accuracy:
    """Scores 0/1 by problem, `greedy` (P,) and `sampling` (P, k), and the responses they were given for."""

    greedy: list[int]
    sampling: list[list[int]]
    greedy_texts: list[str]
    sampled: list[list[Response]]


def text_of(tokenizer, response: Response) -> str:
    ids = response.ids[:-1] if response.ended else response.ids
    return tokenizer.decode(ids)


def evaluate(
    policy: PreTrainedModel,
    tokenizer,
    problems: list[Problem],
    *,
    num_generations: int,
    max_new_tokens: int,
    seed: int,
    batch_size: int = 1024,
    description: str = "eval",
    quiet: bool = False,
) -> Accuracy:
    """Answers every problem once greedily and `num_generations` times at temperature 1. An answer that never ended is wrong."""
    options = {
        "stop_ids": ends_of(tokenizer, stop_ids(policy)).stops,
        "pad_id": tokenizer.pad_token_id,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed,
        "quiet": quiet,
    }
    prompts = [problem.prompt_ids for problem in problems]
    greedy = generate(policy, prompts, temperature=0.0, description=f"{description} greedy", **options)
    sampled = generate(
        policy, prompts, num_generations=num_generations, description=f"{description} sampling", **options
    )

    def score(problem: Problem, response: Response) -> int:
        return int(response.ended and problem.grade(text_of(tokenizer, response)))

    return Accuracy(
        greedy=[score(problem, answers[0]) for problem, answers in zip(problems, greedy)],
        sampling=[[score(problem, answer) for answer in answers] for problem, answers in zip(problems, sampled)],
        greedy_texts=[text_of(tokenizer, answers[0]) for answers in greedy],
        sampled=sampled,
    )
