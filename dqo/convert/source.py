"""What every converter of published data needs: records of a source, checked fields, and the form of its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dqo.data.forms import Record, shown
from dqo.data.rows import Row
from dqo.data.sources import read_records
from dqo.errors import UserError


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
    value = record.values.get(name)
    if not isinstance(value, list) or not value:
        found = "" if name in record.values else f"; found {', '.join(record.values)}"
        raise UserError(f"{record.source}: {name} is {shown(value)}; expected a list{found}")
    return value


def prompt_of(question: str) -> str:
    """A question as the prompt of a model without a chat template: a newline parts it from the response."""
    return f"{question.strip()}\n"
