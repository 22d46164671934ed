"""Rows of several data sets as one: each is checked by itself and lies in its own table, which a run of it alone shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dqo.data.forms import Record
from dqo.data.joined import JoinedSegments
from dqo.data.named import Named, named_sources
from dqo.data.rows import Row
from dqo.data.sources import BadRow, Source, open_source
from dqo.data.stored import OPTIONAL, StoredRows, column, open_rows
from dqo.errors import UserError


class MixedRows(StoredRows):
    """Rows of several tables, one behind the other.

    Args:
        tables: all rows of each. weights: the share of a run that each of them gets; None: each row counts once.
    """

    def __init__(self, names: Sequence[str], tables: Sequence[StoredRows], weights: Sequence[float] | None):
        super().__init__(JoinedSegments(*(table.segments for table in tables)), sum(table.total for table in tables))
        self.names, self.tables, self.weights = tuple(names), tuple(tables), weights
        self._begins = np.cumsum([0, *(table.total for table in tables[:-1])])

    def _row(self, number: int) -> Row:
        table = int(np.searchsorted(self._begins, number, "right")) - 1
        return self.tables[table]._row(number - int(self._begins[table]))

    @property
    def segment_begins(self) -> np.ndarray:
        return np.concatenate([begin + table.segment_begins for begin, table in zip(self._begins, self.tables)])

    def sources(self) -> np.ndarray:
        rows = np.arange(self.total) if self.chosen is None else self.chosen
        return np.searchsorted(self._begins, rows, "right") - 1


def open_data(source: Any, **options: Any) -> StoredRows:
    """The rows of all data sets that an option names, or of anything else that rows are read from.

    Args:
        source: names as `dqo.data.named` tells them, or what `open_source` takes.
        options: those of `open_rows`.

    Raises:
        UserError: as `open_rows`, and for data sets that do not fit each other.
    """
    named = named_sources(source) if isinstance(source, str) else []
    if len(named) < 2:
        return open_rows(source, **options)
    tables = [open_rows(opened, **options) for opened in _told_apart(named)]
    for name, table in zip(named[1:], tables[1:]):
        _check_alike(named[0].name, tables[0], name.name, table)
    weights = None if named[0].weight is None else [one.weight or 0.0 for one in named]
    return MixedRows([one.name for one in named], tables, weights)


def _told_apart(named: list[Named]) -> list[Source]:
    """The opened data sets, whose rows are named by the name of theirs: by that of the file where it is of one alone."""
    opened = [open_source(one.name) for one in named]
    files = Counter(source.name for source in opened)
    return [
        source if source.path is not None and files[source.name] == 1 else _labelled(source, one.name)
        for source, one in zip(opened, named)
    ]


def _labelled(source: Source, label: str) -> Source:
    def items() -> Iterator[Record | BadRow]:
        return (replace(item, source=f"{label}:{item.index}") for item in source.items())

    return replace(source, name=label, items=items)


def _check_alike(name: str, rows: StoredRows, other_name: str, other: StoredRows) -> None:
    """Refuses what rows of one file cannot differ in either."""
    messages = [not isinstance(table[0].prompt, str) for table in (rows, other)]
    if messages[0] != messages[1]:
        kinds = ["messages" if one else "strings" for one in messages]
        raise UserError(
            f"{other_name}: its prompts are {kinds[1]}, and those of {name} are {kinds[0]}; data sets that are read together "
            "have one kind"
        )
    having = [bool((column(table, "present") >> OPTIONAL.index("logprobs") & 1).any()) for table in (rows, other)]
    if having[0] != having[1]:
        with_them, without = (name, other_name) if having[0] else (other_name, name)
        raise UserError(
            f"{without}: its rows have no logprobs, and those of {with_them} have; give all rows theirs, or leave the column out"
        )


def names_of(rows: Sequence[Row]) -> Sequence[str]:
    """The data sets of rows that are of several; () of one."""
    return rows.names if isinstance(rows, MixedRows) else ()


def sources_of(rows: Sequence[Row]) -> np.ndarray:
    """int64 (n,): the index of each row's data set among `names_of`; 0 where there is one."""
    return rows.sources() if isinstance(rows, MixedRows) else np.zeros(len(rows), np.int64)


def weights_of(rows: Sequence[Row]) -> Sequence[float] | None:
    """The share of a run that each data set gets; None where each row counts once."""
    return rows.weights if isinstance(rows, MixedRows) else None
