"""Checked rows as packed arrays: a row becomes a `Row` when it is read, and what is asked of all rows together are columns.

A large file is checked once: its rows lie in a table under the hash of its content, which every process maps
(dqo.data.segments). Rows of small files, and of Python objects, lie in memory.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import marshal
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np

from dqo.data.joined import Joined, JoinedSegments
from dqo.data.rows import Row, checked_rows, completion_key, prompt_key, refuse
from dqo.data.segments import Arrays, Segments, file_hash, gathered, table_directory
from dqo.data.sources import BadRow, Source, open_source

logger = logging.getLogger(__name__)
Some = TypeVar("Some", bound="StoredRows")

FORMAT = 2  # of a segment, and of what the checks make of a row
ROWS = 2048  # of a segment; the last has fewer. So many are tokenised together, which takes 100 bytes a token meanwhile
SHARED_FROM = 2**23  # bytes of a file whose rows are kept for other processes and runs
FINISHES = (None, "stop", "length")
OPTIONAL = ("prompt_value", "completion_ids", "logprobs", "answer", "prompt_id", "sampling", "grading")
_FIELDS = tuple(f.name for f in fields(Row))
_values = attrgetter(*_FIELDS)


class _NotShared(Exception):
    """A row has values that only this process can keep."""


def hashes(texts: Sequence[str | bytes]) -> np.ndarray:
    """uint64 (n,): equal texts have equal numbers, and two of a million different ones with a probability of 3e-8."""
    found = (hashlib.blake2b(t if isinstance(t, bytes) else t.encode(), digest_size=8).digest() for t in texts)
    return np.frombuffer(b"".join(found), np.uint64)


def _prompts(rows: Sequence[Row]) -> list[str]:
    """Keys of prompts; rows of one prompt stand together."""
    keys: list[str] = []
    for i, row in enumerate(rows):
        before = rows[i - 1] if i else None
        same = before is not None and isinstance(row.prompt, str) and row.prompt == before.prompt
        keys.append(keys[-1] if same else prompt_key(row))
    return keys


def _count(values: list | None) -> int:
    return -1 if values is None else len(values)


_COLUMNS: dict[str, Callable[[Sequence[Row]], np.ndarray]] = {
    "reward": lambda rows: np.array([np.nan if row.reward is None else row.reward for row in rows], np.float64),
    "label": lambda rows: np.array([bool(row.label) for row in rows], np.bool_),
    "prompt": lambda rows: hashes(_prompts(rows)),
    "same": lambda rows: hashes([f"{key}\n{completion_key(row)}" for key, row in zip(_prompts(rows), rows)]),
    "finish_reason": lambda rows: np.array([FINISHES.index(row.finish_reason) for row in rows], np.int8),
    "turns": lambda rows: np.array([row.turns for row in rows], np.int32),
    "steps": lambda rows: np.array([_count(row.steps) for row in rows], np.int32),
    "paid": lambda rows: np.array([_count(row.process_rewards) for row in rows], np.int32),
    "turns_paid": lambda rows: np.array([row.turn_rewards is not None for row in rows], np.bool_),
    "prompt_value": lambda rows: np.array(
        [np.nan if row.prompt_value is None else row.prompt_value for row in rows], np.float64
    ),
    "present": lambda rows: np.array(
        [sum((getattr(row, name) is not None) << bit for bit, name in enumerate(OPTIONAL)) for row in rows], np.uint8
    ),
}
"""What is known of each row, arrays (n,): reward (NaN: none), label, prompt and same (hashes of the prompt, and of prompt and
completion), finish_reason (index in FINISHES), turns, steps and paid (numbers of spans, and of rewards of steps or turns; -1: the
row has none), turns_paid, prompt_value (NaN: none), present (a bit for each of OPTIONAL)."""


class Moved(NamedTuple):
    """Fields of rows that are those of other rows."""

    rows: np.ndarray  # int64 (n,) of the table
    names: tuple[str, ...]


class StoredRows(Sequence[Row]):
    """Rows of a table, all or some of them, in any order.

    `total`: rows of the table. `chosen`: int64 (n,) the rows of the table; None: all of them. `moved`: where reward and label, or
    what is paid, come from other rows.
    """

    chosen: np.ndarray | None = None
    moved: Moved | None = None

    def __init__(self, segments: Segments | JoinedSegments, total: int):
        self.segments, self.total = segments, total

    def __len__(self) -> int:
        return self.total if self.chosen is None else len(self.chosen)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        row = self._row(i if self.chosen is None else int(self.chosen[i]))
        if self.moved is None:
            return row
        other = self._row(int(self.moved.rows[i]))
        return replace(row, **{name: getattr(other, name) for name in self.moved.names})

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def _row(self, number: int) -> Row:
        segment = self.segments[number // ROWS].arrays
        place, ends = number % ROWS, segment["ends"]
        content = segment["content"][ends[place - 1] if place else 0 : ends[place]].tobytes()
        own = self.segments.directory is None and content[:1] == b"p"
        return Row(*(pickle.loads(content[1:]) if own else marshal.loads(content[1:])))

    @property
    def segment_begins(self) -> np.ndarray:
        """int64: the row of the table with which each segment begins."""
        return ROWS * np.arange(len(self.segments))

    @property
    def root(self) -> Path | None:
        """Where tables of these rows are kept; None: nowhere."""
        return None if self.segments.directory is None else self.segments.directory.parent

    def take(self: Some, indices: np.ndarray) -> Some:
        """Some of the rows. `indices`: integers, or bool (n,)."""
        indices = np.flatnonzero(indices) if indices.dtype == bool else indices
        made = copy.copy(self)
        made.chosen = indices if self.chosen is None else self.chosen[indices]
        made.moved = None if self.moved is None else self.moved._replace(rows=self.moved.rows[indices])
        return made

    def with_moved(self: Some, source: np.ndarray, names: tuple[str, ...]) -> Some:
        """The rows with these fields of others: those of row source[i] in row i."""
        made = copy.copy(self)
        made.moved = Moved(source if self.chosen is None else self.chosen[source], names)
        return made

    def column(self, name: str) -> np.ndarray:
        """(n,), see `_COLUMNS`."""
        found = self.segments.column(name)
        chosen = self._origin(name)
        return found if chosen is None else found[chosen]

    def _origin(self, name: str) -> np.ndarray | None:
        """The rows of the table that have a column's values."""
        if self.moved is None:
            return self.chosen
        moves = name in self.moved.names or (name == "paid" and "step_rewards" in self.moved.names)
        return self.moved.rows if moves else self.chosen

    def process_rewards(self) -> np.ndarray:
        """float64: those of all rows, one behind the other; `column("paid")` has their numbers."""
        found, chosen = self.segments.column("process_rewards"), self._origin("paid")
        return found if chosen is None else gathered(found, np.maximum(self.segments.column("paid"), 0), chosen)


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    """(n,) of any rows; see `_COLUMNS`."""
    if isinstance(rows, Joined):
        return np.concatenate([column(part, name) for part in rows.parts])
    return rows.column(name) if isinstance(rows, StoredRows) else _COLUMNS[name](rows)


