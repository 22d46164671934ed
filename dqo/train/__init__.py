"""The training loop and all it consists of.

prepare makes a run ready; loop runs step after step; checkpoint keeps it. `train(options)` is the whole of it.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """`train`, when it is asked for: it imports torch."""
    if name in ("train", "begin"):
        from dqo.train import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
