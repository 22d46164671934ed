"""The process of `dqo.grading.pool`: it grades one completion after the other until its input ends.

It has a limit of memory and none of time: its parent kills it. Questions and answers go through descriptors of their own, so that
a verifier may print, and read from the standard input, which is empty.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import pickle
import resource
import select
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dqo.errors import UserError
from dqo.grading.grade import Grade, failed, grade_of
from dqo.grading.verifiers import load_verifier

OUT_OF_MEMORY = "crash: out of memory"
_MOST_CHILDREN = 32  # processes that verifiers may leave behind before this one is replaced


def serve(verifier: str, memory: int, life: int) -> None:
    """Answers pickles (completion, problem) by lines of JSON: the fields of a Grade and "restart", whether this process should be
    replaced. The first line says {"refused": null}, or why the verifier cannot be used.

    Args:
        memory: bytes that grading may take, beside what the verifier has when it is loaded.
        life: a pipe of which the parent alone has the other end: this process and its children die with the parent.
    """
    questions, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    logging.disable(logging.CRITICAL)
    _die_with(life)
    own = os.getpid()

    def say(values: dict) -> None:
        if os.getpid() != own:  # a verifier forked, and its child came back here
            os._exit(0)
        line = json.dumps(values).encode() + b"\n"
        while line:
            line = line[os.write(answers, line) :]

    try:
        grade = load_verifier(verifier)
        _limit_memory(memory)
    except UserError as error:
        return say({"refused": str(error)})
    say({"refused": None})
    with contextlib.suppress(EOFError):
        while True:
            say(_graded(grade, *pickle.load(questions)))
    os._exit(0)  # threads of the verifier, and what it registered for the exit, do not matter


def _graded(grade: Callable[[str, dict], Any], completion: str, problem: dict) -> dict:
    try:
        found = grade(completion, problem)
    except MemoryError:
        return {**dataclasses.asdict(failed(OUT_OF_MEMORY)), "restart": True}
    except BaseException as error:  # an exit too ends this grade alone
        return {**dataclasses.asdict(failed(f"crash: {_said(error)}")), "restart": False}
    try:
        made = _plain(grade_of(found))
    except Exception as error:
        made = failed(f"crash: invalid result: {_utf8(str(error))}")
    return {**dataclasses.asdict(made), "restart": _children() > _MOST_CHILDREN}


def _plain(grade: Grade) -> Grade:
    """The grade with fields of its types, whatever a verifier put in there."""
    text = None if grade.answer is None else _utf8(str(grade.answer))
    error = grade.error if grade.error in (None, "timeout") else f"crash: {_utf8(str(grade.error))}"
    return Grade(grade.score, bool(grade.parsed), text, error)


def _utf8(text: str) -> str:
    """The text with half surrogate pairs, which no file can hold, written out as \\ud83d."""
    return text.encode(errors="backslashreplace").decode()


def _said(error: BaseException) -> str:
    try:
        text = _utf8(" ".join(str(error).split())[:200])
    except Exception:  # its own __str__
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _children() -> int:
    lists = Path("/proc/self/task").glob("*/children")
    with contextlib.suppress(OSError):  # a thread that ended
        return sum(len(path.read_text().split()) for path in lists)
    return 0


def _die_with(life: int) -> None:
    """Asks the kernel to end this group of processes when the other end of the pipe is closed: SIGIO, which nothing handles, also
    ends a process that is in the middle of a long computation."""
    fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)
    if select.select([life], [], [], 0)[0]:  # it was closed before
        os._exit(0)


def _limit_memory(memory: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # no /proc here, or no such limit
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + memory
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
