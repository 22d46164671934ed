"""An evaluation on the disk: what was asked, every graded answer as it came, every score. Imports no torch.

eval.json       the options that the answers depend on, hashes of problems and model
problems.jsonl  prompt and answer, a line a problem
results.jsonl   one graded answer a line, in the order in which they came
scores.jsonl    one score of a sampled answer a line
summary.json    what they come to
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dqo.data.prompts import Prompt
from dqo.errors import UserError
from dqo.files import write_whole, writing
from dqo.grading.grade import RIGHT

HEADER = "eval.json"
Key = tuple[str, int, int]  # decoding, problem, sample


@dataclass(frozen=True)
class Answer:
    """One graded response. `decoding`: greedy, sampling, or the name of a search."""

    decoding: str
    problem: int  # its place in the file of problems, from 0
    sample: int
    response: str  # without its end token
    completion_ids: list[int]  # with it
    finish_reason: str  # "stop", or "length" where it was cut off
    logprob: float | None  # of the whole response, in the distribution that it was drawn from
    verifier: str
    score: float
    parsed: bool  # whether the verifier could read an answer in it
    answer: str | None  # in the verifier's canonical form
    error: str | None  # of the verifier: "timeout" ...

    @property
    def right(self) -> float:
        """1 where the verifier calls it right, else 0, as accuracies count."""
        return float(self.score > RIGHT)

    @property
    def key(self) -> Key:
        return self.decoding, self.problem, self.sample


@dataclass
class Evaluation:
    """What a directory holds."""

    directory: Path
    name: str
    header: dict[str, Any]
    problems: list[dict[str, Any]]
    answers: dict[Key, Answer]
    scores: dict[str, dict[Key, float]] = field(default_factory=dict)  # by scorer

    def of(self, decoding: str) -> list[list[Answer]]:
        """The answers by one decoding, a list a problem, in the order of the samples."""
        found: list[list[Answer]] = [[] for _ in self.problems]
        for key in sorted(key for key in self.answers if key[0] == decoding):
            found[key[1]].append(self.answers[key])
        return found

    @property
    def decodings(self) -> list[str]:
        return list(dict.fromkeys(key[0] for key in sorted(self.answers, key=lambda key: _ORDER.get(key[0], 2))))


_ORDER = {"greedy": 0, "sampling": 1}


def problems_hash(problems: Iterable[Prompt]) -> str:
    """sha256 of prompts, answers and what the chat template is told, in their order."""
    digest = hashlib.sha256()
    for problem in problems:
        told = [problem.prompt, problem.answer, problem.tools, problem.chat_template_kwargs]
        digest.update(json.dumps(told, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


class Lines:
    """A JSON Lines file that grows by whole lines. What a killed writer left of a last line is cut off; a second writer is refused."""

    def __init__(self, path: Path):
        self.path = path
        self._open()

    def _open(self) -> None:
        path = self.path
        with writing(path):
            self.file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.close()
            raise UserError(f"{path}: another process writes to it; wait for its end, or choose another output_dir") from error
        self.rows = read_lines(path)
        self.file.truncate(_whole(path.read_bytes()))

    def append(self, rows: list[dict]) -> None:
        """Each row is on the disk, whole, when this returns."""
        content = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        with writing(self.path):
            while content:
                content = content[self.file.write(content) :]
            os.fsync(self.file.fileno())
        self.rows += rows

    def replace(self, rows: list[dict]) -> None:
        """Other rows in the place of all; a kill leaves the old or the new ones."""
        write_whole(self.path, b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        self.file.close()
        self._open()

    def close(self) -> None:
        self.file.close()


def _whole(content: bytes) -> int:
    """The length of the lines that have an end."""
    return content.rfind(b"\n") + 1


def read_lines(path: Path) -> list[dict]:
    """The objects of a file that `Lines` wrote, without a half-written last line.

    Raises:
        UserError: for any other line that is none.
    """
    content = path.read_bytes()
    rows = []
    for number, line in enumerate(content[: _whole(content)].split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a line of an evaluation; the file was altered: delete that line")
        rows.append(row)
    return rows


@contextmanager
def opened(directory: Path, name: str, header: dict[str, Any], problems: list[Prompt]) -> Iterator[tuple[Evaluation, Lines, Lines]]:
    """The evaluation in a directory, new or to go on with, and its files of answers and of scores.

    Raises:
        UserError: for a directory of other options, problems or weights, or in use, before anything in it is changed.
    """
    path = directory / HEADER
    if path.exists():
        _check_same(path, header)
    elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"output_dir {directory} is in use and has no {HEADER}; choose another directory")
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    results = Lines(directory / "results.jsonl")
    scores = Lines(directory / "scores.jsonl")
    try:
        told = [asdict(problem) for problem in problems]
        write_whole(directory / "problems.jsonl", b"".join(json.dumps(p, ensure_ascii=False).encode() + b"\n" for p in told))
        write_whole(path, json.dumps({**header, "name": name}, indent=1).encode())
        yield _evaluation(directory, name, header, told, results.rows, scores.rows), results, scores
    finally:
        results.close()
        scores.close()


def _check_same(path: Path, header: dict[str, Any]) -> None:
    then = _read_header(path)
    differences = []
    for part in ("problems", "model"):
        if then.get(part) != header[part]:
            differences.append(f"the {part} are others" if part == "problems" else "the weights of the model are others")
    old, new = then.get("options", {}), json.loads(json.dumps(header["options"]))
    for option in sorted(old.keys() | new.keys()):
        if old.get(option) != new.get(option):
            differences.append(f"{option}: {old.get(option)!r} then, {new.get(option)!r} now")
    if differences:
        raise UserError(
            f"{path.parent} holds another evaluation: {'; '.join(differences)}. Choose another --output_dir, or repeat its options"
        )


def _read_header(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path.parent} is no directory of `dqo eval`: its {HEADER} cannot be read") from error
    if not isinstance(found, dict) or not {"problems", "options"} <= found.keys():
        raise UserError(f"{path} is not what `dqo eval` writes; the file was altered")
    return found


def read_evaluation(directory: str | Path) -> Evaluation:
    """A finished or unfinished evaluation.

    Raises:
        UserError: where `dqo eval` has written none.
    """
    directory = Path(directory)
    header = _read_header(directory / HEADER)
    rows = {name: read_lines(directory / f"{name}.jsonl") for name in ("problems", "results", "scores")}
    return _evaluation(directory, header.get("name") or directory.name, header, *rows.values())


def _evaluation(
    directory: Path, name: str, header: dict, problems: list[dict], results: list[dict], scores: list[dict]
) -> Evaluation:
    try:
        answers = [Answer(**row) for row in results]
    except TypeError as error:
        raise UserError(f"{directory / 'results.jsonl'}: has a line that `dqo eval` did not write: {error}") from error
    found = Evaluation(directory, name, header, problems, {answer.key: answer for answer in answers})
    for row in scores:
        key = (row["decoding"], row["problem"], row["sample"])
        found.scores.setdefault(row["scorer"], {})[key] = row["value"]
    return found
