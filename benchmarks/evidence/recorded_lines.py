"""Reads the lines of `benchmarks.evidence.recorded`. The files are merged and edited: a field is looked at before its use."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqo.errors import UserError

NUMBER = (int, float)
Fields = Mapping[str, Any]  # {name: its type or types, or the fields of an object}
FIELDS: Fields = {
    "place": str, "spec": str, "rows": str, "samples": int, "greedy": str, "sampling": str, "failed": (str, type(None)),
    "cpu_seconds": NUMBER, "all_cpu_seconds": NUMBER,
    "made": {"date": str, "commit": str, "device": str, "torch": str},
}  # fmt: skip
CURE = "take the line out, or take the file from git again"
WORDS = {str: "a text", int: "a whole number", NUMBER: "a number", (str, type(None)): "a text or null"}


@dataclass(frozen=True)
class Line:
    file: str  # under the folder of the records
    where: str  # path and number of the line
    told: dict[str, Any]

    def check(self, fields: Fields) -> None:
        """Raises:
        UserError: a field is missing, or is of another type.
        """
        self._check(self.told, fields, "")

    def _check(self, told: Any, fields: Fields, at: str) -> None:
        for name, kind in fields.items():
            if name not in told:
                raise self.refused(at + name, "is missing")
            value, words = told[name], "an object" if isinstance(kind, Mapping) else WORDS[kind]
            right = isinstance(value, dict if isinstance(kind, Mapping) else kind) and not isinstance(value, bool)
            if not right or (isinstance(value, float) and not math.isfinite(value)):
                raise self.refused(at + name, f"must be {words}, got {value!r:.60}")
            if isinstance(kind, Mapping):
                self._check(value, kind, f"{at}{name}.")

    def check_answers(self) -> None:
        """Raises:
        UserError: `greedy` or `sampling` has other characters than it may, or they differ in length.
        """
        samples, greedy, sampling = (self.told[name] for name in ("samples", "greedy", "sampling"))
        if not 1 <= samples <= 9:
            raise self.refused("samples", f"must be from 1 to 9, got {samples}")
        for name, text, most in (("greedy", greedy, 1), ("sampling", sampling, samples)):
            if others := set(text) - set("0123456789"[: most + 1]):
                raise self.refused(name, f"must have a digit from 0 to {most} for each problem, got {min(others)!r}")
        if len(greedy) != len(sampling):
            raise self.refused("sampling", f"has {len(sampling)} problems where greedy has {len(greedy)}")

    def check_counts(self, problems: int, samples: int) -> None:
        """Raises:
        UserError: the line has not as many problems, or samples of each, as its specification.
        """
        if len(self.told["greedy"]) != problems:
            raise self.refused("greedy", f"must have {problems} problems, got {len(self.told['greedy'])}")
        if self.told["samples"] != samples:
            raise self.refused("samples", f"must be {samples}, got {self.told['samples']}")

    def refused(self, field: str, why: str) -> UserError:
        return UserError(f"{self.where}: {field} {why}; {CURE}")


def read_lines(folder: Path, file: str) -> list[Line]:
    """None where there is no file.

    Raises:
        UserError: a line is no recorded run, or has a field that cannot be.
    """
    found, path = [], folder / file
    for number, text in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        where = f"{path}:{number}"
        try:
            told = json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: this is no line of a recorded run ({error}); {CURE}") from None
        if not isinstance(told, dict):
            raise UserError(f"{where}: this is no line of a recorded run, but {told!r:.60}; {CURE}")
        line = Line(file, where, told)
        line.check(FIELDS)
        line.check_answers()
        found.append(line)
    return found
