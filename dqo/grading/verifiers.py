"""How answers to problems are graded: a verifier by its name, tried on the reference answers before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Callable

from dqo.errors import UserError
from dqo.grading.gsm8k import gsm8k_correct
from dqo.grading.math_grader import GRADER, math_correct

logger = logging.getLogger(__name__)

VERIFIERS: dict[str, Callable[[str, str], bool]] = {"gsm8k": gsm8k_correct, "math": math_correct}
_LISTED = 5  # problems named in one message


def check_answers(tasks: list[dict], verifier: str) -> None:
    """Grades one completion against the answer of every task.

    Args:
        tasks: each with the strings prompt and answer, and its source.

    Raises:
        UserError: naming the tasks whose answer the verifier cannot read, or what the verifier needs and has not got.
    """
    if verifier == "math":
        GRADER.ready()
    wrong = []
    for task in tasks:
        try:
            VERIFIERS[verifier]("#### 0", task["answer"])
        except ValueError as error:
            wrong.append(f"{task['source']}: {error}")
    if wrong:
        more = [f"... and {len(wrong) - _LISTED} more"] if len(wrong) > _LISTED else []
        cure = f"the verifier {verifier} cannot grade by it; mend the answer, drop the row, or choose another verifier"
        raise UserError("\n".join([*wrong[:_LISTED], *more, cure]))


def graded_by(verifier: str, task: dict) -> Callable[[str], bool]:
    """The grader of a task's completions. When it fails, the completion counts as wrong, with a warning."""

    def correct(completion: str) -> bool:
        try:
            return VERIFIERS[verifier](completion, task["answer"])
        except Exception as error:  # hours of training must not end in one odd completion
            logger.warning(
                "%s: grading by %s failed (%s: %s); the completion counts as wrong: %.80r",
                task["source"], verifier, type(error).__name__, error, completion,
            )  # fmt: skip
            return False

    return correct
