"""Objectives: one file each, whose name is that of the method; base.py says what an objective is, registry.py finds them."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """OBJECTIVES, {method: class}, and each class by its own name: `from dqo.objectives import DPO`."""
    if name[:1].isupper():  # others are modules, which are looked for here while they are imported
        objectives = importlib.import_module("dqo.objectives.registry").OBJECTIVES
        known = {"OBJECTIVES": objectives} | {cls.__name__: cls for cls in objectives.values()}
        if name in known:
            return known[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
