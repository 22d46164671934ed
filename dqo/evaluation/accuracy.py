"""Greedy and sampling accuracy of a policy on problems with a grader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from dqo.data.ends import ends_of
from dqo.models.generate import Request, Response, Sampling, generate, in_order, text_of
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
    options: dict[str, Any] = {
        "stop_ids": ends_of(tokenizer, stop_ids(policy)).stops,
        "pad_id": tokenizer.pad_token_id,
        "batch_size": batch_size,
        "quiet": quiet,
    }
    greedy = in_order(
        generate(
            policy,
            [Request(problem.prompt_ids, (i,)) for i, problem in enumerate(problems)],
            Sampling(temperature=0.0, max_new_tokens=max_new_tokens),
            description=f"{description} greedy",
            **options,
        )
    )
    requests = [
        Request(problem.prompt_ids, (i, k)) for i, problem in enumerate(problems) for k in range(num_generations)
    ]
    found = in_order(
        generate(
            policy,
            requests,
            Sampling(max_new_tokens=max_new_tokens, seed=seed),
            description=f"{description} sampling",
            **options,
        )
    )
    sampled = [found[i : i + num_generations] for i in range(0, len(found), num_generations)]

    def score(problem: Problem, response: Response) -> int:
        return int(response.ended and problem.grade(text_of(tokenizer, response)))

    return Accuracy(
        greedy=[score(problem, answer) for problem, answer in zip(problems, greedy)],
        sampling=[[score(problem, answer) for answer in answers] for problem, answers in zip(problems, sampled)],
        greedy_texts=[text_of(tokenizer, answer) for answer in greedy],
        sampled=sampled,
    )
