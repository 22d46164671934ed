"""What every converter of published data needs: records of a source, checked fields, and the form of its result."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from dqo.data.forms import Record, form_of, shown
from dqo.data.rows import Row
from dqo.data.sources import read_records
from dqo.errors import UserError

logger = logging.getLogger(__name__)


class Converted(NamedTuple):
    rows: list[Row]
    counts: dict[str, Any]  # what the rows do not say, such as what was left out


def source_records(source: str | Path) -> tuple[str, list[Record]]:
    """Name and records of a .jsonl or .parquet file, a saved data set or one of the Hugging Face hub.

    Raises:
        UserError: for the first line that is no object.
    """
    name, records, problems = read_records(source)
    if problems:
        raise UserError(f"{problems[0].source}: {problems[0].message}")
    return name, records


def text_of(record: Record, name: str) -> str:
    """A field that must be a string with something in it. `name` "question.problem" is the field of a field."""
    value: Any = record.values
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str) or not value.strip():
        found = "" if "." in name or name in record.values else f"; found {', '.join(record.values)}"
        raise UserError(f"{record.source}: {name} is {shown(value)}; expected a string{found}")
    return value


def list_of(record: Record, name: str) -> list:
    """A field that must be a list with something in it."""
    value = record.values.get(name)
    if not isinstance(value, list) or not value:
        found = "" if name in record.values else f"; found {', '.join(record.values)}"
        raise UserError(f"{record.source}: {name} is {shown(value)}; expected a list{found}")
    return value


def prompt_of(question: str) -> str:
    """A question as the prompt of a model without a chat template: a newline parts it from the response."""
    return f"{question.strip()}\n"


def each(record: Record, name: str, count: int) -> list:
    """A column with one value for each response, None where the row has no such column."""
    values = record.values.get(name)
    if values is None:
        return [None] * count
    if not isinstance(values, list) or len(values) != count:
        found = f"has {len(values)} values" if isinstance(values, list) else f"is {shown(values)}"
        raise UserError(f"{record.source}: {name} {found}, and there are {count} responses; expected one for each")
    return values


def refuse_other_form(name: str, records: list[Record], form: str, columns: str) -> None:
    """Refuses records that are not of `form`, one of those that training reads; `columns` are the columns it has."""
    found = {key: None for record in records for key in record.values}
    if form_of(found) != form:
        raise UserError(f"{name}: is not of this format, which has the columns {columns}; found {', '.join(found)}")


def warn_unended(rows: list[Row]) -> None:
    """Counts the responses that did not end, such as a step that a labeller went no further from.

    Their finish_reason is "length" and their reward 0, but nobody knows how they would have ended: `--truncation bootstrap` and
    `drop` do not take that 0 for a verdict.
    """
    cut = sum(row.finish_reason == "length" for row in rows)
    if cut:
        logger.warning(
            "%d of %d responses did not end: their reward of 0 is no verdict; train with --truncation bootstrap or drop",
            cut,
            len(rows),
        )
