"""The built-in task `arith`: chains of arithmetic modulo 10, from left to right, written out step by step.

    prompt      7+8*3-9=
    completion  7+8=5\\n5*3=5\\n5-9=6\\n#6

The task makes a base model that offline reinforcement learning can really improve: one that knows the right
step but does not prefer it. A fixed share of the table (value, operator, operand) is hard. On a hard entry a
demonstration writes the right digit only sometimes, otherwise always the same wrong one, and goes on
correctly from there. A model fitted to demonstrations therefore makes the systematic mistake when it decodes
greedily and finds the right step now and then when it samples.
"""

import random
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from dqo.grading.grade import Grade

DIGITS = "0123456789"
OPERATORS = "+-*"
VOCABULARY = DIGITS + OPERATORS + "=\n#"

_PROMPT = re.compile(r"[0-9](?:[-+*][0-9])+=")
_STEP = re.compile(r"[0-9][-+*][0-9]=([0-9])\n")
_ANSWER = re.compile(r"#([0-9])")

Entry = tuple[int, str, int]


@dataclass(frozen=True)
class LineGrades:
    """What a completion got right. `steps` are character spans: its lines, each with its newline."""

    correct: bool
    steps: list[tuple[int, int]]
    step_correct: list[bool]


def apply(value: int, operator: str, operand: int) -> int:
    """The true result of one step."""
    if operator == "+":
        return (value + operand) % 10
    if operator == "-":
        return (value - operand) % 10
    return value * operand % 10


def arith_grade(completion: str, problem: dict) -> Grade:
    """The verifier `arith`: whether a completion is a chain of readable lines that ends in the true answer to the prompt."""
    correct = ArithTask(1, 1).grade(problem["prompt"], completion).correct
    written = _ANSWER.fullmatch(completion.rpartition("\n")[2])
    return Grade(float(correct), written is not None, written and written[1])


def check_problem(problem: dict) -> None:
    """Raises ValueError for a prompt that is no chain of arithmetic."""
    if not isinstance(problem["prompt"], str) or not _PROMPT.fullmatch(problem["prompt"]):
        raise ValueError(f"the prompt {problem['prompt']!r:.60} is no chain such as 7+8*3-9=")


@dataclass(frozen=True)
class ArithTask:
    """Chains of `min_steps` to `max_steps` operators. `seed` fixes only the table of mistakes."""

    min_steps: int
    max_steps: int
    hard_share: float = 0.25
    right_share: float = 0.42
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError(f"need 1 <= min_steps <= max_steps, got {self.min_steps} and {self.max_steps}")
        for name in ("hard_share", "right_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    @cached_property
    def mistakes(self) -> dict[Entry, int]:
        """The hard entries, each with the wrong digit that demonstrations write for it."""
        rng = random.Random(self.seed)
        table = list(product(range(10), OPERATORS, range(10)))
        hard = rng.sample(table, round(self.hard_share * len(table)))
        return {entry: (apply(*entry) + rng.randint(1, 9)) % 10 for entry in hard}

    def problem(self, rng: random.Random) -> str:
        steps = rng.randint(self.min_steps, self.max_steps)
        chain = "".join(rng.choice(OPERATORS) + rng.choice(DIGITS) for _ in range(steps))
        return rng.choice(DIGITS) + chain + "="

    def demonstration(self, prompt: str, rng: random.Random) -> str:
        """A completion by a fallible author, who has hard entries right with probability `right_share`."""

        def step(value: int, operator: str, operand: int) -> int:
            wrong = self.mistakes.get((value, operator, operand))
            if wrong is not None and rng.random() >= self.right_share:
                return wrong
            return apply(value, operator, operand)

        return _write(prompt, step)

    def pass_rate(self, prompt: str, begun: str = "") -> float:
        """The probability that a demonstration which begins with whole lines is correct, exactly."""
        value, chain = _parse(prompt)
        lines = begun.splitlines()
        for (operator, operand), line in zip(chain, lines):
            written = re.fullmatch(rf"{value}{re.escape(operator)}{operand}=([0-9])", line)
            if written is None:
                return 0.0
            value = int(written[1])
        if len(lines) > len(chain):
            return float(lines[len(chain) :] == [f"#{value}"] and f"{value}" == self.answer(prompt))
        chances = {value: 1.0}  # of each value that may be written next
        for operator, operand in chain[len(lines) :]:
            after = dict.fromkeys(range(10), 0.0)
            for before, chance in chances.items():
                right, wrong = apply(before, operator, operand), self.mistakes.get((before, operator, operand))
                share = 1.0 if wrong is None else self.right_share
                after[right] += chance * share
                after[right if wrong is None else wrong] += chance * (1.0 - share)
            chances = after
        return chances.get(int(self.answer(prompt)), 0.0)

    def solution(self, prompt: str) -> str:
        """The completion without a mistake."""
        return _write(prompt, apply)

    def answer(self, prompt: str) -> str:
        value, chain = _parse(prompt)
        for operator, operand in chain:
            value = apply(value, operator, operand)
        return str(value)

    def grade(self, prompt: str, completion: str) -> LineGrades:
        """Judge the answer by the prompt and each line by the line before it.

        A line is right when it is the true next step from the result that the previous line wrote, be that
        right or wrong, so a mistake is counted once, where it happens. After a line without a readable result
        the next cannot be right. The completion is correct when it has one readable line a step, then the
        true answer, and nothing more.
        """
        first, chain = _parse(prompt)
        lines = re.findall(r"[^\n]*\n|[^\n]+", completion)
        steps, step_correct = [], []
        value: int | None = first
        start, well_formed = 0, len(lines) == len(chain) + 1
        for index, line in enumerate(lines):
            is_step = index < len(chain)
            expected = None
            if value is not None and is_step:
                operator, operand = chain[index]
                expected = f"{value}{operator}{operand}={apply(value, operator, operand)}\n"
            elif value is not None and index == len(chain):
                expected = f"#{value}"
            readable = (_STEP if is_step else _ANSWER).fullmatch(line)
            value = int(readable[1]) if readable else None
            well_formed = well_formed and readable is not None
            steps.append((start, start + len(line)))
            step_correct.append(line == expected)
            start += len(line)
        return LineGrades(well_formed and str(value) == self.answer(prompt), steps, step_correct)


def _parse(prompt: str) -> tuple[int, list[tuple[str, int]]]:
    if not _PROMPT.fullmatch(prompt):
        raise ValueError(f"not a prompt of the task arith, such as '7+8*3=': {prompt!r}")
    return int(prompt[0]), [(prompt[i], int(prompt[i + 1])) for i in range(1, len(prompt) - 1, 2)]


def _write(prompt: str, step) -> str:
    value, chain = _parse(prompt)
    lines = []
    for operator, operand in chain:
        result = step(value, operator, operand)
        lines.append(f"{value}{operator}{operand}={result}\n")
        value = result
    return "".join(lines) + f"#{value}"
