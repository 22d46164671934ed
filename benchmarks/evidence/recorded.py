"""Finished runs in benchmarks/results, one line each, so that a study goes on in another directory, or on another machine.

Runs are compared on the same rows. These are not recorded, but beside each run their hash is. Where rows that are made again
differ, as they may on another machine, no run on the one is compared with a run on the other.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from benchmarks.evidence import pieces
from benchmarks.evidence.pieces import RESULT, Piece, making
from benchmarks.evidence.recorded_lines import Fields, Line, read_lines
from dqo.files import write_whole

P = TypeVar("P", bound=Piece)
RESTORED = "restored"  # in a result that was read from a record: the hash of the rows that it was made on
SECONDS = ("cpu_seconds", "all_cpu_seconds")
LEFT_OUT = ("greedy", "sampling", "spec", "all_seconds")  # of a result, in its line
OF_A_ROW = ("prompt", "completion", "completion_ids", "reward", "label", "step_rewards")


@dataclass(frozen=True)
class Source(Generic[P]):
    """The rows that runs share which are compared: `file` of `piece`. `alone`: the runs that are compared with one another and
    with no others (the settings of a method); all of them together stand, whatever rows they were made on."""

    piece: P
    file: str
    alone: tuple[P, ...] = ()


@dataclass(frozen=True)
class Study(Generic[P]):
    """What a record must know of the runs of a study."""

    spec_of: Callable[[P, Path], Any]  # of any piece; None where it cannot be known yet
    source_of: Callable[[P], Source[P]]
    file_of: Callable[[str], str]  # by its place the name of its record, under benchmarks/results
    told: Callable[[P, Path, dict[str, Any]], dict[str, Any]]  # what the line tells besides the result, or in its place
    counts_of: Callable[[P], tuple[int, int]]  # test problems of a run, and samples of each
    fields_of: Callable[[P], Fields] = lambda _: {}  # that the study reads of a line besides those of all lines

    def result_of(self, piece: P, root: Path) -> dict[str, Any] | None:
        """What the piece's directory holds, if it was made by its present specification, and not on other rows than are there."""
        found = pieces.stored(root / piece.place, lambda: self.spec_of(piece, root))
        if found is None or RESTORED not in found or self.source_of(piece).alone:
            return found
        return found if self.rows_there(piece, root) in (None, found[RESTORED]) else None

    def rows_there(self, run: P, root: Path) -> str | None:
        """The hash of the rows that are there for the run; None before they are made."""
        source = self.source_of(run)
        path = root / source.piece.place / source.file
        if self.result_of(source.piece, root) is None or not path.exists():
            return None
        return _rows_hash(path, path.stat().st_mtime_ns)


def digest(value: Any) -> str:
    """Of canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _rows_hash(path: Path, _changed: int) -> str:
    """Of responses, rewards, labels, and who wrote them; not of places, nor of the last bits of log-probabilities."""
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        wrote = row.get("sampling") or {}
        found.append([*(row.get(name) for name in OF_A_ROW), wrote.get("model_hash"), wrote.get("temperature")])
    return digest(found)


def _line(run: Piece, result: dict[str, Any], rows: str, told: dict[str, Any]) -> dict[str, Any]:
    count = len(result["sampling"][0])
    if count > 9:
        raise ValueError(
            f"{run.place}: a line has one digit for the right samples of a problem, of at most 9, got {count}"
        )
    line: dict[str, Any] = {"place": run.place, "spec": digest(result["spec"]), "rows": rows}
    line |= {key: value for key, value in result.items() if key not in LEFT_OUT} | told
    line.setdefault("made", making())  # an earlier version did not tell it
    line |= {name: round(result[name], 1) for name in SECONDS}
    line |= {"samples": count, "greedy": "".join(str(int(one)) for one in result["greedy"])}
    return line | {"sampling": "".join(str(int(sum(row))) for row in result["sampling"])}


def _result(line: dict[str, Any], spec: Any) -> dict[str, Any]:
    """Of a line. Of a problem's samples the right ones come first."""
    sampling = [[1.0] * int(right) + [0.0] * (line["samples"] - int(right)) for right in line["sampling"]]
    own = {key: value for key, value in line.items() if key not in ("place", "rows", "samples")}
    own |= {"greedy": [float(one) for one in line["greedy"]], "sampling": sampling}
    return own | {"spec": spec, RESTORED: line["rows"]}


def _read(study: Study[P], runs: Iterable[P], folder: Path) -> dict[str, list[Line]]:
    """{place of a run: its lines, one for each kind of rows}; places that no run has any more too."""
    found: dict[str, list[Line]] = {}
    by_place = {run.place: run for run in runs}
    for file in dict.fromkeys(map(study.file_of, by_place)):
        for line in read_lines(folder, file):
            place = line.told["place"]
            if place in by_place:
                line.check(study.fields_of(by_place[place]))
            found.setdefault(place, []).append(line)
    return found


