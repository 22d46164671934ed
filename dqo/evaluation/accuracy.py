"""Greedy and sampling accuracy of a policy on problems with a grader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from dqo.data.ends import ends_of
from dqo.evaluation.unread import Read, unread
from dqo.grading.grade import Grade
from dqo.models.generate import Request, Response, Sampling, generate, in_order, text_of
from dqo.models.named import stop_ids

# (completions without their end tokens, the row of each one's problem) -> a grade each
Grader = Callable[[list[str], list[dict]], list[Grade]]


@dataclass(frozen=True)
class Problem:
    prompt_ids: list[int]
    row: dict[str, Any]  # what the grader reads: prompt, answer ...


@dataclass(frozen=True)
class Answered:
    """A response and its grade. One that never ended is wrong, and was not read."""

    problem: Problem
    response: Response
    text: str  # without its end token
    grade: Grade

    @property
    def right(self) -> int:
        return int(self.grade.right)

    @property
    def read(self) -> Read:
        return Read(self.problem.row, self.text, self.response.ended, self.grade.parsed, self.grade.error)


@dataclass(frozen=True)
class Accuracy:
    """Answers to P problems: `greedy` (P,) and `sampling` (P, k)."""

    greedy: list[Answered]
    sampling: list[list[Answered]]

    def scores(self) -> dict[str, list]:
        """0/1 by problem: greedy (P,) and sampling (P, k)."""
        return {
            "greedy": [answered.right for answered in self.greedy],
            "sampling": [[answered.right for answered in row] for row in self.sampling],
        }

    def unread(self) -> dict[str, dict[str, Any]]:
        """What the grader could not read, by decoding, see `dqo.evaluation.unread`."""
        kinds = {"greedy": self.greedy, "sampling": [answered for row in self.sampling for answered in row]}
        return {kind: unread([answered.read for answered in found]) for kind, found in kinds.items() if found}


def graded(tokenizer, problems: list[Problem], responses: list[Response], grade: Grader) -> list[Answered]:
    """Each problem's response with its grade; only those that ended are graded."""
    texts = [text_of(tokenizer, response) for response in responses]
    ended = [i for i, response in enumerate(responses) if response.ended]
    made = dict(zip(ended, grade([texts[i] for i in ended], [problems[i].row for i in ended])))
    cut = Grade(0.0, parsed=False)
    return [Answered(problems[i], response, texts[i], made.get(i, cut)) for i, response in enumerate(responses)]


def evaluate(
    policy: PreTrainedModel,
    tokenizer,
    problems: list[Problem],
    grade: Grader,
    *,
    num_generations: int,
    max_new_tokens: int,
    seed: int,
    batch_size: int = 1024,
    description: str = "eval",
    quiet: bool = False,
) -> Accuracy:
    """Answers every problem once greedily and `num_generations` times at temperature 1."""

    def answers(samples: int, sampling: Sampling, how: str) -> list[Answered]:
        """`samples` of each problem, one problem behind the other."""
        asked = [(i, k) for i in range(len(problems)) for k in range(samples)]
        found = generate(
            policy,
            [Request(problems[i].prompt_ids, (i, k)) for i, k in asked],
            sampling,
            stop_ids=ends_of(tokenizer, stop_ids(policy)).stops,
            pad_id=tokenizer.pad_token_id,
            batch_size=batch_size,
            description=f"{description} {how}",
            quiet=quiet,
        )
        return graded(tokenizer, [problems[i] for i, _ in asked], in_order(found), grade)

    greedy = answers(1, Sampling(temperature=0.0, max_new_tokens=max_new_tokens), "greedy")
    sampled = answers(num_generations, Sampling(max_new_tokens=max_new_tokens, seed=seed), "sampling")
    return Accuracy(greedy, [sampled[i : i + num_generations] for i in range(0, len(sampled), num_generations)])
