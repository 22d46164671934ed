"""Options from a YAML file: a flat mapping of names to words, numbers and lists of words. Anything else is refused."""

from __future__ import annotations

import codecs
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from dqo.config.values import Plain, brief
from dqo.errors import UserError
from dqo.files import name_problem

_LONGEST = 100_000  # bytes; PyYAML reads a megabyte in half a minute
_DEEPEST = 4  # a list in a mapping is 2
_BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_TAG = "tag:yaml.org,2002:"


def read_options(path: str) -> dict[str, tuple[Any, str]]:
    """{name: (value, "file:line")} of a file.

    Raises:
        UserError: for a file that cannot be read, is no flat mapping, or names an option twice.
    """
    if (problem := name_problem(path)) is not None:
        raise UserError(f"--config {problem}")
    text = _text(path)
    try:
        _check_depth(path, text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{path}:{line}: not valid YAML: the character {chr(error.character)!r} is not allowed"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else path
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error.problem).split())[:200]}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # escapes beyond Unicode, digits without end
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())[:200]}") from error
    if node is None or node.tag == f"{_TAG}null":
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:{_line(node)}: expected a mapping of options, one `name: value` a line")
    found: dict[str, tuple[Any, str]] = {}
    for key, value in node.value:
        where = f"{path}:{_line(key)}"
        if key.tag == f"{_TAG}merge":
            raise UserError(f"{where}: merges (<<) are not supported; write the options out")
        if not isinstance(key, yaml.ScalarNode) or key.tag != f"{_TAG}str":
            what = brief(key.value) if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
            raise UserError(f"{where}: the name of an option is a word, got {what}")
        if key.value in found:
            raise UserError(f"{where}: {brief(key.value)} is there twice, first at {found[key.value][1]}; remove one")
        found[key.value] = (_value(value, where, key.value), where)
    return found


def _text(path: str) -> str:
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "a device or socket"
            raise UserError(f"{path}: is {kind}; expected a YAML file")
        with open(path, "rb") as file:
            content = file.read(_LONGEST + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > _LONGEST:
        raise UserError(f"{path}: has more than {_LONGEST:,} bytes; expected a YAML file of options")
    encoding = next((name for bom, name in _BOMS.items() if content.startswith(bom)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: not {encoding.upper()} (byte {error.start + 1}); save the file as UTF-8"
        ) from error


def _check_depth(path: str, text: str) -> None:
    """Refuses a deeply nested file before the recursive parser reads it."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            line = event.start_mark.line + 1
            raise UserError(f"{path}:{line}: nested {depth} levels deep; expected `name: value` lines")


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _value(node: yaml.Node, where: str, name: str) -> Any:
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        return [
            _value(item, where, name) if isinstance(item, yaml.ScalarNode) else _refused(item, where, name)
            for item in node.value
        ]
    if not isinstance(node, yaml.ScalarNode):
        return _refused(node, where, name)
    kind, text = node.tag.removeprefix(_TAG), node.value
    if kind == "str":
        return Plain(text) if node.style is None else text
    if kind == "null":
        return None
    if kind == "bool" and text.lower() in yaml.SafeLoader.bool_values:
        return yaml.SafeLoader.bool_values[text.lower()]
    if kind == "int" and re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", text):
        digits = text.replace("_", "")
        return int(digits) if len(digits) < 400 else float(digits)  # refused as too large
    if kind == "float" and (number := re.fullmatch(r"([-+]?)\.(inf|nan)", text, re.I)):
        return float("".join(number.groups()))
    if kind == "float" and re.fullmatch(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[-+]?\d+)?", text, re.I):
        return float(text.replace("_", ""))
    if kind in ("int", "float", "bool", "timestamp", "value", "merge"):  # dates, 1:30, 010: words, and no numbers
        return Plain(text)
    return _refused(node, where, name)


def _refused(node: yaml.Node, where: str, name: str) -> Any:
    is_plain = node.tag in (f"{_TAG}map", f"{_TAG}seq")
    what = (
        {"mapping": "a mapping", "sequence": "a list in a list"}.get(node.id, "a value")
        if is_plain
        else f"the tag {brief(node.tag)}"
    )
    raise UserError(f"{where}: {brief(name)} has {what}; expected a word, a number, or a list of words")
