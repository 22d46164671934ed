"""The verifier `number`: the number that a completion gives for its answer, however it is written.

Strict graders call `\\boxed{18}`, `The answer is 18.` and `**18**` unanswered, and so show the format that a model learned
more than what it can. Like lm-eval's flexible-extract this one falls back on the last number; its results are not comparable
with those of `gsm8k`.
"""

from __future__ import annotations

import re
from fractions import Fraction

from dqo.grading.answers import boxed, constant
from dqo.grading.grade import Grade
from dqo.grading.gsm8k import NUMBER, number, number_grade

_NUMBER = re.compile(rf"(?:(?<![\w.)\]])[-−])?(?:\\?\$\s?)?(?:(?<![\w.)\]])[-−])?{NUMBER}%?")
_MARKED = re.compile(r"####|\banswer(?:\s+is\b|\s*:)", re.IGNORECASE)
_LONGEST = 1000  # characters of a line that are read
_SENTENCE = re.compile(r"[.!?](?=\s|$)")


def last_number_grade(completion: str, problem: dict) -> Grade:
    """Whether the number that the completion answers with equals `problem["answer"]`; see `answered_number`."""
    return number_grade(answered_number(completion), problem)


def answered_number(text: str) -> Fraction | None:
    r"""The number in the last \boxed{}, else the first after the last "####" or "answer is" (of an equation, the one behind its
    last equals sign), else the last of the text; None where there is none."""
    box = boxed(text)
    if box is not None and (found := _boxed_number(box[0])) is not None:
        return found
    for marked in reversed(list(_MARKED.finditer(text))):
        line = text[marked.end() : marked.end() + _LONGEST].partition("\n")[0]
        sentence = _SENTENCE.split(line, maxsplit=1)[0]
        numbers = _numbers(sentence.rpartition("=")[2])
        if numbers:
            return numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _boxed_number(inside: str) -> Fraction | None:
    found = constant(inside)
    numbers = _numbers(inside) if found is None else [found]
    return numbers[-1] if numbers else None


def _numbers(text: str) -> list[Fraction]:
    found = (number(re.sub(r"[\s\\]", "", match[0])) for match in _NUMBER.finditer(text))
    return [value for value in found if value is not None]
