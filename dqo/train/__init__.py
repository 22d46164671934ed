"""The training loop and all it consists of.

prepare makes a run ready, loop goes step after step, checkpoint keeps it; run is the whole of it: `train(options)`.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """`train`, when it is asked for: it imports torch."""
    if name in ("train", "begin"):
        from dqo.train import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
