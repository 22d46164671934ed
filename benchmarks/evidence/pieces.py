"""Long work in pieces: each has a directory with its result, several processes take them, and what was killed goes on."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dqo.errors import UserError
from dqo.files import write_whole

WAIT = 5.0  # seconds, for a piece that another process is at
RESULT, BEGUN = "result.json", "spec.json"


class Piece(Protocol):
    """It is hashable: equal pieces are made once."""

    @property
    def place(self) -> str:
        """The directory of the piece under that of the whole."""

    @property
    def is_run(self) -> bool:
        """Whether its result is all that is asked of it. Of others the files are needed too, by those that need them."""

    def needs(self) -> Sequence[Any]:
        """The pieces that must be made before."""


P = TypeVar("P", bound=Piece)
T = TypeVar("T")


def in_order(wanted: Iterable[P], finished: Callable[[P], bool] = lambda _: False) -> list[P]:
    """The pieces and all that they need, each once and behind what it needs. What a finished run needs is not made for it."""
    found: dict[P, None] = {}

    def add(piece: P) -> None:
        if piece not in found:
            for needed in piece.needs() if not (piece.is_run and finished(piece)) else ():
                add(needed)
            found[piece] = None

    for piece in wanted:
        add(piece)
    return list(found)


def stored(place: Path, spec: Callable[[], Any]) -> dict[str, Any] | None:
    """The result of a piece's directory, if it was made by this specification: all that the piece depends on."""
    path = place / RESULT
    if not path.exists():
        return None
    found = json.loads(path.read_bytes())
    return found if found["spec"] == spec() else None


def making() -> dict[str, str]:
    """What a figure must be told with: date, commit, device, and the version of torch."""
    from benchmarks.harness.environment import commit, today
    from dqo.train.record import machine

    told = machine()
    return {"date": today(), "commit": commit(), "device": told["device"], "torch": told["versions"]["torch"]}


def makings(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By device, torch and commit, the number of results, and the first and the last date. Results that tell nothing of it, which
    earlier versions made, count as made here and now."""
    found: dict[tuple[str, ...], list[str]] = {}
    for result in results:
        made = result.get("made") or making()
        found.setdefault((made["device"], made["torch"], made["commit"]), []).append(made["date"])
    heads = ("device", "torch", "commit", "runs", "first", "last")
    return [dict(zip(heads, (*key, len(dates), min(dates), max(dates)))) for key, dates in found.items()]


def head(summary: dict[str, Any]) -> list[str]:
    """Lines on how much of a study was made, where and when."""
    made, planned = summary["runs"]["made"], summary["runs"]["planned"]
    lines = [f"{made:,} of {planned:,} runs, {summary['cpu_hours']:.1f} CPU hours; `{summary['command']}`", ""]
    for one in summary["makings"]:
        dates = " to ".join(dict.fromkeys((one["first"], one["last"])))
        lines.append(f"- {one['runs']:,} runs: {one['device']}, torch {one['torch']}, {dates}, commit {one['commit']}")
    return lines


def worth_recording(summary: dict[str, Any]) -> bool:
    """Whether the summary tells of a finished run; otherwise it is told that what is recorded stays."""
    if not summary["runs"]["made"]:
        print("no run is finished: no table is recorded, and one that was stays")
    return summary["runs"]["made"] > 0


def made(place: Path, spec: Any, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Does the work and stores its result, with its seconds and its making. What a killed one left stays there for `work` to go
    on with, unless the specification has changed since."""
    begun = place / BEGUN
    if place.exists() and (not begun.exists() or json.loads(begun.read_bytes()) != spec):
        shutil.rmtree(place)
    place.mkdir(parents=True, exist_ok=True)
    write_whole(begun, json.dumps(spec, indent=1).encode())
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    result |= {"all_cpu_seconds": time.process_time() - cpu, "all_seconds": time.perf_counter() - wall}
    result |= {"made": making(), "spec": spec}
    write_whole(place / RESULT, json.dumps(result).encode())
    for path in place.rglob("checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)  # nothing goes on from there any more
    return result


@contextlib.contextmanager
def claimed(piece: Piece, root: Path) -> Iterator[bool]:
    """Whether no other process is at this piece; none begins it in the meantime."""
    path = root / "locks" / piece.place.replace("/", "--")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def go_on(
    wanted: Sequence[P],
    root: Path,
    minutes: float,
    result_of: Callable[[P, Path], dict[str, Any] | None],
    make: Callable[[P, Path], Any],
) -> int:
    """Makes what has no result, and what that needs, until the time is over; returns how many pieces are left. One that fails is
    told, and left. Files that were made may take runs for unfinished that were finished: what is left is looked for again."""
    begun = time.monotonic()
    finished: set[P] = set()
    failed: set[P] = set()

    def done(piece: P) -> bool:
        if piece not in finished and result_of(piece, root) is not None:
            finished.add(piece)
        return piece in finished

    def unfinished() -> list[P]:
        finished.clear()
        return [piece for piece in in_order(wanted, done) if not done(piece)]

    left = unfinished()
    while left := [piece for piece in left if not done(piece)] or unfinished():
        if time.monotonic() - begun >= 60 * minutes:
            return len(left)
        for piece in (piece for piece in left if piece not in failed and all(map(done, piece.needs()))):
            with claimed(piece, root) as mine:
                if not mine or done(piece):
                    continue
                started = time.monotonic()
                print(f"{time.strftime('%H:%M:%S')}  {piece.place} ({len(left)} left)", flush=True)
                try:
                    make(piece, root)
                except Exception as error:
                    if isinstance(error, UserError):
                        print(f"{piece.place}: {in_one_line(error)}", file=sys.stderr)
                    else:
                        traceback.print_exc()
                    failed.add(piece)
                print(f"          {time.monotonic() - started:.0f} s", flush=True)
            if not piece.is_run:
                left = unfinished()
            break
        else:
            if failed:
                return len(left)
            time.sleep(WAIT)  # another process is at all that is ready
            left = unfinished()
    return 0


def in_one_line(error: UserError) -> str:
    return " ".join(str(error).splitlines())


def command(main: Callable[..., None]) -> Callable[..., None]:
    """`main` of a command: of a mistake that the user can mend one line is told on stderr, and the exit status is 1."""

    @functools.wraps(main)
    def told(*arguments: Any) -> None:
        try:
            main(*arguments)
        except UserError as error:
            sys.exit(in_one_line(error))

    return told


def told(module: str, given: Sequence[str], *directories: Path | None) -> str:
    """The command as tables tell it: whoever reads them has other directories."""
    return " ".join(["python -m", module, *("DIRECTORY" if Path(part) in directories else part for part in given)])


def attempted(train: Callable[[], T]) -> tuple[T | None, str | None]:
    """(what the training returned, None), or (None, why the run ended itself, such as by collapsed weights).

    Raises:
        UserError: for faults of the machine.
    """
    try:
        return train(), None
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return None, str(error)


def scores(result: dict[str, Any], decoding: str | None = None) -> list[float]:
    """(P,): what each problem got by a decoding, "greedy" or "sampling"; None: the measure, half of its greedy answer and half of
    its samples' mean."""
    if decoding == "greedy":
        return result["greedy"]
    sampled = [sum(row) / len(row) for row in result["sampling"]]
    return sampled if decoding else [(greedy + mean) / 2 for greedy, mean in zip(result["greedy"], sampled)]
