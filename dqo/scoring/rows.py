"""The rows that are scored: with all their columns, and with their answers, wherever those lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from dqo.data.chat import written_text
from dqo.data.forms import shown
from dqo.data.json_text import writable
from dqo.data.rows import Row, prompt_key, report, rows_of
from dqo.data.sources import BadRow, read_records
from dqo.errors import UserError
from dqo.grading.grade import RIGHT, Grade

AT_ONCE = 128  # rows whose steps a model rewards together, and that are written before it goes on


@dataclass(frozen=True)
class Measured:
    """What becomes prompt_value and step_rewards of a row."""

    prompt: float | None  # None: the steps are paid, and are no potentials
    steps: list[float]  # of pass rates: that of the end of each step; of the last one that of the state before it
    outcome_last: bool = False  # the last step's becomes the outcome reward, where the response ended


@dataclass
class Scored:
    """A row, and what is written of it."""

    row: Row
    values: dict[str, Any]  # all its columns, those that training does not read too

    @property
    def text(self) -> str:
        return written_text(self.row)

    def cut(self, steps: list[tuple[int, int]]) -> None:
        """Gives the row other steps; rewards of those that it had are no rewards of them."""
        self.row = replace(self.row, steps=steps, step_rewards=None)
        self.values.pop("step_rewards", None)
        self.values["steps"] = steps

    def written(
        self, grade: Grade | None, outcome: str, verifier: str | None, measured: Measured | None
    ) -> dict[str, Any]:
        """The columns with the reward of a grade (None: it stays), and with what was measured of the row's steps."""
        found = dict(self.values)
        if grade is not None:
            found.pop("label", None)
            found["reward"] = grade.score
            told = {"verifier": verifier, "outcome": outcome, "answer": grade.answer, "error": grade.error}
            found["grading"] = {key: value for key, value in told.items() if value is not None}
        if measured is not None:
            steps = measured.steps
            found.pop("prompt_value", None)
            if measured.prompt is not None:
                found["prompt_value"] = measured.prompt
            if measured.outcome_last and steps and self.row.finish_reason != "length":
                steps = [*steps[:-1], float(found["reward"])]
            found["step_rewards"] = steps
        return found

    @property
    def problem(self) -> dict[str, Any]:
        """What the verifier gets beside the completion."""
        return {**self.values, "source": self.row.source}


def read_scored(data: Any) -> tuple[str, list[Scored]]:
    """The name of a source and its rows, with or without rewards; see `dqo.data.rows.read_rows`."""
    name, records, problems = read_records(data)
    rows = rows_of(name, records, problems, scored=False)
    columns = {record.source: record.values for record in records}
    names = [field.name for field in fields(Row) if field.name != "source"]
    found = []
    for row in rows:
        own = {key: value for key in names if (value := getattr(row, key)) is not None}
        if row.reward is not None and row.label == (row.reward > RIGHT):  # training makes it from the reward
            own.pop("label")
        others = {key: value for key, value in columns.get(row.source, {}).items() if key not in names}
        found.append(Scored(row, others | own))  # a row that was made of another form has no other columns
    _check_writable(name, found)
    return name, found


def _check_writable(name: str, rows: list[Scored]) -> None:
    """Refuses columns that the scored file cannot hold, before anything is graded."""
    problems = [
        BadRow(
            index,
            scored.row.source,
            f"column {column!r} is {shown(value)}, which JSON cannot hold; write it as a string, or drop the column",
        )
        for index, scored in enumerate(rows)
        if not writable(scored.values)
        for column, value in scored.values.items()
        if not writable({column: value})
    ]
    if problems:
        raise UserError(report(name, problems, len(rows)))


def fingerprint(rows: Iterable[Scored]) -> str:
    """sha256 of all columns."""
    digest = hashlib.sha256()
    for scored in rows:
        digest.update(json.dumps(scored.values, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def add_answers(rows: list[Scored], path: str) -> None:
    """Gives rows without an answer that of the file, by prompt_id or by prompt.

    Raises:
        UserError: for rows of the file that do not fit, and rows that find no answer there, or another than their own.
    """
    name, known = _read_answers(path)
    problems = []
    for index, scored in enumerate(rows):
        row, values = scored.row, scored.values
        answer = known.get(f"id {row.prompt_id}") if row.prompt_id is not None else None
        answer = known.get(f"prompt {prompt_key(row)}") if answer is None else answer
        own = values.get("answer")
        if answer is None and own is None:
            problems.append(BadRow(index, row.source, f"{name} has no answer for its prompt_id or prompt"))
        elif answer is not None and own not in (None, answer):
            problems.append(
                BadRow(index, row.source, f"answer is {own!r:.60}, and {name} has {answer!r:.60}; drop one of them")
            )
        elif answer is not None:
            values["answer"] = answer
    if problems:
        raise UserError(report("the answers", problems, len(rows)))


def _read_answers(path: str) -> tuple[str, dict[str, str]]:
    """The name of a file of answers, and the answers by "id ..." and "prompt ..."."""
    name, records, problems = read_records(path)
    known: dict[str, str] = {}
    for record in records:
        values = {key: value for key, value in record.values.items() if value is not None}
        answer = values.get("answer")
        keys = [f"id {values['prompt_id']}"] if "prompt_id" in values else []
        if "prompt" in values:
            keys.append(f"prompt {prompt_key(Row(values['prompt'], ''))}")
        if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not keys:
            what = "has no answer (a string)" if keys else "has neither prompt_id nor prompt"
            problems.append(BadRow(record.index, record.source, f"{what}; found {', '.join(map(str, values))}"))
            continue
        for key in keys:
            if known.setdefault(key, str(answer)) != str(answer):
                what = f"answer is {answer!r:.60}, and a line before has {known[key]!r:.60} for the same {key.partition(' ')[0]}"
                problems.append(BadRow(record.index, record.source, what))
    if problems:
        raise UserError(report(name, problems, len(records)))
    return name, known


def check_existing(rows: list[Scored], name: str, column: str, cure: str) -> None:
    """Refuses to write a column that rows have already."""
    having = [scored.row.source for scored in rows if getattr(scored.row, column) is not None]
    if having:
        raise UserError(
            f"{having[0]}: has {column} already, as {len(having):,} of {len(rows):,} rows of {name} have; {cure}"
        )
