"""Reads rows from JSON Lines, Parquet, data sets and iterables. It does not check their fields."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dqo.data.forms import Record
from dqo.data.json_text import DoubledKey, decode
from dqo.data.named import files_in
from dqo.errors import UserError, did_you_mean
from dqo.files import name_problem

logger = logging.getLogger(__name__)

_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")
# how the first bytes of a file show that it holds no lines of JSON, and what to do then
_KINDS = {
    b"\x1f\x8b": "is compressed by gzip: gzip -dc {0} > NEW.jsonl",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: zstd -dc {0} > NEW.jsonl",
    b"BZh": "is compressed by bzip2: bzip2 -dc {0} > NEW.jsonl",
    b"\xfd7zXZ\x00": "is compressed by xz: xz -dc {0} > NEW.jsonl",
    b"PK\x03\x04": "is a zip archive: unzip {0}",
    b"PAR1": "is a Parquet file: name it .parquet",
    b"\xff\xfe": "is UTF-16: iconv -f UTF-16 -t UTF-8 {0} > NEW.jsonl",
    b"\xfe\xff": "is UTF-16: iconv -f UTF-16 -t UTF-8 {0} > NEW.jsonl",
}
_BATCH = 1024  # rows of a Parquet file that are read at once
# org/name, org/name:split or org/name:configuration:split; a revision stands before the first colon, org/name@revision
_HUB_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<config>[\w.-]+)(?=:))?(:(?P<split>[\w.-]+))?"
)


@dataclass(frozen=True, slots=True)
class BadRow:
    """Why a row cannot be used."""

    index: int
    source: str
    message: str


@dataclass(frozen=True)
class Source:
    """Where rows come from. `items` gives them again whenever it is called: rows, and lines that are no rows, in their order."""

    name: str
    items: Callable[[], Iterator[Record | BadRow]]
    path: Path | None = None  # of a file
    stamp: tuple[int, ...] = ()  # of that file when it was opened

    def check_unchanged(self) -> None:
        """Refuses a file that another process has written to since it was opened: it is read more than once."""
        if self.path is not None and stamp_of(self.path) != self.stamp:
            raise UserError(f"{self.path}: changed while it was read; start again when its writer has ended")


def stamp_of(path: Path) -> tuple[int, ...]:
    """What differs when a file is written to, or replaced; () where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_records(source: Any) -> tuple[str, list[Record], list[BadRow]]:
    """The name of a source, its rows, and the lines that are no rows.

    Raises:
        UserError: when the source cannot be read at all.
    """
    opened = open_source(source)
    records: list[Record] = []
    problems: list[BadRow] = []
    for item in opened.items():
        if isinstance(item, Record):
            records.append(item)
        else:
            problems.append(item)
    return opened.name, records, problems


def open_source(source: Any) -> Source:
    """A source that is read a row at a time: no more than a batch of it is in memory.

    Raises:
        UserError: when there is no such source. One that cannot be read is named when it is read.
    """
    if not isinstance(source, (str, Path)):
        return Source("rows", _iterable(source))
    if (problem := name_problem(str(source))) is not None:
        raise UserError(f"the name of a rollout file {problem}")
    path = Path(source)
    if not path.exists():
        if files := files_in(str(source)):
            raise UserError(
                f"{source}: {len(files)} data sets, and one is read here; give them one by one, {files[0]} first"
            )
        in_folder = path.parent.is_dir()  # where it is a misspelt file
        on_hub = _HUB_NAME.fullmatch(source) if isinstance(source, str) else None
        if on_hub is not None and path.suffix not in _SUFFIXES and not in_folder:
            return Source(on_hub.string, _iterable(_from_hub(on_hub.string, **on_hub.groupdict())))
        siblings = [p.name for p in path.parent.glob("*")] if in_folder else []
        raise UserError(f"{path}: no such file.{did_you_mean(path.name, siblings)} Expected a .jsonl or .parquet file")
    if path.is_dir():
        return Source(path.name, _iterable(_from_saved(path)))
    if path.suffix == ".parquet":
        return Source(path.name, partial(_from_parquet, path), path, stamp_of(path))
    _refuse_other_kinds(path)
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}; expected .jsonl or .parquet")
    return Source(path.name, partial(_from_jsonl, path), path, stamp_of(path))