def process_rewards(rows: Sequence[Row]) -> np.ndarray:
    """float64: the rewards of steps or turns of any rows, one behind the other."""
    if isinstance(rows, Joined):
        return np.concatenate([process_rewards(part) for part in rows.parts])
    if isinstance(rows, StoredRows):
        return rows.process_rewards()
    return np.array([reward for row in rows for reward in row.process_rewards or ()], np.float64)


def paid_by_turns(rows: Sequence[Row]) -> np.ndarray:
    """bool: which of `process_rewards` are of turns."""
    return np.repeat(column(rows, "turns_paid"), np.maximum(column(rows, "paid"), 0))


def take(rows: Sequence[Row], indices: np.ndarray) -> Sequence[Row]:
    """Some of the rows; a list of a list. `indices`: integers, or bool (n,)."""
    if isinstance(rows, StoredRows):
        return rows.take(indices)
    return [rows[i] for i in (np.flatnonzero(indices) if indices.dtype == bool else indices).tolist()]


def several(key: np.ndarray, values: np.ndarray) -> tuple[int, int]:
    """How many distinct keys there are, and how many of them have different values."""
    if not len(key):
        return 0, 0
    order = np.argsort(key, kind="stable")
    key, values = key[order], values[order]
    begins = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    differ = np.minimum.reduceat(values, begins) != np.maximum.reduceat(values, begins)
    return len(begins), int(differ.sum())


