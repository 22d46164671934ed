r"""The verifier `math`: equality of final answers, by `dqo.grading.answers` where that knows, else by math-verify (extra `math`).

math-verify parses with antlr and compares with sympy, which some answers keep busy for hours or fill the memory with
(`9^{9^{9^9}}`). It is called in the processes of `dqo.grading.pool` alone, which are killed then: its own time limits are
signals, which stop no multiplication of numbers.
"""

from __future__ import annotations

from dqo.errors import UserError
from dqo.grading.answers import LONGEST, canonical, final_answer, verdict
from dqo.grading.grade import Grade


def math_grade(completion: str, problem: dict) -> Grade:
    r"""Whether the final answer of a completion is `problem["answer"]`, which may itself be a solution that ends in one.

    Raises:
        ValueError: when the reference answer is empty or longer than 1,000 characters.
    """
    expected = reference_answer(problem["answer"])
    given = final_answer(completion)
    if given is None:
        return Grade(0.0, parsed=False)
    return Grade(float(same(given, expected)), answer=canonical(given))


def reference_answer(answer: str) -> str:
    """The final answer of a reference solution, or the whole of a text without one."""
    expected = final_answer(answer) or answer.strip()
    if not expected or len(expected) > LONGEST:
        what = "is empty" if not expected else f"has {len(expected):,} characters, more than {LONGEST:,}"
        raise ValueError(f"the reference answer {what}")
    return expected


def same(given: str, expected: str) -> bool:
    """Whether two answers are the same. It may take forever, and all memory."""
    known = verdict(given, expected)
    if known is not None or not given.strip() or not expected.strip():
        return known is True
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0)]

    def parsed(answer: str) -> list:
        return parse(f"\\boxed{{{_bare(answer)}}}", config, parsing_timeout=None, raise_on_error=True)

    try:
        return bool(verify(parsed(expected), parsed(given), timeout_seconds=None, raise_on_error=True))
    except MemoryError:
        raise
    except (Exception, SystemExit):  # sympy raises anything at what it cannot compare
        return False


def load_math_verify() -> None:
    """Imports math-verify.

    Raises:
        UserError: saying that it is missing, or broken.
    """
    try:
        import math_verify  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "math_verify":
            raise UserError(f"math-verify cannot be loaded: {error}; install it again") from error
        raise UserError("the verifier math needs the package math-verify: pip install 'math-verify>=0.8'") from error
    except Exception as error:
        raise UserError(f"math-verify cannot be loaded: {type(error).__name__}: {error}; install it again") from error


def _bare(answer: str) -> str:
    """The answer without a final period and dollar signs around it, which math-verify takes for parts of it."""
    return answer.strip("$ \n").rstrip(".$ \n").removeprefix("\\(").removesuffix("\\)")
