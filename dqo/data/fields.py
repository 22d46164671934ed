"""Numbers and lists of numbers, as fields of rows hold them."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from dqo.data.forms import shown
from dqo.errors import UserError

FLOAT32_MAX = 3.4028234663852886e38  # rewards, log-probabilities and options become float32 tensors
_TRUE, _FALSE = (
    {"1", "true", "yes", "y", "+", "correct", "right", "good"},
    {"0", "false", "no", "n", "-", "incorrect", "wrong", "bad"},
)


def finite_number(value: Any, name: str) -> float:
    """A finite number. Ints are accepted, bools and strings are not."""
    of_a_list = name.endswith("]")  # such as a step's, while the label is the outcome's
    if isinstance(value, bool):
        other = "" if of_a_list else ", or use the label column"
        raise UserError(f"{name} is {shown(value)}, a bool; expected a number: {float(value)}{other}")
    if isinstance(value, str):
        cure = ": cast it with float()"
        try:
            float(value)
        except ValueError:
            truth = truth_of(value)
            other = "" if of_a_list else f", or use the label column with {str(truth).lower()}"
            known = f": {float(truth or 0)}{other}"
            cure = ", or drop the row" if truth is None else known
        raise UserError(f"{name} is {shown(value)}, a string; expected a number{cure}")
    if not isinstance(value, Real):
        raise UserError(f"{name} is {shown(value)}; expected a number, or drop the row")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise UserError(
            f"{name} is {shown(result)}; expected a finite number: score the response again, or drop the row"
        )
    if abs(result) > FLOAT32_MAX:
        raise UserError(f"{name} is {result}; float32 holds at most {FLOAT32_MAX:.2g}: rescale it, or drop the row")
    return result


def truth_of(value: Any) -> bool | None:
    """The boolean that a word or number stands for; None where that is not known."""
    word = str(value).strip().lower().removesuffix(".0")
    return True if word in _TRUE else False if word in _FALSE else None


def each(value: Any, name: str, check: Callable[[Any, str], Any]) -> list:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{name} is {shown(value)}; expected a list")
    return [check(item, f"{name}[{i}]") for i, item in enumerate(value)]


def numbers(value: Any, name: str) -> list[float]:
    usual = isinstance(value, (list, tuple)) and set(map(type, value)) == {float}  # and fast
    if usual and all(map(math.isfinite, value)) and max(map(abs, value)) <= FLOAT32_MAX:
        return list(value)
    return each(value, name, finite_number)


def is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
