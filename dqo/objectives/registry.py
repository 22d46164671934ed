"""Methods by name: the modules of this folder, and classes of others as `package.module:Class`."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import pkgutil
import sys
import types
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import dqo.objectives
from dqo.errors import UserError, did_you_mean
from dqo.files import name_problem
from dqo.modules import import_named
from dqo.objectives.base import UNITS, Objective

DEFAULT_METHOD = "dqo"
_HELPERS = {"base", "groups", "registry", "sums", "value_options", "value_outputs"}  # modules without an objective
_PLAIN = (bool, int, float, str, type(None))


def _objective_of(module: types.ModuleType) -> type[Objective]:
    """The one objective that the module defines."""
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module.__name__
    )
    return found


def _scan() -> dict[str, type[Objective]]:
    names = sorted(module.name for module in pkgutil.iter_modules(dqo.objectives.__path__))
    return {
        name: _objective_of(importlib.import_module(f"dqo.objectives.{name}")) for name in names if name not in _HELPERS
    }


OBJECTIVES: dict[str, type[Objective]] = _scan()


def method_of(cls: type) -> str:
    """The name under which `objective_class` finds a class.

    Raises:
        UserError: for a class that cannot be found again, as a resumed run must.
    """
    for name, known in OBJECTIVES.items():
        if cls is known:
            return name
    if "<locals>" in cls.__qualname__:
        raise UserError(
            f"method {cls.__qualname__} is defined within a function; define it at the top level of a module, where a run that "
            "goes on finds it again"
        )
    return f"{cls.__module__}:{cls.__qualname__}"


def objective_class(method: str, source: str = "", taken: Collection[str] = ()) -> type[Objective]:
    """The class of a method: `dqo`, or `package.module:Class` for one that lies elsewhere on Python's path.

    Args:
        source: where the name comes from, for messages.
        taken: names that no option of a method may have.

    Raises:
        UserError: for a name that is none, a module that cannot be imported, or a class that is no objective.
    """
    where = f" (from {source})" if source else ""
    if (problem := name_problem(method)) is not None:
        raise UserError(f"method {problem}{where}")
    if method in OBJECTIVES:
        return OBJECTIVES[method]
    module_name, _, class_name = method.partition(":")
    if not all(part.isidentifier() for name in (module_name, class_name) for part in name.split(".")):
        raise UserError(
            f"method must be one of {', '.join(OBJECTIVES)}, or package.module:Class, got {method!r}{where}."
            f"{did_you_mean(method, OBJECTIVES)}"
        )
    named = f"method {method}{where}"
    module = import_named(module_name, named)
    found: Any = module
    for part in class_name.split("."):
        found = getattr(found, part, None)
    if found is None:
        known = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise UserError(
            f"{named}: the module {module_name} has no class {class_name}.{did_you_mean(class_name, known)}"
        )
    for problem in _problems(found, taken):
        raise UserError(f"{named}: {class_name} {problem}")
    return found


def source_of(cls: type[Objective]) -> str | None:
    """sha256 of the file of a class of another package; None for those of this one, which have a version,
    and where there is no file."""
    if cls in OBJECTIVES.values():
        return None
    try:
        return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None


def _problems(cls: Any, taken: Collection[str]) -> Iterator[str]:
    """What keeps a class from being an objective with options, in one line."""
    if not (isinstance(cls, type) and issubclass(cls, Objective)):
        yield "is not an Objective: make it a subclass of dqo.objectives.base.Objective"
        return
    if cls.__call__ is Objective.__call__:
        yield "has no __call__(stats, rows, cu_seqlens), which computes the loss"
    if cls.unit not in UNITS:
        yield f"has the unit {cls.unit!r}; it is one of {', '.join(UNITS)}"
    try:
        hints = get_type_hints(cls)
    except Exception as error:
        yield f"has a type that cannot be read: {' '.join(str(error).split())[:200]}"
        return
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in inspect.get_annotations(cls):
        if name not in fields and get_origin(hints[name]) is not ClassVar and hints[name] is not ClassVar:
            yield f"has {name}, which is no field: put @dataclass(frozen=True) above the class"
    for name, its_field in fields.items():
        if its_field.default is dataclasses.MISSING and its_field.default_factory is dataclasses.MISSING:
            yield f"has the field {name} without a default"
        if name in taken:
            yield f"has the field {name}, which is an option of training too; name it otherwise"
        if hasattr(Objective, name):
            yield f"has the field {name}, which every objective answers itself; name it otherwise"
        if not its_field.init:
            yield f"has the field {name} with init=False, which no option could set; make it a ClassVar"
        if not _is_option(hints[name]):
            yield (
                f"has the field {name} of a type that no option has: use bool, int, float, str, Literal[...], one of them or "
                "None, or tuple[str, ...]"
            )


def _is_option(hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return all(isinstance(word, str) for word in get_args(hint))
    if origin is tuple:
        return get_args(hint) == (str, ...)
    if origin in (Union, types.UnionType):
        return all(map(_is_option, get_args(hint)))
    return hint in _PLAIN


def summary(cls: type[Objective]) -> str:
    """The first sentence of the class's docstring, or of its module's."""
    own = cls.__doc__ or ""
    text = own if own and not own.startswith(f"{cls.__name__}(") else inspect.getdoc(sys.modules[cls.__module__]) or ""
    return " ".join(text.split("\n\n")[0].split())


def methods_help() -> str:
    """What `--help` says of the option method."""
    return (
        "The objective to train with: one of these, or package.module:Class for one of your own. `--method NAME --help` shows "
        f"the options that it adds.\n\n{methods_table()}"
    )


def methods_table() -> str:
    """A line for each method: its name, and what it is."""
    return "\n".join(f"{name}: {summary(cls)}" for name, cls in OBJECTIVES.items())
