r"""Mathematical equality of final answers, by math-verify (the extra `math`) in a process that is killed when it takes too long.

math-verify parses with antlr and compares with sympy, which some answers keep busy for hours or fill the memory with
(`9^{9^{9^9}}`), and its own time limits are signals: they fail outside of the main thread, and stop no multiplication of numbers.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import logging
import subprocess
import sys
import threading

from dqo.errors import UserError
from dqo.grading import math_worker
from dqo.grading.answers import LONGEST, final_answer, verdict

logger = logging.getLogger(__name__)

_START_SECONDS = 120  # importing sympy on a busy machine
_CHILD = f"import sys; sys.path[:] = sys.argv[2:]; from {math_worker.__name__} import serve; serve(int(sys.argv[1]))"


class MathGrader:
    """Compares answers in one worker process, started when it is first needed and again after it was killed or died.

    Args:
        seconds: time limit of one comparison.
        memory: bytes of address space that the worker may have (where the system has such a limit).
    """

    def __init__(self, seconds: float = 5.0, memory: int = 2**31):
        self.seconds, self.memory = seconds, memory
        self.unfinished = 0  # comparisons that ran out of time or memory; they count as different
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def same(self, given: str, expected: str) -> bool:
        """Whether two answers are the same, by `dqo.grading.answers` where that knows, else by math-verify; from any thread.

        Raises:
            UserError: when math-verify is not installed, or cannot be loaded.
        """
        known = verdict(given, expected)
        if known is not None or not given.strip() or not expected.strip():
            return known is True
        with self._lock:
            self._ensure()
            found = self._ask([_bare(given), _bare(expected)], self.seconds)
            if found is None or found == "MemoryError":
                self.unfinished += 1
                logger.warning(
                    "math-verify did not finish comparing %.60r with %.60r: they count as different", given, expected
                )
                self._kill()
        return found is True

    def close(self) -> None:
        with self._lock:
            self._kill()

    def ready(self) -> None:
        """Starts the worker, so that a missing or broken math-verify is known early.

        Raises:
            UserError: saying what is missing.
        """
        with self._lock:
            self._ensure()

    def _ensure(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._kill()
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("the verifier math needs the package math-verify: pip install 'math-verify>=0.8'")
        command = [sys.executable, "-c", _CHILD, str(self.memory), *sys.path]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        ready = self._ask(None, _START_SECONDS)
        if ready != "ready":
            self._kill()
            raise UserError(f"math-verify cannot be loaded: {ready or 'its process ended or hung'}; install it again")

    def _ask(self, question: object, seconds: float) -> object:
        """The worker's next line after a question; None when it died, or was killed because its time was up."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        watch = threading.Timer(seconds, process.kill)
        watch.start()
        try:
            if question is not None:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
            return json.loads(process.stdout.readline() or "null")
        except (OSError, ValueError):  # it died before or while it answered
            return None
        finally:
            watch.cancel()

    def _kill(self) -> None:
        """Ends the worker, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None  # `_ensure` asks for both
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(OSError):  # what was not yet written has no reader
                process.stdin.close()


def _bare(answer: str) -> str:
    """The answer without a final period and dollar signs around it, which math-verify takes for parts of it."""
    return answer.strip("$ \n").rstrip(".$ \n").removeprefix("\\(").removesuffix("\\)")


GRADER = MathGrader()
atexit.register(GRADER.close)


def math_correct(completion: str, answer: str) -> bool:
    r"""Whether the final answer of a completion is `answer`, which may itself be a solution that ends in one.

    Raises:
        ValueError: when `answer` is empty or longer than 1,000 characters.
        UserError: when math-verify is not there.
    """
    expected = reference_answer(answer)
    given = final_answer(completion)
    return given is not None and GRADER.same(given, expected)


def reference_answer(answer: str) -> str:
    """The final answer of a reference solution, or the whole of a text without one."""
    expected = final_answer(answer) or answer.strip()
    if not expected or len(expected) > LONGEST:
        what = "is empty" if not expected else f"has {len(expected):,} characters, more than {LONGEST:,}"
        raise ValueError(f"the reference answer {what}")
    return expected
