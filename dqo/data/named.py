"""The names of data sets in one option: one, or several with commas between them, each with its weight or none of them.

    rollouts.jsonl                        one
    a.jsonl,b.parquet                     several, each row of which counts once
    a.jsonl:0.7,org/name:main:train:0.3   several, of which a run reads these shares

A comma or a colon belongs to a name where a file or folder of that name exists.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dqo.errors import UserError

ROUNDED = 0.01  # by which weights may miss a sum of 1: thirds are written 0.33


class Named(NamedTuple):
    name: str
    weight: float | None = None  # of several weights the sum is 1


def named_sources(text: str) -> list[Named]:
    """The data sets that an option names.

    Raises:
        UserError: for weights that are no shares, and a data set that is named twice.
    """
    pieces = list(_pieces(text))
    if len(pieces) == 1:
        head, weight = _parted(text)
        if _is_number(weight) and os.path.exists(head) and not os.path.exists(text):
            raise UserError(
                f"{text}: weights are of several data sets, such as {head}:0.7,OTHER:0.3; of one give the name alone: {head}"
            )
        return [Named(text)]
    found = []
    for piece in pieces:
        name, weight = (piece, None) if os.path.exists(piece) else _parted(piece)
        if not name:
            raise UserError(f"{text}: has an empty name; give data sets with one comma between two")
        found.append(Named(name, None if weight is None else _weight(text, name, weight)))
    _check_once(text, found)
    return _shares(text, found)


def shown(text: str) -> str:
    """An option's data sets without their directories, for a title."""
    try:
        found = named_sources(text)
    except UserError:  # of a run whose files have gone
        return text
    return ", ".join(Path(named.name).name + ("" if named.weight is None else f":{named.weight:g}") for named in found)


def files_in(text: str) -> list[str]:
    """The files that a text names with commas between them; [] where it is one name, or one of them is not there."""
    names = [piece if os.path.exists(piece) else _parted(piece)[0] for piece in _pieces(text)]
    return names if len(names) > 1 and all(map(os.path.exists, names)) else []


def _pieces(text: str) -> Iterator[str]:
    """What stands between commas, but for commas of names that exist."""
    parts, begin = text.split(","), 0
    while begin < len(parts):
        for end in range(len(parts), begin, -1):
            piece = ",".join(parts[begin:end])
            piece = piece if os.path.exists(piece) else piece.strip()
            name, weight = _parted(piece)
            if end == begin + 1 or os.path.exists(piece) or (_is_number(weight) and os.path.exists(name)):
                break
        yield piece
        begin = end


def _parted(piece: str) -> tuple[str, str | None]:
    """Name and weight, None where what follows the last colon is no number, and belongs to the name."""
    name, colon, weight = piece.rpartition(":")
    if not colon:
        return piece, None
    return (name, weight) if _is_number(weight) or os.path.exists(name) else (piece, None)


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True


def _weight(text: str, name: str, weight: str) -> float:
    value = float(weight) if _is_number(weight) else math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{text}: the weight of {name} is {weight or 'empty'}; expected a share above 0, such as 0.3")
    return value


def _check_once(text: str, found: list[Named]) -> None:
    seen: dict[object, str] = {}
    for name, _ in found:
        there = os.stat(name) if os.path.exists(name) else None
        key = name if there is None else (there.st_dev, there.st_ino)
        if key in seen:
            also = "" if name == seen[key] else f", as {seen[key]} too"
            raise UserError(f"{text}: {name} is named twice{also}; name it once, with all its weight")
        seen[key] = name


def _shares(text: str, found: list[Named]) -> list[Named]:
    weights = [named.weight for named in found if named.weight is not None]
    if not weights:
        return found
    if len(weights) < len(found):
        with_one, without = (next(n.name for n in found if (n.weight is None) is none) for none in (False, True))
        raise UserError(f"{text}: {with_one} has a weight, and {without} has none; give all of them one, or none")
    total = sum(weights)
    divided = [Named(named.name, weight / total) for named, weight in zip(found, weights)]
    if abs(total - 1) > ROUNDED + 1e-9:
        cure = ",".join(f"{name}:{weight:.3g}" for name, weight in divided)
        raise UserError(f"{text}: the weights sum to {total:g}; shares of a run sum to 1, such as {cure}")
    return divided
