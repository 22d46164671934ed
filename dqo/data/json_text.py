"""JSON text whose objects have every key once, where Python's own reader keeps the last of two values; and what it can hold."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from dqo.data.forms import shown


class DoubledKey(ValueError):
    """An object has a key more than once; the text says which, with its values and the cure."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key, count = Counter(name for name, _ in pairs).most_common(1)[0]
        values = ", ".join(shown(value) for name, value in pairs if name == key)
        raise DoubledKey(f"has the key {shown(key)} {count} times in one object, with {values}; keep one")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def decode(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        DoubledKey: when an object, also one inside another, has a key more than once.
        json.JSONDecodeError, RecursionError: for what is not JSON, or too deep.
    """
    return _DECODER.decode(text)


def writable(value: Any) -> bool:
    """Whether JSON in UTF-8 can hold a value: it has no dates and bytes, as Parquet has, no NaN and no half a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        return False
    return True
