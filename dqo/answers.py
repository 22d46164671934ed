r"""Final answers of mathematics, and whether two are the same: cautious, by text and by number, without a computer algebra.

`1/2`, `\frac{1}{2}` and `0.5` are the same, `1+2\sqrt{3}` and `2\sqrt3+1` are not found to be. So a wrong verdict is nearly
always a right answer that is not recognised.
"""

from __future__ import annotations

import re

from dqo.verify import evaluate_expression

_DROPPED = re.compile(r"\\(?:left|right|displaystyle|!|,|;|:| )|[$\s]|\\\(|\\\)|\\\[|\\\]|\^\{?\\circ\}?")
_TEXT = re.compile(r"\\(?:text|mbox|textbf|mathrm|mathbf)\{([^{}]*)\}")
_FRACTION = re.compile(r"\\frac(?:\{([^{}]*)\}|([0-9]))(?:\{([^{}]*)\}|([0-9]))")


def boxed(text: str) -> tuple[str, int] | None:
    r"""Inside of the last closed \boxed{...}, and the position after it; None without one."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth, first = 0, start + len("\\boxed")
        for i in range(first, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[first + 1 : i], i + 1
        start = text.rfind("\\boxed{", 0, start)
    return None


def _normal(answer: str) -> str:
    answer = _TEXT.sub(r"\1", answer.strip().replace("dfrac", "frac").replace("tfrac", "frac").replace("\\%", "%"))
    answer = _DROPPED.sub("", answer).rstrip(".")
    return re.sub(r"(?<=[0-9]),\\?!?(?=[0-9]{3}(?![0-9]))", "", answer)


def same_answer(given: str, expected: str) -> bool:
    """Whether two final answers are the same, by their text without its typesetting, or by the number they are."""
    given, expected = _normal(given), _normal(expected)
    if given == expected:
        return bool(given)
    values = []
    for answer in (given, expected):
        plain = _FRACTION.sub(lambda m: f"(({m[1] or m[2]})/({m[3] or m[4]}))", answer)
        values.append(evaluate_expression(plain))
    return values[0] is not None and values[0] == values[1]
