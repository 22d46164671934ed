"""SIGTERM, a scheduler's notice, and SIGINT, Ctrl-C: what they do to a command at each moment.

in the steps of training        the step ends, a checkpoint is written, and the command ends
in the pass of the reference    what was computed is written, and the command ends
anywhere else                   the command ends
the second one                  the command ends at once, wherever it is

It ends with one line and with status 128 + the signal's number, 143 or 130. In a Python program `DQOTrainer.train` takes the
signals over during its steps alone and in the main thread alone, gives them back, and then raises KeyboardInterrupt for SIGINT
and SystemExit(143) for SIGTERM. This module imports nothing slow: a command installs it before everything else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO = 2.0  # seconds; a launcher and the terminal, or a scheduler, may each hand one signal on to a process

_END, _RAISE, _NOTE = "end", "raise", "note"
_moment = _END  # what a first signal does
_noted = 0  # the first signal's number
_noted_at = 0.0


def install() -> None:
    """Takes both signals over for a whole command. One that was ignored, as nohup does, stays so."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def noted() -> int:
    """The number of the signal that wants an end, or 0."""
    return _noted


def interruption(number: int) -> BaseException:
    """What to raise after the work that a signal, of this process or of another, was made to wait for."""
    global _noted
    _noted = number
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """A part of a command that keeps what it has done when a signal's exception passes through it."""
    with _at(_RAISE):
        yield


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """A part that asks `noted()` where it can end. A signal that it did not ask for any more is raised when it is over."""
    global _noted
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _noted = 0
    before = {number: signal.getsignal(number) for number in SIGNALS}
    install()
    try:
        with _at(_NOTE):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if _noted:
        raise interruption(_noted)


def leave() -> None:
    """Ends the process with the status of the signal that was noted."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(128 + _noted)


@contextlib.contextmanager
def _at(moment: str) -> Iterator[None]:
    global _moment
    before, _moment = _moment, moment
    try:
        yield
    finally:
        _moment = before


def _handle(number: int, frame: FrameType | None) -> None:
    global _noted, _noted_at
    name, now = signal.Signals(number).name, time.monotonic()
    if _noted:
        if "RANK" in os.environ and now - _noted_at < _ECHO:
            return
        _say(f"{name}: ended at once")
        os._exit(128 + number)
    _noted, _noted_at = number, now
    if _moment == _NOTE:
        _say(f"{name}: the step ends and a checkpoint is written; another signal ends at once")
        return
    _say(f"{name}: stopped; the same command goes on from what is whole")
    if _moment == _RAISE:
        raise interruption(number)
    leave()


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        line_ended = "\n" if os.isatty(2) else ""  # that of the progress bar
        os.write(2, f"{line_ended}{text}\n".encode())  # print could be called in the middle of itself