def _refuse_other_kinds(path: Path) -> None:
    """By its first bytes."""
    if not path.is_file():  # what is read once cannot be looked at before
        return
    try:
        with path.open("rb") as file:
            first = file.read(8)
    except OSError:  # told when it is read
        return
    for start, cure in _KINDS.items():
        if first.startswith(start):
            raise UserError(f"{path}: {cure.format(path.name)}")


def _from_jsonl(path: Path) -> Iterator[Record | BadRow]:
    """The objects of a JSON Lines file, one a line. Empty lines are skipped."""
    empty = True
    try:
        with path.open("rb") as file:
            for number, line in enumerate(progress(file, f"read {path.name}"), start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    empty = False
                    yield _of_line(path, number, line)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if empty:
        raise UserError(f"{path}: is empty; expected one JSON object a line")


def _of_line(path: Path, number: int, line: bytes) -> Record | BadRow:
    """`line`: with its end, which only the last of a file may lack."""
    where, ended = f"{path.name}:{number}", line.endswith(b"\n")
    line = line.removesuffix(b"\n")
    try:
        value = decode(line.decode())
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
    except json.JSONDecodeError as error:
        what = error.msg[0].lower() + error.msg[1:].removesuffix(" starting at")
        problem = f"not valid JSON ({what} at column {error.colno})"
        if number == 1 and ended and (line.lstrip().startswith(b"[") or line.strip() == b"{"):
            problem += f"; {_not_lines(path, line)}"
        elif number == 1 and error.msg == "Extra data" and error.doc[: error.pos].endswith("\r"):
            problem += f"; lines end with carriage returns alone: tr '\\r' '\\n' < {path.name} > NEW.jsonl"
        elif not ended and line.startswith(b"{") and not line.endswith(b"}"):
            problem += "; the last line has no end: its writer was cut off"
    except DoubledKey as error:
        problem = str(error)
    except (ValueError, RecursionError) as error:
        problem = f"not valid JSON ({error})"
    else:
        if isinstance(value, dict):
            return Record(number, where, value)
        problem = f'is a {_json_type(value)}; expected an object such as {{"prompt": ..., "completion": ...}}'
        if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
            problem = f"is a list of {len(value):,}; {_not_lines(path, line)}"
    return BadRow(number, where, problem)


def _not_lines(path: Path, line: bytes) -> str:
    """What to do with a file whose first line begins an array, or an object, that is all of the file."""
    expected = "expected one object a line (JSON Lines)"
    if line.lstrip().startswith(b"["):
        return f"the file is one JSON array, {expected}: jq -c '.[]' {path.name} > NEW.jsonl writes that"
    return f"the file is one JSON object, {expected}"


def progress(items: Iterable, description: str) -> Iterable:
    """Shows a progress bar on a terminal when the work takes more than two seconds."""
    from tqdm import tqdm  # here, because reading a small file should not wait for it

    return tqdm(items, description, unit="row", delay=2, leave=False, disable=None)


def _from_parquet(path: Path) -> Iterator[Record | BadRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet files need pyarrow: pip install pyarrow") from error
    index = 0
    try:
        if (name := _doubled_field(pyarrow.parquet.read_schema(path))) is not None:
            raise UserError(f"{path}: has the column {name!r} more than once; keep one")
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    index += 1
                    yield Record(index, f"{path.name}:{index}", _without_nulls(row))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from error
    if not index:
        raise UserError(f"{path}: is empty; expected one response a row")


def _doubled_field(fields: Iterable) -> str | None:
    """The first name that two fields of an Arrow schema, or of one struct inside it, share."""
    names = set()
    for field in fields:
        if field.name in names:
            return field.name
        names.add(field.name)
        kind = field.type
        while hasattr(kind, "value_type"):  # of lists
            kind = kind.value_type
        if hasattr(kind, "names") and (found := _doubled_field(kind)) is not None:
            return found
    return None


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of an Arrow table without the nulls inside its values: a struct has the fields of all rows, and null stands for one
    that the row does not have."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cleaned(inner) for name, inner in value.items() if inner is not None}
        if isinstance(value, list) and any(isinstance(inner, (dict, list)) for inner in value):
            return [cleaned(inner) for inner in value]
        return value

    return {name: cleaned(value) for name, value in row.items()}


def _datasets(needed_by: str):
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{needed_by} needs the package datasets: pip install datasets") from error
    return datasets


def _from_hub(source: str, name: str, revision: str | None, config: str | None, split: str | None) -> Any:
    """A data set of the Hugging Face hub. `source`: how it was called."""
    datasets = _datasets(f"{source}: there is no such file; as the name of a data set on the Hugging Face hub it")
    try:
        found = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:  # of many kinds: no network, no such data set, no rights, several configurations
        what, *more = str(error).splitlines() or [type(error).__name__]
        if what.startswith("Config name is missing"):
            what = f"{' '.join([what, *more[:1]])}. Choose one, as {name}:CONFIGURATION:SPLIT"
        raise UserError(
            f"{source}: there is no such file, and as a data set of the Hugging Face hub it cannot be loaded: {what}"
        ) from error
    return _one_split(found, name if config is None else f"{name}:{config}", split or "", ":")


def _from_saved(path: Path) -> Any:
    """A folder that Dataset.save_to_disk or DatasetDict.save_to_disk wrote."""
    if not (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists():
        raise UserError(
            f"{path}: is a folder; expected a .jsonl or .parquet file, or a folder that Dataset.save_to_disk wrote"
        )
    datasets = _datasets(f"{path}: a saved data set")
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as a saved data set: {error}") from error
    return _one_split(found, str(path), "", "/")


def _one_split(found: Any, name: str, split: str, separator: str) -> Any:
    if not isinstance(found, dict):  # a Dataset; a DatasetDict is a dict of them
        return found
    if split and split not in found:
        raise UserError(f"{name}: has no split {split!r}; it has {', '.join(found)}.{did_you_mean(split, found)}")
    if not split and len(found) > 1 and "train" not in found:
        raise UserError(
            f"{name}: has the splits {', '.join(found)}; choose one, as {name}{separator}{next(iter(found))}"
        )
    split = split or ("train" if "train" in found else next(iter(found)))
    if len(found) > 1:
        logger.warning("%s: split %s of %s", name, split, ", ".join(found))
    return found[split]


def _iterable(source: Any) -> Callable[[], Iterator[Record | BadRow]]:
    if isinstance(source, dict):
        raise UserError(
            f"rows are a dict with the keys {', '.join(map(str, source))}; pass one split, or a list of dicts"
        )
    if not isinstance(source, Iterable):
        raise UserError(f"rows are a {type(source).__name__}; expected a path, a list of dicts or a datasets.Dataset")
    # what can be read once alone is kept
    again = source if isinstance(source, Sequence) or hasattr(source, "features") else list(source)
    return partial(_from_iterable, again)


def _from_iterable(source: Iterable) -> Iterator[Record | BadRow]:
    i, arrow = 0, hasattr(source, "features")  # a datasets.Dataset
    for i, row in enumerate(source, start=1):
        where = f"row {i}"
        if is_dataclass(row) and not isinstance(row, type):
            row = {f.name: getattr(row, f.name) for f in fields(row)}
            where = row.pop("source", "") or where
        if isinstance(row, dict):
            row = {name: _plain(value) for name, value in row.items()}
            yield Record(i, where, _without_nulls(row) if arrow else row)
        else:
            yield BadRow(i, where, f"is a {type(row).__name__}; expected a dict")
    if not i:
        raise UserError("there are no rows")


def _plain(value: Any) -> Any:
    """Arrays, tensors and their scalars as lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _json_type(value: Any) -> str:
    names = {list: "list", str: "string", bool: "bool", type(None): "null"}
    return names.get(type(value), "number")
