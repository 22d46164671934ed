"""Graders of text in GSM8K's notation: final answers and calculator annotations, in exact rationals.

A right annotation says that the arithmetic inside it is right. It does not say that the step is the right
one: a solution that multiplies where it should divide has right annotations only, and a wrong answer.
"""

import re
from collections import deque
from dataclasses import dataclass
from fractions import Fraction

from dqo.grading.grade import Grade
from dqo.grading.text import line_spans

NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_TOKEN = re.compile(rf"\s*(?:(?P<number>{NUMBER})|(?P<symbol>[-+*/()%xX×·÷−]))")
_SYMBOLS = {"x": "*", "X": "*", "×": "*", "·": "*", "÷": "/", "−": "-"}
_SIGNED = re.compile(rf"(?P<sign>[-−]?)\$?(?P<minus>[-−]?)(?P<number>{NUMBER})%?\.?")
_ANSWER = re.compile(r"(?:####|^[ \t]*A:)(.*)", re.MULTILINE)
_LONGEST = (
    500  # characters of a number or an expression: time grows as their square, and longer ones are runaway digits
)
_DEEPEST = 50  # parentheses and signs
_CALCULATOR = Fraction(1, 10**12)  # calculators work in double precision: 8.294400000000001 is 0.2 * 41.472

ANNOTATION = re.compile(r"<<([^<>\n]*)>>")


def _tokens(text: str) -> list[str]:
    tokens, position, end = [], 0, len(text.rstrip())
    if end > _LONGEST:
        raise ValueError("too long")
    while position < end:
        match = _TOKEN.match(text, position)
        if not match:
            raise ValueError(f"unexpected {text[position]!r}")
        symbol = match["symbol"]
        tokens.append(_SYMBOLS.get(symbol, symbol) if symbol else match["number"])
        position = match.end()
    return tokens


class _Expression:
    """Recursive descent.

    sum = product {+- product}; product = factor {*/ factor}; factor = (-factor | "(" sum ")" | number) [%]
    """

    def __init__(self, text: str):
        self.tokens = _tokens(text)
        self.at = 0
        self.depth = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def sum(self) -> Fraction:
        total = self.product()
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            start = self.at
            term = self.product()
            if self.at == start + 2 and self.tokens[start + 1] == "%":
                raise ValueError("a percentage added to a number may be of that number or of one")
            total += sign * term
        return total

    def product(self) -> Fraction:
        value = self.factor()
        while self.peek() in ("*", "/"):
            value = value * self.factor() if self.take() == "*" else value / self.factor()
        return value

    def factor(self) -> Fraction:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise ValueError("too deep")
        token = self.take()
        if token in ("-", "+"):
            value = self.factor() if token == "+" else -self.factor()
        elif token == "(":
            value = self.sum()
            if self.take() != ")":
                raise ValueError("unbalanced parentheses")
        elif token[:1].isdigit() or token[:1] == ".":
            value = _fraction(token)
        else:
            raise ValueError(f"expected a number, got {token!r}")
        if self.peek() == "%":
            self.take()
            value /= 100
        self.depth -= 1
        return value


def _fraction(number: str) -> Fraction:
    return Fraction(number.replace(",", "").rstrip("."))


def evaluate_expression(text: str) -> Fraction | None:
    """The exact value of an expression of + - * / ( ), decimals, thousands commas, "$", "x" for times, "%".

    None where it cannot be read (names, units, a division by zero, more than 500 characters) or means two things
    ("100 + 20%").
    """
    try:
        expression = _Expression(text.replace("$", ""))
        value = expression.sum()
    except (ValueError, ZeroDivisionError):
        return None
    return value if expression.at == len(expression.tokens) else None


def annotation_correct(annotation: str) -> bool | None:
    """Whether "expression=value" (the inside of << >>) is right; None when either side cannot be read.

    The value may be the exact result, or the result rounded to the decimals that the value shows (3.33 and
    3.3333333333333335 for 10/3). A whole number must be exact: as a rounding, 0 would be right for 1/3. In a
    chain a=b=c every part is held against the last.
    """
    *expressions, written = annotation.split("=")
    if not expressions:
        return None
    value = evaluate_expression(written)
    results = [evaluate_expression(expression) for expression in expressions]
    exact = [result for result in results if result is not None]
    if value is None or len(exact) < len(results):
        return None
    shown = _SIGNED.fullmatch(written.strip())
    decimals = len(shown["number"].partition(".")[2]) if shown else 0
    half = Fraction(1, 2 * 10**decimals) if decimals else Fraction(0)
    if written.rstrip().endswith("%"):
        half /= 100
    return all(abs(value - result) <= max(half, _CALCULATOR * abs(result)) for result in exact)


@dataclass(frozen=True)
class Step:
    """One line of a solution. `start`, `end`: its characters, newline included."""

    start: int
    end: int
    annotations: int
    wrong: int
    unparsed: int  # annotations that cannot be read, or have no end

    @property
    def correct(self) -> bool | None:
        """False with a wrong annotation, True when all are right, None with none or an unreadable one."""
        if self.wrong:
            return False
        return True if self.annotations and not self.unparsed else None


def calculator_steps(completion: str) -> list[Step]:
    """The lines of a completion, which they cover, with the verdict on the <<expression=value>> of each."""
    steps = []
    for start, end in line_spans(completion):
        line = completion[start:end]
        verdicts = [annotation_correct(inside) for inside in ANNOTATION.findall(line)]
        opened = line.count("<<")
        wrong = verdicts.count(False)
        steps.append(Step(start, end, opened, wrong, opened - wrong - verdicts.count(True)))
    return steps


def number(text: str) -> Fraction | None:
    """A number of up to 500 characters and nothing else but a sign, "$", thousands commas, a final period, or "%" (20% is 20)."""
    text = text.strip()
    match = _SIGNED.fullmatch(text) if len(text) <= _LONGEST else None
    if not match or (match["sign"] and match["minus"]):
        return None
    value = _fraction(match["number"])
    return -value if match["sign"] or match["minus"] else value


def gsm8k_answer(text: str) -> Fraction | None:
    """The number after the last "####", or "A:" that begins a line; None when more than a number is there."""
    found = deque(_ANSWER.finditer(text), maxlen=1)
    return number(found[0][1]) if found else None


def reference_number(answer: str) -> Fraction:
    """The number of a reference answer: a number, or a solution that ends in one.

    Raises:
        ValueError: when it holds no number.
    """
    found = number(answer)
    if found is None:
        found = gsm8k_answer(answer)
    if found is None:
        raise ValueError(f"the reference answer {answer!r} is no number")
    return found


def gsm8k_correct(completion: str, answer: str) -> bool:
    """Whether the completion's final answer equals `answer`; see `reference_number`."""
    return gsm8k_answer(completion) == reference_number(answer)


def gsm8k_grade(completion: str, problem: dict) -> Grade:
    """The verifier `gsm8k`: the number after ####, as published results do."""
    return number_grade(gsm8k_answer(completion), problem)


def number_grade(given: Fraction | None, problem: dict) -> Grade:
    """The grade of a number that was found in a completion, or was not."""
    expected = reference_number(problem["answer"])
    return Grade(0.0, parsed=False) if given is None else Grade(float(given == expected), answer=str(given))
