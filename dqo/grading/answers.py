r"""Final answers of mathematics, and whether two are the same: by their structure, their numbers and their text.

Answers that are called the same are the same: `1/2`, `\frac12` and `0.5`; `2\frac14` and `2.25`; `\{1, 2\}` and `2, 1`. White
space only separates: `2 3` is not `23`. A name (`x = 5`) or a unit (`5 \text{ cm}`, `90^\circ`, `50\%`) may be missing on one
side, but two names or units must agree; `50\%` is `50` without its sign, and also `1/2`. Algebra is not done: `\sqrt{12}` is not
found to be `2\sqrt3`. `dqo.grading.math_grader` asks math-verify for that.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate

from dqo.grading.terms import TOKEN, constant_of, read_sum

LONGEST = 1000  # characters of an answer; a longer one is the same as its own text only
_DEEPEST = 40  # brackets inside of brackets; the same holds for deeper ones

_BRACE = re.compile(r"\\\\(?!boxed)|\\boxed\s*\{|\\[{}]|[{}]")
_FINAL = re.compile(r"####(.*)|\b[Aa]nswer is:?(.*)")
_REWRITTEN = (  # what LaTeX and Unicode write in several ways
    (re.compile(r"(?<=[0-9]),\s*\\!\s*(?=[0-9]{3})|(?<=[0-9])\{,\}(?=[0-9]{3})"), ","),
    (re.compile(r"\\\$\s*([0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?)"), r"\1\\text{dollars}"),
    (re.compile(r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-zA-Z])"), " "),
    (re.compile(r"\\?\$|(?<!\\)\\[()\[\]]|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle)(?![a-zA-Z])|\\!"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\text\{\s*(?:and|or)\s*\}|(?<=\s)(?:and|or)(?=\s)"), ","),
    (re.compile(r"\\(?:cdot|times)(?![a-zA-Z])|[×·]"), "*"),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"(?<![a-zA-Z\\])sqrt(?=[({])"), r"\\sqrt"),
    (re.compile(r"\\(le|ge|ne)q(?![a-zA-Z])"), r"\\\1"),
    (re.compile(r"π"), r"\\pi "),
    (re.compile(r"∞"), r"\\infty "),
    (re.compile(r"∪"), r"\\cup "),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|°"), r"\\text{degrees}"),
    (re.compile(r"\\%|%"), r"\\text{%}"),
)
_NAMED = re.compile(
    r"((?:\\[a-z]+|[A-Z]{2}|[a-zA-Z])(?:_\{?\w+\}?)?(?:\([a-z](?:,\s*[a-z])*\))?)\s*(?:=|\\in(?![a-zA-Z]))([^=]+)"
)
_SQUARE = r"(?:\s*\^\s*\{?\s*([23])\s*\}?)?"
_UNIT = re.compile(
    r"(.*[0-9)}])\s*(?:\\(?:text|mbox|textrm|mathrm)\{([^{}]+)\}|(?:(?<=[0-9])|(?<=\s))(degrees?|dollars?|cents?|units|inch(?:es)?|"
    r"feet|miles?|met(?:er|re)s?|[cmk]m|hours?|minutes?|seconds?|percent))" + _SQUARE,
    re.DOTALL,
)
_UNIT_NAMES = {"percent": "%", "inches": "inch", "feet": "foot", "units": ""}
_WORDS = re.compile(r"\\(?:text|mbox|textrm|textbf|textit|mathrm|mathbf)\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_MATRIX = re.compile(r"\\begin\{([pbv]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)
_OPENING, _CLOSING = ("(", "[", "{", "\\{", "\\begin"), (")", "]", "}", "\\}", "\\end")


def boxed(text: str) -> tuple[str, int] | None:
    r"""Inside of the last closed \boxed{...}, and the position after it; None without one. Takes linear time."""
    opened: list[int | None] = []  # where a box begins; None for another brace
    last = None
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(None)
        elif match[0].startswith("\\boxed"):
            opened.append(match.end())
        elif match[0] == "}" and opened:
            first = opened.pop()
            if first is not None and (last is None or first > last[0]):
                last = first, match.start()
    return last and (text[last[0] : last[1]], last[1] + 1)


def final_answer(text: str) -> str | None:
    r"""What is in the last \boxed{}, else what follows the last "####" or "answer is" on its line; None without any."""
    box = boxed(text)
    if box:
        return box[0].strip() or None
    marked = deque(_FINAL.finditer(text), maxlen=1)
    return (marked[0][1] or marked[0][2] or "").strip() or None if marked else None


def same_answer(given: str, expected: str) -> bool:
    """Whether two final answers are the same; see the module. An empty answer is the same as nothing."""
    return verdict(given, expected) is True


def verdict(given: str, expected: str) -> bool | None:
    """True: the two answers are the same. False: they differ in a number, a unit or a name. None: only algebra can tell."""
    given, expected = given.strip(), expected.strip()
    if max(len(given), len(expected)) > LONGEST or _too_deep(given) or _too_deep(expected):
        return given == expected
    try:
        return _compared(_read(_rewritten(given)), _read(_rewritten(expected)))
    except RecursionError:  # a tower of powers, a function of a function of ...
        return given == expected


def canonical(answer: str) -> str:
    """One text for all answers that `same_answer` calls the same; names and units are left out, so that 50% is 50."""
    read = _structure(answer.strip())
    return answer.strip() if read is None else _text(read)


def constant(answer: str) -> Fraction | None:
    """The number that an answer is, whatever its name and unit; None for other answers."""
    read = _structure(answer.strip())
    return constant_of(read.form) if read is not None and read.kind == "leaf" else None


def _structure(answer: str) -> _Answer | None:
    if len(answer) > LONGEST or _too_deep(answer):
        return None
    try:
        return _read(_rewritten(answer))
    except RecursionError:
        return None


def _text(read: _Answer) -> str:
    if read.kind == "leaf":
        return read.form if isinstance(read.form, str) else _sum_text(read.form)
    if read.kind == "set":
        parts = sorted(map(_text, read.parts[1:]))
        return ("\\cup" if read.parts[0].kind == "union" else ",").join(parts)
    inside = ",".join(map(_text, read.parts))
    return f"{read.kind[0]}{inside}{read.kind[-1]}" if len(read.kind) == 2 else f"{read.kind}({inside})"


def _sum_text(form: tuple) -> str:
    """Of a sum of `dqo.grading.terms`."""
    number, terms = form
    parts = [str(number)] if number or not terms else []
    for coefficient, factors in terms:
        product = "*".join(map(_factor_text, factors))
        parts.append(product if coefficient == 1 else f"{coefficient}*{product}")
    return "+".join(parts)


def _factor_text(factor: tuple) -> str:
    def inner(part: str | tuple) -> str:
        return part if isinstance(part, str) else _sum_text(part) if part else ""

    kind, *parts = factor
    return parts[0] if kind == "symbol" else f"{kind}({','.join(filter(None, map(inner, parts)))})"


@dataclass(frozen=True)
class _Answer:
    """An answer taken apart. `kind`: "leaf" with its `form`, or what holds the `parts`; a "set" has no order."""

    kind: str
    parts: tuple[_Answer, ...] = ()
    form: tuple | str = ""  # a sum of terms, or the tokens of what cannot be read as one
    unit: str = ""
    name: str = ""


def _rewritten(text: str) -> str:
    box = boxed(text)
    if box and text.startswith("\\boxed") and box[1] == len(text):
        text = box[0]
    for pattern, by in _REWRITTEN:
        text = pattern.sub(by, text)
    return text.strip().rstrip(".").strip()


def _compared(a: _Answer, b: _Answer) -> bool | None:
    if (a.name and b.name and a.name != b.name) or (a.unit and b.unit and a.unit != b.unit):
        return False
    if a.kind != b.kind:
        return None
    if a.kind == "leaf":
        if (a.form and a.form == b.form) or _percent(a, b) or _percent(b, a):
            return True
        return None if constant_of(a.form) is None or constant_of(b.form) is None else False
    if len(a.parts) != len(b.parts):
        return None
    named = [bool(part.name) for part in (*a.parts[1:], *b.parts[1:])]  # of a set the first part says its kind
    if a.kind != "set" or any(named) and not all(named):
        found = list(map(_compared, a.parts, b.parts))
        return False if False in found else None if None in found else True
    rest = list(b.parts)
    for part in a.parts:
        match = next((i for i, other in enumerate(rest) if _compared(part, other)), None)
        if match is None:
            return None
        del rest[match]
    return True


def _percent(a: _Answer, b: _Answer) -> bool:
    """Whether a is written in per cent and b is the same number without the sign."""
    share = constant_of(a.form) if a.unit == "%" and not b.unit else None
    return share is not None and (share / 100, ()) == b.form


def _read(text: str) -> _Answer:
    text = text.strip()
    named = _NAMED.fullmatch(text)
    if named:
        return replace(_read(named[2]), name=re.sub(r"[\s{}]", "", named[1]))
    if not re.search(r"[(\[{]", _WORDS.sub("", text)):  # in brackets 1,234 are two numbers
        text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    for separators, kind in ((("\\cup",), "union"), ((",", ";"), "set")):
        parts = _split(text, separators)
        if len(parts) > 1:
            return _Answer("set", (_Answer(kind), *map(_read, parts)))
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = matrix[2].strip().removesuffix("\\\\").split("\\\\")
        return _Answer(matrix[1], tuple(_Answer("row", tuple(map(_read, row.split("&")))) for row in rows))
    opener = "\\{" if text.startswith("\\{") else text[:1]
    closer = "\\}" if text.endswith("\\}") else text[-1:]
    if opener in _OPENING and closer in _CLOSING and _encloses(text):
        inside = text[len(opener) : -len(closer)]
        parts = _split(inside, (",", ";"))
        if len(parts) > 1:
            if (opener, closer) == ("\\{", "\\}"):
                return _Answer("set", (_Answer("set"), *map(_read, parts)))
            return _Answer(opener + closer, tuple(map(_read, parts)))
        if opener + closer == "()":
            return _read(inside)
    return _leaf(text)


def _split(text: str, separators: tuple[str, ...]) -> list[str]:
    """The parts between separators that are outside of brackets."""
    parts, start, depth = [], 0, 0
    for match in TOKEN.finditer(text):
        depth += (match[0] in _OPENING) - (match[0] in _CLOSING)
        if depth == 0 and match[0] in separators:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def _too_deep(text: str) -> bool:
    depths = accumulate((token in _OPENING) - (token in _CLOSING) for token in TOKEN.findall(text))
    return max(depths, default=0) > _DEEPEST


def _encloses(text: str) -> bool:
    """Whether the bracket that begins a text is closed by the one that ends it, of any kind: intervals may be half open."""
    depth = 0
    for match in TOKEN.finditer(text):
        depth += (match[0] in _OPENING) - (match[0] in _CLOSING)
        if depth <= 0:
            return match.end() == len(text)
    return False


def _leaf(text: str) -> _Answer:
    unit, united = "", _UNIT.fullmatch(text)
    if united:
        text = united[1]
        unit = (united[2] or united[3]).strip().strip(".").lower()
        plural = len(unit) > 2  # "ms" is not "m", and "s" not nothing
        unit = _UNIT_NAMES.get(unit, unit.removesuffix("s") if plural else unit) + (united[4] or "")
    text = _WORDS.sub(r" \1 ", text)
    return _Answer("leaf", form=read_sum(text) or " ".join(TOKEN.findall(text)), unit=unit)
