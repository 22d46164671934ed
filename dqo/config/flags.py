"""Flags of a command line, checked before tyro reads them, so that a wrong one is refused with the option that was meant."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
from collections.abc import Iterable
from typing import Annotated, Any

import tyro

from dqo.config.sources import read_options
from dqo.config.values import annotated_types, brief, refuse, suggestion, value_problems
from dqo.errors import UserError
from dqo.files import name_problem
from dqo.objectives import OBJECTIVES


def take_config_files(arguments: list[str]) -> tuple[list[str], dict[str, tuple[Any, str]]]:
    """Splits `--config a.yaml b.yaml` and `--config=a.yaml` off, however often they come; later files win."""
    left, paths, i = [], [], 0
    while i < len(arguments):
        name, equals, path = arguments[i].partition("=")
        i += 1
        if name != "--config":
            left.append(arguments[i - 1])
            continue
        given = [path] if path else []
        while not equals and i < len(arguments) and not arguments[i].startswith("-"):
            given.append(arguments[i])
            i += 1
        if not given:
            raise UserError("--config needs a file")
        paths += given
    values: dict[str, tuple[Any, str]] = {}
    for path in paths:
        values |= read_options(path)
    return left, values


def options_of_methods() -> dict[str, set[str]]:
    return {method: {f.name for f in dataclasses.fields(cls)} for method, cls in OBJECTIVES.items()}


def check_flags(arguments: list[str], known: set[str]) -> None:
    """Refuses unknown flags, and arguments that no option can hold. tyro would do so without the names of other trainers."""
    flag = "an argument"
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_flag = name.startswith("--") and len(name) > 2
        flag = name if is_flag else flag
        held = argument if not is_flag else value if equals else name
        if (problem := name_problem(held)) is not None:
            raise UserError(f"{brief(flag)} {problem}")
        option = name[2:].replace("-", "_")
        if is_flag and option.removeprefix("no_") not in known | {"help"} and not option.startswith("tyro_"):
            nearest = suggestion(option, known, "--", options_of_methods())
            raise UserError(f"unknown option {brief(name)}.{nearest} `--help` lists all")


def plain_switches(arguments: list[str], classes: Iterable[type]) -> list[str]:
    """`--bf16 True` and `--bf16=false`, as other trainers read them, become `--bf16` and `--no_bf16`."""
    switches = {name for cls in classes for name, kind in annotated_types(cls).items() if kind is bool}
    found: list[str] = []
    i = 0
    while i < len(arguments):
        flag, equals, value = arguments[i].partition("=")
        option = flag[2:].replace("-", "_")
        if flag.startswith("--") and option in switches:
            beside = value if equals else "".join(arguments[i + 1 : i + 2])
            if beside.lower() in ("true", "false"):
                found.append(f"--{option}" if beside.lower() == "true" else f"--no_{option}")
                i += 1 if equals else 2
                continue
            if equals:
                raise UserError(f"--{option} is True or False, or stands alone for True, got {brief(value)}")
        found.append(arguments[i])
        i += 1
    return found


def flag_sources(arguments: list[str]) -> dict[str, str]:
    """{option: the flag that gives it}."""
    names = [a[2:].partition("=")[0].replace("-", "_").removeprefix("no_") for a in arguments if a.startswith("--")]
    return {name: f"--{name}" for name in names}


def given_values(parts: Iterable[Any], arguments: list[str]) -> dict[str, Any] | None:
    """{field: value} of what a command line gives, for `parts`: dataclasses, or instances whose values are the defaults.

    Only fields that the flags name get a parser, and those without a default: a parser of all options of a training takes a tenth
    of a second, this one milliseconds. None where help is asked for or a value does not fit; a parser of all then tells the rest.
    """
    if any(argument.startswith(("-h", "--help", "--tyro")) for argument in arguments):
        return None
    named = flag_sources(arguments)
    fields: list[Any] = []
    for part in parts:
        hints = annotated_types(part if isinstance(part, type) else type(part))
        for f in dataclasses.fields(part):
            if isinstance(part, type):
                default = dataclasses.field(default=f.default, default_factory=f.default_factory)
                required = f.default is f.default_factory is dataclasses.MISSING
            else:
                default, required = dataclasses.field(default_factory=functools.partial(getattr, part, f.name)), False
            if required or f.name in named:
                fields.append((f.name, Annotated[hints[f.name], tyro.conf.arg(help="")], default))
    shape = dataclasses.make_dataclass("Flags", fields, kw_only=True)
    unread = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(unread), contextlib.redirect_stderr(unread):
        return dict(vars(tyro.cli(shape, args=arguments, use_underscores=True)))
    return None


def parse_flags(cls: type, arguments: list[str], prog: str) -> Any:
    """A command's dataclass from its flags, each value checked; exits with 2 when tyro finds one of the wrong type."""
    check_flags(arguments, {f.name for f in dataclasses.fields(cls)})
    arguments = plain_switches(arguments, [cls])
    given = given_values([cls], arguments)
    config: Any = cls(**given) if given is not None else tyro.cli(cls, args=arguments, prog=prog, use_underscores=True)
    refuse(value_problems(config) or config.problems(), flag_sources(arguments))
    return config
