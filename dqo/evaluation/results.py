"""An evaluation on the disk: what was asked, every graded answer as it came, every score. Imports no torch.

eval.json       name, verifier, model, and the options that the answers depend on, with hashes of problems and model
problems.jsonl  prompt and answer, a line a problem
results.jsonl   one graded answer a line, in the order in which they came; graded again by another verifier it has a further line
scores.jsonl    one score of a sampled answer a line
summary.json    what they come to
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dqo.data.appending import Appended, appending
from dqo.data.prompts import Prompt
from dqo.errors import UserError
from dqo.files import write_whole
from dqo.grading.grade import RIGHT

HEADER, RESULTS = "eval.json", "results.jsonl"
PROBLEMS_HASH = "hash of the problems"  # among the options that bind
_FLAG = "--output_dir"
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
    verifier_source: str | None = None  # the hash of the file of a user's own

    @property
    def right(self) -> float:
        """1 where the verifier calls it right, else 0, as accuracies count."""
        return float(self.score > RIGHT)

    @property
    def key(self) -> Key:
        return self.decoding, self.problem, self.sample


class Evaluation:
    """What a directory holds."""

    def __init__(
        self, directory: Path, header: dict[str, Any], problems: list[dict], answers: list[Answer], scores: list[dict]
    ):
        self.directory, self.header, self.problems = directory, header, problems
        self.name: str = header["name"]
        self.verifier: str = header["verifier"]
        self.verifier_source: str | None = header.get("verifier_source")
        self.answers: dict[Key, Answer] = {}  # as the verifier of now graded them
        self.of_others: dict[Key, Answer] = {}  # that another has graded, or this one before it was changed
        self.scores: dict[str, dict[Key, float]] = {}  # by scorer
        self.add(answers)
        for row in scores:
            self.scores.setdefault(row["scorer"], {})[row["decoding"], row["problem"], row["sample"]] = row["value"]

    def add(self, answers: Iterable[Answer]) -> None:
        for answer in answers:
            mine = (answer.verifier, answer.verifier_source) == (self.verifier, self.verifier_source)
            (self.answers if mine else self.of_others)[answer.key] = answer
        self.of_others = {key: answer for key, answer in self.of_others.items() if key not in self.answers}

    def of(self, decoding: str) -> list[list[Answer]]:
        """The answers by one decoding, a list a problem, in the order of the samples."""
        found: list[list[Answer]] = [[] for _ in self.problems]
        for key in sorted(key for key in self.answers if key[0] == decoding):
            found[key[1]].append(self.answers[key])
        return found

    @property
    def decodings(self) -> list[str]:
        return sorted({key[0] for key in self.answers}, key=lambda name: (_ORDER.get(name, 2), name))


_ORDER = {"greedy": 0, "sampling": 1}


def problems_hash(problems: Iterable[Prompt]) -> str:
    """sha256 of prompts, answers and what the chat template is told, in their order."""
    digest = hashlib.sha256()
    for problem in problems:
        told = [problem.prompt, problem.answer, problem.tools, problem.chat_template_kwargs]
        digest.update(json.dumps(told, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


@contextmanager
def opened(
    directory: Path, header: dict[str, str | None], options: dict[str, Any], problems: list[Prompt]
) -> Iterator[tuple[Evaluation, Appended, Appended]]:
    """The evaluation in a directory, new or to go on with, and its files of answers and of scores.

    Args:
        header: name, verifier with verifier_source, the hash of its file, and model, its directory or hub name.
        options: all that the answers depend on, with the hashes of problems and of the model.

    Raises:
        UserError: for a directory that was begun under other options, or is in use.
    """
    results, scores = directory / RESULTS, directory / "scores.jsonl"
    if directory.exists() and not results.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"output_dir {directory} is in use and holds no evaluation; choose another directory")
    with appending(results, options, _answer, _FLAG) as answered, appending(scores, options, dict, _FLAG) as scored:
        told = [asdict(problem) for problem in problems]
        _write_lines(directory / "problems.jsonl", told)
        told_of = header | {"options": options}
        write_whole(directory / HEADER, json.dumps(told_of, indent=1).encode())
        yield Evaluation(directory, told_of, told, answered.found, scored.found), answered, scored


def _answer(row: dict) -> Answer:
    return Answer(**row)


def _write_lines(path: Path, rows: list[dict]) -> None:
    write_whole(path, b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))


def read_evaluation(directory: str | Path) -> Evaluation:
    """A finished or unfinished evaluation.

    Raises:
        UserError: where `dqo eval` has written none.
    """
    directory = Path(directory)
    try:
        header = json.loads((directory / HEADER).read_bytes())
        found = Evaluation(
            directory,
            {name: header[name] for name in ("name", "verifier", "model", "options")}
            | {"verifier_source": header.get("verifier_source")},
            read_lines(directory / "problems.jsonl"),
            [_answer(row) for row in read_lines(directory / RESULTS)],
            read_lines(directory / "scores.jsonl"),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory} is no directory of `dqo eval`, or a file of it was altered: {error}") from error
    return found


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON Lines file, without a half-written last one."""
    content = path.read_bytes()
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
