"""Tables on disk as numbered files of packed arrays, which are mapped and not read: every process shares their pages.

DIRECTORY/segment-000012.safetensors    some thousand rows: arrays, and a header of JSON in the metadata
DIRECTORY/whole.json                    written last: what is known of all rows; without it the table is not finished
DIRECTORY/lock                          held by the process that writes

A segment is whole when it exists, so a killed writer loses the one that it was filling. A table that nothing else shall find lies
in memory while it is small, and then in a temporary file without a name.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from dqo.errors import UserError
from dqo.files import remove_asides, write_whole, writing

logger = logging.getLogger(__name__)

IN_MEMORY = 2**25  # bytes of a table that lies in no directory of its own
MAPPED = 32  # segments that are mapped at the same time: pages of a mapped file count as memory of the process
_WHOLE = "whole.json"
_HEADER, _CHECKSUM = "header", "crc32"
_TYPES: dict[str, Any] = {"U8": np.uint8, "I8": np.int8, "I32": np.int32, "I64": np.int64, "U64": np.uint64}
_TYPES |= {"F32": np.float32, "F64": np.float64, "BOOL": np.bool_}

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Segment:
    """`arrays` may be mapped from a file: they are not written to."""

    arrays: Arrays
    header: dict[str, Any]


class Damaged(Exception):
    """A file is not what was written."""


def mapped(file: IO[bytes], begin: int = 0, end: int | None = None) -> tuple[Arrays, dict[str, str]]:
    """The tensors of a safetensors file, or of one inside a file, as arrays on its pages, and its metadata.

    Raises:
        Damaged: when the file has not the size that its header tells, or has no header.
    """
    try:
        size = (os.fstat(file.fileno()).st_size if end is None else end) - begin
        file.seek(begin)
        length = int.from_bytes(file.read(8), "little")
        told = json.loads(file.read(length)) if length < size else None
        if not isinstance(told, dict):
            raise Damaged("it has no header")
        metadata = told.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise Damaged("it has no metadata")
        if size != 8 + length + max((tensor["data_offsets"][1] for tensor in told.values()), default=0):
            raise Damaged("it is cut off")
        content = np.zeros(0, np.uint8)
        if size > 8 + length:
            content = np.memmap(file, np.uint8, "r", begin + 8 + length, size - 8 - length)
        found = {}
        for name, tensor in told.items():
            first, last = tensor["data_offsets"]
            found[name] = np.asarray(content[first:last]).view(_TYPES[tensor["dtype"]]).reshape(tensor["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged("its header cannot be read") from error
    return found, metadata


def _checksum(arrays: Arrays, header: str) -> str:
    found = zlib.crc32(header.encode("utf-8", "surrogatepass"))
    for name, array in sorted(arrays.items()):
        found = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode("utf-8", "surrogatepass"), found)
        found = zlib.crc32(np.ascontiguousarray(array).data.cast("B") if array.size else b"", found)
    return f"{found:08x}"


class Segments:
    """The segments of one table. `directory`: None, where no other process shall find it."""

    def __init__(self, directory: Path | None):
        self.directory = directory
        self.count = 0
        self._memory: dict[int, Segment] = {}  # of a small table without a directory
        self._file: IO[bytes] | None = None  # of a larger one; it has no name
        self._begins: dict[int, tuple[int, int]] = {}  # where a segment begins and ends in it
        self._mapped: OrderedDict[int, Segment] = OrderedDict()
        self._damaged: set[int | str] = set()  # what was named

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Segment:
        if number in self._memory:
            return self._memory[number]
        if number in self._mapped:
            self._mapped.move_to_end(number)
            return self._mapped[number]
        if not 0 <= number < self.count:
            raise IndexError(number)
        try:
            segment = self._open(number)
        except (Damaged, OSError) as error:
            what = getattr(error, "strerror", None) or error
            raise UserError(
                f"{self._path(number)}: was deleted or altered while it was in use ({what}). The same command makes it again"
            ) from error
        self._mapped[number] = segment
        if len(self._mapped) > MAPPED:
            self._mapped.popitem(last=False)
        return segment

    def __iter__(self) -> Iterator[Segment]:
        return (self[number] for number in range(self.count))

    def column(self, name: str) -> np.ndarray:
        """An array of all segments, in memory."""
        parts = [segment.arrays[name] for segment in self]
        return np.concatenate(parts) if parts else np.zeros(0)

    def find(self, number: int) -> Segment | None:
        """A segment that an earlier writer left; None for one that is not there or is damaged, and must be written (again)."""
        if self.directory is None:
            return None
        try:
            found = self._open(number, check=True)
        except FileNotFoundError:
            return None
        except (Damaged, OSError) as error:
            if number not in self._damaged:  # it is looked for more than once
                logger.warning("%s is damaged (%s) and is written again", self._path(number), error)
            self._damaged.add(number)
            return None
        self.count = max(self.count, number + 1)
        return found

    def put(self, number: int, arrays: Arrays, header: dict[str, Any]) -> None:
        """Writes a segment.

        Raises:
            UserError: when the disk is full.
        """
        self.count = max(self.count, number + 1)
        self._mapped.pop(number, None)
        if self.directory is not None:
            write_whole(self._path(number), _content(arrays, header))
            return
        self._memory[number] = Segment(arrays, header)
        held = sum(array.nbytes for segment in self._memory.values() for array in segment.arrays.values())
        if held <= IN_MEMORY and self._file is None:
            return
        with writing(Path(tempfile.gettempdir())):
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="dqo-rows-")  # noqa: SIM115  # open as long as the table
            for other, segment in self._memory.items():
                begin = self._file.seek(0, os.SEEK_END)
                self._file.write(_content(segment.arrays, segment.header))
                self._begins[other] = begin, self._file.tell()
            self._file.flush()
        self._memory.clear()

    def _open(self, number: int, check: bool = False) -> Segment:
        if self._file is not None:
            arrays, metadata = mapped(self._file, *self._begins[number])
        else:
            with self._path(number).open("rb") as file:
                arrays, metadata = mapped(file)
        header = str(metadata.get(_HEADER))
        if check and _checksum(arrays, header) != metadata.get(_CHECKSUM):
            raise Damaged("its content is not what was written")
        return Segment(arrays, json.loads(header))

    def finish(self, told: dict[str, Any]) -> None:
        """Says that the table has all its segments. `told`: what is known of all rows."""
        if self.directory is not None:
            told = {"segments": self.count, **told}
            write_whole(
                self.directory / _WHOLE, json.dumps({**told, _CHECKSUM: _checksum({}, json.dumps(told))}).encode()
            )

    def whole(self) -> dict[str, Any] | None:
        """What `finish` was told of a table that is there; None where it is not finished, or a segment is damaged."""
        if self.directory is None:
            return None
        if (told := self._told()) is not None and all(self.find(i) is not None for i in range(told["segments"])):
            return told
        self.count = 0
        return None

    def _told(self) -> dict[str, Any] | None:
        """What `finish` wrote; None where it is not there or is damaged."""
        assert self.directory is not None
        path = self.directory / _WHOLE
        try:
            told = json.loads(path.read_bytes())
            if told.pop(_CHECKSUM) == _checksum({}, json.dumps(told)):
                return told
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        if _WHOLE not in self._damaged:  # it is looked for more than once
            logger.warning("%s is damaged and is written again", path)
        self._damaged.add(_WHOLE)
        return None

    def _path(self, number: int) -> Path:
        assert self.directory is not None
        return self.directory / f"segment-{number:06}.safetensors"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While the block runs, other processes that want to write the table wait."""
        if self.directory is None:
            yield
            return
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with writing(self.directory):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    logger.info("another process writes %s; this one waits for it", self.directory)
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            remove_asides(self.directory)
            yield
        finally:
            os.close(descriptor)


def _content(arrays: Arrays, header: dict[str, Any]) -> bytes:
    from safetensors.numpy import save

    text = json.dumps(header)
    metadata = {_HEADER: text, _CHECKSUM: _checksum(arrays, text)}
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata)


def gathered(values: np.ndarray, counts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The lists with the indices `chosen`, in that order, of n lists that are packed in `values`. `counts`: int (n,) the length
    of each."""
    counts = counts.astype(np.int64)
    begins, counts = (counts.cumsum() - counts)[chosen], counts[chosen]
    return values[np.repeat(begins - (counts.cumsum() - counts), counts) + np.arange(counts.sum())]


def table_directory(root: Path | None, kind: str, *depends: Any) -> Path | None:
    """Where a table of rows lies under `root`: its name holds everything that it depends on. None where nothing is kept."""
    if root is None:
        return None
    return root / f"{kind}-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:32]}"


def file_hash(path: Path) -> str:
    """sha256 of a file.

    Raises:
        UserError: when it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()