def open_rows(
    source: Any, *, skip_bad_rows: bool = False, reward_threshold: float = 0.5, root: Path | None = None
) -> StoredRows:
    """Reads and checks rows as `read_rows` does, a batch at a time.

    Args:
        source: what `open_source` takes, or gives.
        root: the rows of a large file are kept there, and are not checked again where they are; None keeps nothing.

    Raises:
        UserError: as `read_rows`.
    """
    opened, directory = source if isinstance(source, Source) else open_source(source), None
    if root is not None and opened.path is not None and opened.path.stat().st_size >= SHARED_FROM:
        depends = [FORMAT, sys.version_info[:2], file_hash(opened.path), opened.name, reward_threshold, skip_bad_rows]
        directory = table_directory(root, "rows", *depends)
    try:
        return _opened(opened, Segments(directory), skip_bad_rows, reward_threshold)
    except _NotShared:
        return _opened(opened, Segments(None), skip_bad_rows, reward_threshold)


def stored(rows: Sequence[Row]) -> StoredRows:
    """Rows of any sequence as a table of their own."""
    if isinstance(rows, StoredRows):
        return rows
    segments = Segments(None)
    for number, begin in enumerate(range(0, len(rows), ROWS)):
        segments.put(number, _arrays(rows[begin : begin + ROWS], shared=False), {})
    return StoredRows(segments, len(rows))


def _opened(source: Source, segments: Segments, skip_bad_rows: bool, reward_threshold: float) -> StoredRows:
    told = segments.whole()
    if told is None:
        with segments.alone():
            told = segments.whole()  # another process may have written it meanwhile
            if told is None:
                return StoredRows(segments, _write(source, segments, skip_bad_rows, reward_threshold))
    for level, text in told["said"]:
        logger.log(level, text)
    return StoredRows(segments, told["rows"])


def _write(source: Source, segments: Segments, skip_bad_rows: bool, reward_threshold: float) -> int:
    """Returns the number of rows."""
    said: list[tuple[int, str]] = []
    problems: list[BadRow] = []
    pending: list[Row] = []
    count = 0

    def say(level: int, text: str) -> None:
        said.append((level, text))
        logger.log(level, text)

    for item in checked_rows(source, reward_threshold, True, say):
        if isinstance(item, BadRow):
            problems.append(item)
            continue
        pending.append(item)
        if len(pending) == ROWS:
            segments.put(count // ROWS, _arrays(pending, segments.directory is not None), {})
            count, pending = count + ROWS, []
    refuse(source.name, problems, count + len(pending), skip_bad_rows, True, say)
    if pending:
        segments.put(count // ROWS, _arrays(pending, segments.directory is not None), {})
    segments.finish({"rows": count + len(pending), "said": said})
    return count + len(pending)


def _arrays(rows: Sequence[Row], shared: bool) -> Arrays:
    contents = [_packed(row, shared) for row in rows]
    arrays = {name: made(rows) for name, made in _COLUMNS.items()}
    return arrays | {
        "content": np.frombuffer(b"".join(contents), np.uint8),
        "ends": np.cumsum([len(content) for content in contents], dtype=np.int64),
        "process_rewards": process_rewards(rows),
    }


def _packed(row: Row, shared: bool) -> bytes:
    try:
        return b"m" + marshal.dumps(_values(row))
    except ValueError:  # dates of Parquet, and objects of Python
        if shared:  # whoever reads a file of another would run what is in a pickle
            raise _NotShared from None
        return b"p" + pickle.dumps(_values(row))