def _of_today(study: Study[P], run: P, spec: Any, lines: Iterable[Line]) -> list[dict[str, Any]]:
    """Those that were made by the run's present specification."""
    found = [line for line in lines if line.told["spec"] == digest(spec)]
    for line in found:
        line.check_counts(*study.counts_of(run))
    return [line.told for line in found]


def record(study: Study[P], every: Sequence[P], root: Path, folder: Path) -> None:
    """Writes a line for each finished run. Lines of other rows stay, unless the specification has changed since."""
    runs = [piece for piece in every if piece.is_run]
    recorded, files = _read(study, runs, folder), dict[str, list[dict[str, Any]]]()
    for run in runs:
        spec, known = study.spec_of(run, root), recorded.pop(run.place, ())
        kept = [line.told for line in known] if spec is None else _of_today(study, run, spec, known)
        lines = {line["rows"]: line for line in kept}
        result = study.result_of(run, root)
        if result is not None and RESTORED not in result:
            rows = study.rows_there(run, root)
            if rows is None:
                print(f"{run.place} is not recorded: the rows that it was made on are gone")
            else:
                lines[rows] = _line(run, result, rows, study.told(run, root, result))
        files.setdefault(study.file_of(run.place), []).extend(lines.values())
    for line in (line for others in recorded.values() for line in others):  # not among these runs
        files.setdefault(line.file, []).append(line.told)
    for name, lines_of_file in files.items():
        path = folder / name
        if lines_of_file or path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines_of_file).encode())


def restore(study: Study[P], every: Sequence[P], root: Path, folder: Path, say: Callable[[str, str], None]) -> None:
    """Results of recorded runs that have none here, by the same specification and on the same rows as those they are compared
    with. `say` is given what a text is about, and the text."""
    runs = [piece for piece in every if piece.is_run]
    recorded = _read(study, runs, folder)
    groups: dict[Source[P], list[P]] = {}
    for run in runs:
        if run.place in recorded:
            groups.setdefault(study.source_of(run), []).append(run)
    restored, changed = 0, 0
    for source in sorted(groups, key=lambda one: not one.alone):  # by the settings the others' specifications are known
        specs = {run: study.spec_of(run, root) for run in groups[source]}
        by_rows: dict[str, dict[P, dict[str, Any]]] = {}
        for run, spec in specs.items():
            lines = _of_today(study, run, spec, recorded[run.place])
            changed += spec is not None and not lines
            for line in lines:
                by_rows.setdefault(line["rows"], {})[run] = line
        here = study.rows_there(groups[source][0], root)
        rows = _rows_to_stand_on(study, source, groups[source], by_rows, here, root)
        for run, line in by_rows.get(rows or "", {}).items():
            if study.result_of(run, root) is None:
                (root / run.place).mkdir(parents=True, exist_ok=True)
                write_whole(root / run.place / RESULT, json.dumps(_result(line, specs[run])).encode())
                restored += 1
        aside = [run for lines in by_rows.values() for run in lines if rows and study.result_of(run, root) is None]
        if aside:
            others = "those made here, by another machine or version" if here else "the other recorded ones"
            text = f"{len(aside)} recorded runs, such as {aside[0].place}, were made on other rows of {source.piece.place} than "
            say(aside[0].place, text + f"{others}: they are set aside and made again")
    if restored:
        print(f"{restored} finished runs are read from {folder}", flush=True)
    if changed:
        say("changed", f"{changed} recorded runs are of another specification than today's and are not used")


def _rows_to_stand_on(
    study: Study[P],
    source: Source[P],
    runs: Sequence[P],
    by_rows: dict[str, dict[P, Any]],
    here: str | None,
    root: Path,
) -> str | None:
    """Which of the recorded runs of a source are used: those on the rows of the finished ones, or on those that are here, or the
    most. Runs that are compared alone need no rows here, if all are recorded."""
    for run in source.alone or runs:
        if (result := study.result_of(run, root)) is not None:
            return result.get(RESTORED, here)
    if here is not None and not source.alone:
        return here
    whole = [rows for rows, lines in by_rows.items() if lines.keys() >= set(source.alone)]
    return max(whole, key=lambda rows: len(by_rows[rows]), default=here)


def go_on(
    study: Study[P],
    every: Sequence[P],
    wanted: Sequence[P],
    root: Path,
    minutes: float,
    make: Callable[[P, Path], Any],
    folder: Path,
) -> int:
    """`pieces.go_on` with what is recorded; it is looked at again when rows were made, which may be others."""
    said: set[str] = set()

    def say(about: str, text: str) -> None:
        if about not in said:
            print(text, flush=True)
        said.add(about)

    def make_and_look(piece: P, root: Path) -> None:
        make(piece, root)
        if not piece.is_run:
            restore(study, every, root, folder, say)

    restore(study, every, root, folder, say)
    return pieces.go_on(wanted, root, minutes, study.result_of, make_and_look)
