"""Several sequences that are read as one, none of them copied: rows that were split, episodes that were placed apart, tables of
several files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TypeVar, overload

import numpy as np

from dqo.data.segments import Segment, Segments

T = TypeVar("T", covariant=True)


class Joined(Sequence[T]):
    """The members of several sequences, one behind the other."""

    def __init__(self, *parts: Sequence[T]):
        self.parts = [part for part in parts if len(part)]
        self._ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.parts else 0

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> list[T]: ...
    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        number = int(np.searchsorted(self._ends, i, "right"))
        part = self.parts[number]
        return part[i - int(self._ends[number]) + len(part)]

    def __iter__(self) -> Iterator[T]:
        return chain.from_iterable(self.parts)


def parts_of(members: Sequence[T]) -> list[Sequence[T]]:
    """The sequences that were joined, none of them empty; one that is no `Joined` is its only part."""
    return members.parts if isinstance(members, Joined) else [members] if len(members) else []


class JoinedSegments(Joined[Segment]):
    """The segments of several tables, one table behind the other."""

    directory = None  # each table has its own

    def __init__(self, *tables: Segments | JoinedSegments):
        super().__init__(*tables)  # type: ignore[arg-type]  # they are sequences but for slices
        self.tables = tables

    def column(self, name: str) -> np.ndarray:
        """An array of all segments, in memory."""
        return np.concatenate([table.column(name) for table in self.tables])
