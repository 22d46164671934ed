"""Verifiers in processes of their own: one that hangs, crashes, leaks, prints or forks costs one grade, nothing else."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dqo.errors import UserError
from dqo.grading import worker
from dqo.grading.grade import Grade, failed
from dqo.grading.verifiers import VERIFIERS, check_name

logger = logging.getLogger(__name__)

TIMEOUT = 10.0  # seconds
_MEMORY = 2**31
_START_SECONDS = 120  # importing sympy on a busy machine
_CHILD = (
    "import sys; sys.path[:] = sys.argv[4:]; "
    f"from {worker.__name__} import serve; serve(sys.argv[1], *map(int, sys.argv[2:4]))"
)
_LISTED = 5  # problems named in one message


class VerifierPool:
    """Grades completions in killable processes; a context manager.

    Args:
        verifier: a name of VERIFIERS, or python:module:function. The function gets the completion and the problem, and returns a
            bool, a finite number or a `dqo.grading.grade.Grade`. What it prints is dropped.
        processes: None takes one for each core.
        timeout: seconds that one completion may take.
        memory: bytes that a process may take, beside what the verifier has when it is loaded.

    Raises:
        UserError: when the verifier cannot be loaded.
    """

    def __init__(
        self, verifier: str, processes: int | None = None, timeout: float = TIMEOUT, memory: int = _MEMORY
    ) -> None:
        check_name(verifier)
        self.verifier = verifier
        self.counts: Counter[str] = Counter()  # of OUTCOMES
        count = processes or len(os.sched_getaffinity(0))
        self._workers = [_Worker(verifier, timeout, memory) for _ in range(count)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()  # so that no more are started than have work
        for idle in self._workers:
            self._idle.put(idle)
        self._named: set[str] = set()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="verifier")
        try:
            self._workers[-1].start()
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for started in self._workers:
            started.close()

    def grade(self, completions: Sequence[str], problems: Sequence[dict]) -> list[Grade]:
        """A grade for each completion of its problem, in their order. Grades with an error count as wrong; each kind of error is
        logged once, and all are counted in `counts`.

        Args:
            problems: an object for each completion, with what the verifier reads: prompt, answer, or a whole row.
        """
        return list(self.grades(completions, problems))

    def grades(self, completions: Sequence[str], problems: Sequence[dict]) -> Iterator[Grade]:
        """`grade`, one by one as they are there."""
        if len(completions) != len(problems):
            raise ValueError(f"{len(completions)} completions, {len(problems)} problems")
        for made, completion, problem in zip(
            self._threads.map(self._one, completions, problems), completions, problems
        ):
            self.counts[made.outcome] += 1
            self._name(made, completion, problem)
            yield made

    def _one(self, completion: str, problem: dict) -> Grade:
        idle = self._idle.get()
        try:
            return idle.grade(completion, problem)
        finally:
            self._idle.put(idle)

    def _name(self, made: Grade, completion: str, problem: dict) -> None:
        kind = ":".join((made.error or "").split(":")[:2])
        if kind and kind not in self._named:
            self._named.add(kind)
            where = problem.get("source") or problem.get("prompt_id") or "a completion"
            logger.warning(
                "%s: grading by %s ended in %s; the completion counts as wrong, and further ones of this kind are only counted: "
                "%.80r", where, self.verifier, made.error, completion,
            )  # fmt: skip


class _Died(Exception):
    pass


class _Worker:
    """One process that grades, started when it is first needed and again after it was killed or died. One thread at a time."""

    def __init__(self, verifier: str, timeout: float, memory: int):
        self.verifier, self.timeout, self.memory = verifier, timeout, memory
        self._process: subprocess.Popen[bytes] | None = None
        self._life = -1  # the process ends when this is closed, by whatever
        self._closed = False
        self._lock = threading.Lock()  # of starting and ending

    def grade(self, completion: str, problem: dict) -> Grade:
        question = pickle.dumps((completion, problem))
        while True:
            fresh = self.start()
            try:
                reply = self._exchange(question, self.timeout)
            except TimeoutError:
                self._kill()
                return failed("timeout")
            except _Died as death:
                reply = {"error": f"crash: {death}", "restart": True}
            if reply.pop("restart"):
                self._kill()
            died_or_full = reply["error"] == worker.OUT_OF_MEMORY or "score" not in reply
            if (
                not died_or_full or fresh
            ):  # else the ones before it may have filled the memory, and it gets a process of its own
                return Grade(**reply) if "score" in reply else failed(reply["error"])

    def start(self) -> bool:
        """Starts the process; False where it runs.

        Raises:
            UserError: when the verifier cannot be loaded.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed")
            if self._process is not None and self._process.poll() is None:
                return False
        self._kill()
        with self._lock:
            read, self._life = os.pipe()
            arguments = [self.verifier, str(self.memory), str(read), *sys.path]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,  # a group of its own, which is killed as a whole; Ctrl-C does not reach it
                pass_fds=[read],
            )
            os.close(read)
            for stream in _streams(self._process):
                os.set_blocking(stream.fileno(), False)
        try:
            refused = self._exchange(b"", _START_SECONDS)["refused"]
        except TimeoutError:
            refused = f"{self.verifier}: its process was not ready after {_START_SECONDS} seconds"
        except _Died as death:
            refused = f"{self.verifier}: {death} while it was started"
        if refused is not None:
            self._kill()
            raise UserError(refused)
        return True

    def _exchange(self, question: bytes, seconds: float) -> dict:
        """The process's next line after a question; raises TimeoutError or _Died."""
        process = self._process
        if process is None:  # closed by another thread
            raise _Died("was closed")
        stdin, stdout = _streams(process)
        left, reply, deadline = memoryview(question), b"", time.monotonic() + seconds
        while not reply.endswith(b"\n"):
            if (rest := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            try:
                readable, writable = _ready(stdout.fileno(), stdin.fileno() if left else None, min(rest, 0.2))
                if writable:
                    left = left[os.write(stdin.fileno(), left) :]
                if readable:
                    chunk = os.read(stdout.fileno(), 2**16)
                    if not chunk:
                        raise _Died(_how(process))
                    reply += chunk
            except (OSError, ValueError) as error:  # nobody reads the pipe; or it was closed here
                raise _Died(_how(process)) from error
            if not readable and process.poll() is not None:  # a child of the verifier may hold the pipe open
                raise _Died(_how(process))
        return json.loads(reply)

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._kill()

    def _kill(self) -> None:
        """Ends the process, if there is one, with all that it started."""
        with self._lock:
            process, self._process = self._process, None
            if process is None:
                return
            for pid in _descendants(process.pid):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(self._life)
            for stream in _streams(process):
                stream.close()


def _streams(process: subprocess.Popen[bytes]) -> tuple[Any, Any]:
    return process.stdin, process.stdout


def _ready(readable: int, writable: int | None, seconds: float) -> tuple[bool, bool]:
    """Which of two descriptors is ready, within some seconds. (select.select knows none above 1,023.)"""
    poll = select.poll()
    poll.register(readable, select.POLLIN)
    if writable is not None:
        poll.register(writable, select.POLLOUT)
    found = {descriptor for descriptor, _ in poll.poll(seconds * 1000)}
    return readable in found, writable in found


def _how(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(1)
    except subprocess.TimeoutExpired:
        return "the process closed its pipe"
    if code >= 0:
        return f"the process exited with {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"the process was killed by {name}"


def _descendants(pid: int) -> Iterator[int]:
    """Processes that a process started, and theirs, where the system has /proc: also those that left its group."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                yield from _descendants(child)
                yield child


def check_answers(tasks: Sequence[dict], verifier: str) -> None:
    """Refuses, before anything is sampled or trained, a verifier that cannot be loaded, and problems that it cannot grade by.

    Args:
        tasks: each with prompt and answer, and its source.

    Raises:
        UserError: naming what the verifier needs and has not got, or the problems.
    """
    with VerifierPool(verifier, processes=1):
        pass
    check_problems(tasks, verifier)


def check_problems(tasks: Sequence[dict], verifier: str) -> None:
    """The second half of `check_answers`; those of a user's verifier are not looked at."""
    if verifier not in VERIFIERS:
        return
    wrong = []
    for task in tasks:
        try:
            VERIFIERS[verifier].check(task)
        except ValueError as error:
            wrong.append(f"{task['source']}: {error}")
    if wrong:
        more = [f"... and {len(wrong) - _LISTED} more"] if len(wrong) > _LISTED else []
        cure = f"the verifier {verifier} cannot grade by it; mend the answer, drop the row, or choose another verifier"
        raise UserError("\n".join([*wrong[:_LISTED], *more, cure]))
