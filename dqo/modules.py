"""The modules of a folder, of which tables are made: a format or a command is one file, and no list names it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType


def modules_in(package: str) -> Iterator[ModuleType]:
    """The modules of a package, by name, each imported; `__main__` and the folders inside are left out."""
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if not found.ispkg and found.name != "__main__":
            yield importlib.import_module(f"{package}.{found.name}")
