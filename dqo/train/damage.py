"""Whether a checkpoint is whole: its state keeps a checksum of every file, and of itself.

The checksum is zlib's crc32, read back after the files are written: tensors are written by safetensors, from memory that is not
one piece. It reads 2.3 GiB/s on a core where sha256 reads 1.4, far above what the disk takes, and finds what disks and cut
copies do to a file. Checkpoints without checksums, which earlier versions wrote, are read too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dqo import peers
from dqo.errors import UserError

STATE_FILE = "dqo_state.json"
_NEEDED = {"identity": dict, "counters": dict, "window": dict}
_COUNTERS = ("step", "num_tokens", "train_seconds", "metrics_position")


class Damaged(UserError):
    """A checkpoint that is not as it was written."""


def checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]))


def crc32_of(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            found = zlib.crc32(piece, found)
    return found


def _own_crc32(state: dict) -> int:
    return zlib.crc32(json.dumps({k: v for k, v in state.items() if k != "crc32"}, sort_keys=True).encode())


def write_state(directory: Path, state: dict) -> None:
    """Writes the state last, when every other file of the checkpoint is there."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != STATE_FILE)
    state = state | {"files": {str(path.relative_to(directory)): crc32_of(path) for path in files}}
    state = json.loads(json.dumps(state))  # numbers as they will be read
    (directory / STATE_FILE).write_text(json.dumps(state | {"crc32": _own_crc32(state)}, indent=1))


def read_state(checkpoint: Path) -> dict:
    """The state of a checkpoint.

    Raises:
        Damaged: with what is damaged of it.
    """
    try:
        with loading(checkpoint):
            content = (checkpoint / STATE_FILE).read_bytes()
        state = json.loads(content)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{checkpoint} is damaged: {STATE_FILE} cannot be read") from error
    if not isinstance(state, dict):
        raise Damaged(f"{checkpoint} is damaged: {STATE_FILE} is no object")
    if ("crc32" in state or "files" in state) and state.get("crc32") != _own_crc32(state):
        raise Damaged(f"{checkpoint} is damaged: {STATE_FILE} was altered")
    return state


def check_whole(checkpoint: Path) -> None:
    """Reads every file of a checkpoint.

    Raises:
        Damaged: with what is damaged.
    """
    state = read_state(checkpoint)
    for name, kind in _NEEDED.items():
        if not isinstance(state.get(name), kind):
            raise Damaged(f"{checkpoint} is damaged: {STATE_FILE} has no {name}")
    for name in _COUNTERS:
        if not isinstance(state["counters"].get(name), (int, float)):
            raise Damaged(f"{checkpoint} is damaged: {STATE_FILE} has no counter {name}")
    with loading(checkpoint):
        for name, expected in state.get("files", {}).items():
            if crc32_of(checkpoint / name) != expected:
                raise Damaged(f"{checkpoint} is damaged: {name} was altered or cut")
        if "files" not in state:
            for path in [checkpoint / "optimizer.safetensors", *checkpoint.rglob("*.safetensors")]:
                with safe_open(path, framework="numpy"):
                    pass


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, "out/checkpoint-5 is gone"; None where it is whole."""
    if not checkpoint.is_dir():
        return f"{checkpoint} is gone"
    try:
        check_whole(checkpoint)
    except Damaged as error:
        return str(error)
    return None


@contextlib.contextmanager
def loading(checkpoint: Path) -> Iterator[None]:
    """What goes wrong inside is the checkpoint's damage."""
    try:
        yield
    except FileNotFoundError as error:
        name = os.path.relpath(error.filename, checkpoint) if error.filename else error
        raise Damaged(f"{checkpoint} is damaged: {name} is missing") from error
    except UserError:
        raise
    except OSError as error:  # nothing of it may be renamed then
        raise UserError(f"{error.filename or checkpoint}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if peers.is_lost(error):  # while shards are read
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise Damaged(f"{checkpoint} is damaged: {what}") from error


def newest_whole(found: list[Path]) -> tuple[Path | None, dict[Path, str]]:
    """The last whole one of `found`, oldest first, and what is damaged of those behind it, {checkpoint: message}."""
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(found):
        try:
            check_whole(checkpoint)
        except Damaged as error:
            damaged[checkpoint] = str(error)
        else:
            return checkpoint, damaged
    return None, damaged


def put_away(path: Path, why: str = "damaged") -> Path:
    """Renames what is damaged, or left behind, so that nothing goes on from it; returns its new name."""
    names: Any = (path.with_name(f"{why}-{path.name}{suffix}") for suffix in ["", *(f"-{i}" for i in range(2, 1000))])
    free = next(name for name in names if not name.exists())
    path.rename(free)
    return free
