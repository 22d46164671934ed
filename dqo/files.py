"""Files that are whole whenever they exist, whatever was killed: written aside, synced to the disk, renamed."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from dqo.errors import UserError

LONGEST_NAME, LONGEST_PART = 4095, 255  # bytes of a path, and of a name between two slashes, on Linux


def name_problem(text: str) -> str | None:
    """Why a file system, or a message, cannot hold this name; None when they can."""
    if not text:
        return "is empty"
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return f"is not valid UTF-8: {ascii(text)[:60]}"
    bad = next((c for c in text if unicodedata.category(c) in ("Cc", "Zl", "Zp")), None)
    if bad is not None:
        return f"has the control character {bad!r} at character {text.index(bad) + 1}"
    longest = max(len(part.encode()) for part in text.split("/"))
    if size > LONGEST_NAME or longest > LONGEST_PART:
        return (
            f"has {size:,} bytes, {longest:,} between two slashes; names have at most {LONGEST_NAME:,} and {LONGEST_PART}: "
            f"{text[:40]} ..."
        )
    return None


def sync(path: Path) -> None:
    """Forces a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Forces a file, or a directory with all that is in it, to the disk."""
    for inner in [*sorted(path.rglob("*")), path]:
        sync(inner)


def aside(path: Path) -> Path:
    """A hidden neighbour that no other process uses, to write to before it is renamed to `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def is_aside(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".partial")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_asides(directory: Path, older_than: float = 0.0, of: str | None = None) -> None:
    """Deletes what killed processes left half-written. In a shared directory `older_than` seconds spare the living, and `of`
    names the one file or directory whose halves are deleted."""
    for path in directory.glob(".*.partial"):
        if of is not None and not re.fullmatch(rf"\.{re.escape(of)}\.[0-9a-f]+\.partial", path.name):
            continue
        with contextlib.suppress(FileNotFoundError):  # its writer renamed it, or a neighbour deleted it, at this moment
            if not older_than or time.time() - path.stat().st_mtime >= older_than:
                _remove(path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever keeps `path` from being written, a full disk for one, becomes a UserError that names it."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and "(os error " not in str(error):  # as libraries written in Rust say it
            raise
        number = re.search(r"\(os error (\d+)\)", str(error))
        what = os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written: {what}. What was there before is whole") from error


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A hidden neighbour of `path`, for a file or a directory. What is there when the block ends is deleted."""
    beside = aside(path)
    try:
        yield beside
    finally:
        with contextlib.suppress(OSError):
            _remove(beside)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write the file or the directory that takes the place of `path`, on the disk, when the block ends. A block that
    writes nothing, as one in a process beside the first, replaces nothing.

    Raises:
        UserError: when it cannot be written; what was there stays.
    """
    with writing(path), temporary(path) as beside, temporary(path) as old:
        yield beside
        if not beside.exists():
            return
        sync_tree(beside)
        if beside.is_dir() and path.exists():  # a directory with files in it cannot be replaced at once
            path.rename(old)
        beside.rename(path)
        sync(path.parent)


def check_room(path: Path, size: float, what: str, cure: str) -> None:
    """Refuses to begin what the disk of `path` has no room for.

    Args:
        size: bytes that will be written. what, cure: for the message, "the checkpoints need" and what to do.
    """
    there = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise UserError(f"{path}: {what} {in_units(size)}, and the disk has {in_units(free)} left; {cure}")


def in_units(size: float) -> str:
    """Bytes as people read them: "3.2 MB", "14 GB"."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def write_whole(path: Path, content: bytes) -> None:
    """Replaces `path` by `content` at once."""
    with replacing(path) as beside:
        beside.write_bytes(content)
