"""The table of verifiers, which grade answers to problems, and the check of reference answers before anything is trained.

A verifier is one file of this folder and one line of VERIFIERS, which alone names it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dqo.errors import UserError
from dqo.grading.gsm8k import gsm8k_correct
from dqo.grading.math_grader import GRADER, math_correct

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verifier:
    """How a completion is graded by the reference answer of its problem."""

    correct: Callable[[str, str], bool]  # (completion, answer); raises ValueError for an answer that it cannot grade by
    what: str  # what it compares, for the help of --verifier
    ready: Callable[[], None] = lambda: None  # raises UserError when something that it needs is not installed


VERIFIERS = {
    "gsm8k": Verifier(gsm8k_correct, "compares the number after ####"),
    "math": Verifier(math_correct, "compares the last boxed answer, and needs the extra math", ready=GRADER.ready),
}
if TYPE_CHECKING:
    VerifierName = str
else:
    VerifierName = Literal[tuple(VERIFIERS)]
_LISTED = 5  # problems named in one message


def check_answers(tasks: list[dict], verifier: str) -> None:
    """Grades one completion against the answer of every task.

    Args:
        tasks: each with the strings prompt and answer, and its source.

    Raises:
        UserError: naming the tasks whose answer the verifier cannot read, or what the verifier needs and has not got.
    """
    VERIFIERS[verifier].ready()
    wrong = []
    for task in tasks:
        try:
            VERIFIERS[verifier].correct("#### 0", task["answer"])
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
            return VERIFIERS[verifier].correct(completion, task["answer"])
        except Exception as error:  # hours of training must not end in one odd completion
            logger.warning(
                "%s: grading by %s failed (%s: %s); the completion counts as wrong: %.80r",
                task["source"], verifier, type(error).__name__, error, completion,
            )  # fmt: skip
            return False

    return correct
