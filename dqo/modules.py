"""The modules of a folder, of which tables are made: a format or a command is one file, no list names it. Those of users too."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

from dqo.errors import UserError


def modules_in(package: str) -> Iterator[ModuleType]:
    """The modules of a package, by name, each imported; `__main__` and the folders inside are left out."""
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if not found.ispkg and found.name != "__main__":
            yield importlib.import_module(f"{package}.{found.name}")


def import_named(name: str, named: str) -> ModuleType:
    """A module of the user's. `named` says in messages what names it.

    Raises:
        UserError: when Python does not find it, or importing it fails.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever another's file does when it is imported
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise UserError(
                f"{named}: Python finds no module {name}; install its package, or set PYTHONPATH to its folder"
            ) from error
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{named}: importing {name} fails: {type(error).__name__}: {what}") from error
