"""The process of `dqo.grading.math_grader`: it compares answers by math-verify, one JSON line each, until its input ends.

It has a limit of memory and none of time: its parent kills it.
"""

from __future__ import annotations

import json
import logging
import os
import sys


def serve(memory: int) -> None:
    """Answers lines [given, expected] with true or false, or with the text of an error. First it says "ready", or why not."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # what a library prints is no answer
    logging.disable(logging.CRITICAL)

    def say(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        from math_verify import LatexExtractionConfig, parse, verify

        _limit_memory(memory)
    except Exception as error:
        return say(f"{type(error).__name__}: {error}")
    say("ready")
    config = [LatexExtractionConfig(boxed_match_priority=0)]

    def parsed(answer: str) -> list:
        return parse(f"\\boxed{{{answer}}}", config, parsing_timeout=None, raise_on_error=True)

    for line in sys.stdin:
        given, expected = json.loads(line)
        try:
            say(bool(verify(parsed(expected), parsed(given), timeout_seconds=None, raise_on_error=True)))
        except (Exception, SystemExit) as error:  # sympy raises anything
            say(type(error).__name__)
    return None


def _limit_memory(memory: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory if hard < 0 else min(memory, hard), hard))
