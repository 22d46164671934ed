"""A JSON Lines file that a long command appends to: whole lines, one writer, and the same options when it goes on.

    rollouts.jsonl                 the rows
    rollouts.jsonl.options.json    what they depend on; written before the first row

Whatever killed the writer, every line but the last is whole; one without an end is cut when the file is opened again. The
processes of one launch write in turns: each locks the second file for a moment, and all of them hold the first one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqo.errors import UserError
from dqo.files import write_whole, writing

if TYPE_CHECKING:  # it imports torch
    from dqo.processes import Processes


@dataclass
class Appended:
    """An open file. `found`: what `keep` made of each row that it had."""

    path: Path
    descriptor: int
    found: list[Any]
    synced: float = 0.0  # when
    turn: int | None = None  # the file whose lock gives the turn, where several processes write

    def append(self, rows: Iterable[dict]) -> None:
        """Writes rows. A killed process loses none of them, a machine without power those of the last second.

        Raises:
            UserError: when they cannot be written, as on a full disk; none of them is in the file then.
        """
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with writing(self.path), _turn(self.turn):
            size = os.fstat(self.descriptor).st_size
            if self.turn is not None and (whole := _whole_end(self.descriptor, size)) < size:
                os.ftruncate(self.descriptor, size := whole)  # another process was killed while it wrote
            try:
                _write(self.descriptor, lines.encode())
                if time.monotonic() - self.synced > 1.0:
                    os.fsync(self.descriptor)
                    self.synced = time.monotonic()
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(self.descriptor, size)
                raise


@contextlib.contextmanager
def _turn(descriptor: int | None) -> Iterator[None]:
    if descriptor is None:
        yield
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _whole_end(descriptor: int, size: int) -> int:
    """Where the last whole line ends."""
    while size and os.pread(descriptor, 1, size - 1) != b"\n":
        size -= 1
    return size


def begun_under(path: str | Path) -> dict[str, Any]:
    """The options that a file which has rows was begun under; {} where there is none, or it does not tell."""
    path = Path(path)
    try:
        return _options(path) if path.stat().st_size else {}
    except (OSError, ValueError):  # named when the file is opened
        return {}


def _told(path: Path) -> Path:
    return path.with_name(f"{path.name}.options.json")


def _options(path: Path) -> dict[str, Any]:
    found = json.loads(_told(path).read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"{type(found).__name__}, no object")
    return found


def _write(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


@contextlib.contextmanager
def appending(
    path: str | Path,
    options: dict[str, Any],
    keep: Callable[[dict], Any],
    flag: str = "--output_file",
    processes: Processes | None = None,
) -> Iterator[Appended]:
    """Opens a file to append rows to it; nobody else can until the block ends.

    Args:
        options: everything that the rows depend on, as JSON has it; what is in the file must have been written under the same.
        keep: what is wanted of a row that the file has already.
        flag: the option that names the file, for messages.
        processes: those of a launch, all of which call this and append; None: this one alone.

    Raises:
        UserError: when another process has the file, when it was written under other options or by something else, for a
            damaged row, and when the processes of a launch have other options.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".ndjson"):
        raise UserError(f"{path}: rows are written as JSON Lines; name the file .jsonl")
    with contextlib.ExitStack() as opened:
        if processes is None or processes.world == 1:
            descriptor = _locked(opened, path, fcntl.LOCK_EX, flag)
            file = Appended(path, descriptor, _claim(path, descriptor, options, keep, flag))
        else:
            file = _shared(opened, path, options, keep, flag, processes)
        yield file
        with writing(path):
            os.fsync(file.descriptor)


def _shared(
    opened: contextlib.ExitStack,
    path: Path,
    options: dict,
    keep: Callable[[dict], Any],
    flag: str,
    processes: Processes,
) -> Appended:
    """The file in each process of a launch. The first one claims it; then all of them hold it, so that a command that comes later
    is refused as long as any of them lives."""

    def claimed() -> tuple[list[Any], dict]:
        descriptor = _locked(opened, path, fcntl.LOCK_EX, flag)
        found = _claim(path, descriptor, options, keep, flag)
        _lock(path, descriptor, fcntl.LOCK_SH, flag)
        return found, options

    found, of_first = processes.from_main(claimed)
    if changed := _changed(of_first, options, "in process 0", f"in process {processes.rank}"):
        raise UserError(f"the processes of this launch do not read the same: {changed}")
    descriptor = _locked(opened, path, fcntl.LOCK_SH, flag)
    turn = os.open(_told(path), os.O_RDONLY)
    opened.callback(os.close, turn)
    return Appended(path, descriptor, found, turn=turn)


def _locked(opened: contextlib.ExitStack, path: Path, kind: int, flag: str) -> int:
    """The file, made if it is not there, open and locked until `opened` ends."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    opened.callback(os.close, descriptor)
    _lock(path, descriptor, kind, flag)
    return descriptor


def _lock(path: Path, descriptor: int, kind: int, flag: str) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{path}: another process is writing to it; wait for its end, or choose another {flag}"
        ) from None


def _claim(path: Path, descriptor: int, options: dict, keep: Callable[[dict], Any], flag: str) -> list[Any]:
    """What the file has; one that is empty becomes this command's."""
    told = _told(path)
    text = json.dumps(options, indent=1)
    if os.fstat(descriptor).st_size == 0:
        write_whole(told, text.encode())
        return []
    _check_same(path, told, json.loads(text), flag)
    found, end = _whole_rows(path, keep)
    with writing(path):
        os.ftruncate(descriptor, end)
    return found


def _whole_rows(path: Path, keep: Callable[[dict], Any]) -> tuple[list[Any], int]:
    """What is kept of the whole rows, and where in the file they end."""
    found, end = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                found.append(keep(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}:{number}: is no row of this command; mend or delete the line, or move the file"
                ) from error
            end += len(line)
    return found, end


def _check_same(path: Path, told: Path, options: dict, flag: str) -> None:
    try:
        then = _options(path)
    except FileNotFoundError:
        raise UserError(f"{path}: exists, and this command did not write it; choose another {flag}") from None
    except ValueError as error:
        raise UserError(f"{told}: is damaged; choose another {flag}, or delete both files to begin again") from error
    if changed := _changed(then, options, "then", "now"):
        raise UserError(f"{path}: was begun under other options: {changed}. Repeat those, or choose another {flag}")


def _changed(one: dict, other: dict, name: str, other_name: str) -> str:
    return "; ".join(
        f"{key} {json.dumps(one.get(key))} {name}, {json.dumps(other.get(key))} {other_name}"
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    )
