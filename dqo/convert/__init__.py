"""Published data sets become rollout files, one file a family of formats.

`convert` reads a source, turns it into rows, and writes them after the checks of training.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """`convert`, when it is asked for: rows are read by it alone."""
    if name in ("convert",):
        from dqo.convert import entry

        return getattr(entry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
