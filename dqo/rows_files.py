"""Sources of rows: JSON Lines, Parquet, anything iterable. What the rows hold is not looked at here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from dqo.errors import UserError, did_you_mean
from dqo.rows_formats import Record


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row cannot be used."""

    index: int
    source: str
    message: str


def read_records(source: Any) -> tuple[str, list[Record], list[Problem]]:
    """The name of a source, its rows, and the lines that are no rows.

    Raises:
        UserError: when the source cannot be read at all.
    """
    if not isinstance(source, (str, Path)):
        return "rows", *_from_iterable(source)
    path = Path(source)
    if not path.exists():
        siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file.{did_you_mean(path.name, siblings)} Expected a .jsonl or .parquet file")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected a .jsonl or .parquet file")
    if path.suffix == ".parquet":
        return path.name, *_from_parquet(path)
    if path.suffix not in (".jsonl", ".json", ".ndjson"):
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}; expected .jsonl or .parquet")
    return path.name, *read_jsonl(path)


def read_jsonl(path: Path) -> tuple[list[Record], list[Problem]]:
    """Objects of a JSON Lines file, one a line; empty lines are passed over."""
    records, problems = [], []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not content.strip():
        raise UserError(f"{path}: is empty; expected one JSON object a line")
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(progress(lines, f"read {path.name}"), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
        except json.JSONDecodeError as error:
            what = error.msg[0].lower() + error.msg[1:].removesuffix(" starting at")
            problem = f"not valid JSON ({what} at column {error.colno})"
            if number == 1 and line.strip() == b"[":
                problem += "; the file is one JSON array, expected one object a line (JSON Lines)"
            elif number == len(lines) and line.startswith(b"{") and not line.endswith(b"}"):
                problem += "; the last line has no end: its writer was cut off"
        except (ValueError, RecursionError) as error:
            problem = f"not valid JSON ({error})"
        else:
            if isinstance(value, dict):
                records.append(Record(number, where, value))
                continue
            problem = f'is a {_json_type(value)}; expected an object such as {{"prompt": ..., "completion": ...}}'
        problems.append(Problem(number, where, problem))
    return records, problems


def progress(items: Iterable, description: str) -> Iterable:
    """A bar for what turns out to take more than two seconds on a terminal."""
    from tqdm import tqdm  # here, because reading a small file should not wait for it

    return tqdm(items, description, unit="row", delay=2, leave=False, disable=None)


def _from_parquet(path: Path) -> tuple[list[Record], list[Problem]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet files need pyarrow: pip install pyarrow") from error
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from error
    if not rows:
        raise UserError(f"{path}: is empty; expected one response a row")
    return [Record(i, f"{path.name}:{i}", row) for i, row in enumerate(rows, start=1)], []


def _from_iterable(source: Any) -> tuple[list[Record], list[Problem]]:
    if isinstance(source, dict):
        raise UserError(
            f"rows are a dict with the keys {', '.join(map(str, source))}; pass one split, or a list of dicts"
        )
    if not isinstance(source, Iterable):
        raise UserError(f"rows are a {type(source).__name__}; expected a path, a list of dicts or a datasets.Dataset")
    records, problems = [], []
    for i, row in enumerate(source, start=1):
        where = f"row {i}"
        if is_dataclass(row) and not isinstance(row, type):
            row = {f.name: getattr(row, f.name) for f in fields(row)}
            where = row.pop("source", "") or where
        if isinstance(row, dict):
            records.append(Record(i, where, {name: _plain(value) for name, value in row.items()}))
        else:
            problems.append(Problem(i, where, f"is a {type(row).__name__}; expected a dict"))
    if not records and not problems:
        raise UserError("there are no rows")
    return records, problems


def _plain(value: Any) -> Any:
    """Arrays, tensors and their scalars as lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _json_type(value: Any) -> str:
    names = {list: "list", str: "string", bool: "bool", type(None): "null"}
    return names.get(type(value), "number")
