"""The table of verifiers, which grade completions of problems, and verifiers of users as `python:module:function`.

A verifier is a function of a completion and its problem (with the strings prompt and answer), and a line of VERIFIERS,
which alone names it. It is called in the processes of `dqo.grading.pool`.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqo.errors import UserError, did_you_mean
from dqo.grading.arith import arith_grade, check_problem
from dqo.grading.grade import Grade
from dqo.grading.gsm8k import gsm8k_grade, reference_number
from dqo.grading.last_number import last_number_grade
from dqo.grading.math_grader import load_math_verify, math_grade, reference_answer
from dqo.modules import import_named

_OWN = "python:"  # begins the name of a user's


@dataclass(frozen=True)
class Verifier:
    """How a completion is graded. `check` raises ValueError for a problem that the verifier cannot grade by; `load` raises
    UserError when something that it needs is not installed."""

    grade: Callable[[str, dict], Grade]  # (completion, problem)
    what: str  # what it compares, for the help of --verifier
    check: Callable[[dict], Any]
    load: Callable[[], None] = lambda: None


def _of_answer(read: Callable[[str], Any]) -> Callable[[dict], Any]:
    """The check of a verifier that reads the problem's answer alone."""

    def check(problem: dict) -> None:
        if not isinstance(problem.get("answer"), str):
            raise ValueError("there is no answer (a string); dqo score takes it from --answers FILE")
        read(problem["answer"])

    return check


VERIFIERS = {
    "gsm8k": Verifier(
        gsm8k_grade, "compares the number after ####, as published results do", _of_answer(reference_number)
    ),
    "number": Verifier(
        last_number_grade,
        "compares the number that is boxed, or after #### or 'answer is', or else the last",
        _of_answer(reference_number),
    ),
    "math": Verifier(
        math_grade,
        "compares the last boxed answer, and needs the extra math",
        _of_answer(reference_answer),
        load_math_verify,
    ),
    "arith": Verifier(arith_grade, "checks the chains of the demonstration", check_problem),
}


def verifiers_help() -> str:
    """What the help of an option says of each."""
    each = "; ".join(f"{name} {verifier.what}" for name, verifier in VERIFIERS.items())
    return (
        f"It is one of these: {each}; or python:module:function, a function of your own, which gets the completion and the "
        "problem and returns True, False or a number."
    )


def check_name(name: str) -> None:
    """Refuses what is neither in the table nor of the form python:module:function.

    Raises:
        UserError: naming the verifiers.
    """
    if expected := expected_name(name):
        raise UserError(f"verifier must be {expected}, got {name!r}.{did_you_mean(name, VERIFIERS)}")


def expected_name(name: str) -> str | None:
    """What a verifier's name must be, when it is something else."""
    module, _, function = name.removeprefix(_OWN).partition(":")
    parts = [*module.split("."), *function.split(".")]
    if name in VERIFIERS or name.startswith(_OWN) and all(part.isidentifier() for part in parts):
        return None
    return f"one of {', '.join(VERIFIERS)}, or python:module:function"


def load_verifier(name: str) -> Callable[[str, dict], Any]:
    """The function that grades: (completion, problem) -> Grade, bool or number. It imports what the verifier needs.

    Raises:
        UserError: when that is not there.
    """
    check_name(name)
    if name in VERIFIERS:
        VERIFIERS[name].load()
        return VERIFIERS[name].grade
    return load_function(name)


def load_function(name: str) -> Callable:
    """The function of `python:module:function`.

    Raises:
        UserError: when the module cannot be imported, or has no such function.
    """
    module_name, _, function_name = name.removeprefix(_OWN).partition(":")
    module = import_named(module_name, name)
    found: Any = module
    for part in function_name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise UserError(
            f"{name}: the module {module_name} has no function {function_name}.{did_you_mean(function_name, known)}"
        )
    return found


def source_of(name: str | None) -> str | None:
    """sha256 of the file of python:module:function; None for other names, and where there is no file."""
    if name is None or not name.startswith("python:"):
        return None
    spec = importlib.util.find_spec(name.split(":")[1])
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
