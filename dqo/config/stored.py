"""The options that a run keeps in its config.yaml, read again with the checks of training: files are edited and damaged.

What another version of dqo wrote may have options that are none today; they are named and passed over. Files that the values name
are not looked for: they may have been moved since.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any, Literal

from dqo.config.options import TrainConfig
from dqo.config.sources import read_options
from dqo.config.values import brief, type_hints, typed, value_problems
from dqo.errors import UserError
from dqo.objectives.base import VALUE_KINDS, Objective
from dqo.objectives.registry import DEFAULT_METHOD, OBJECTIVES, objective_class

logger = logging.getLogger(__name__)

_CURE = "write what the run was trained with"


@dataclass(frozen=True)
class _Elsewhere(Objective):
    """Options of a class that is not here, as far as others read them."""

    beta: float | None = None
    gamma: float = 1.0
    discount: Literal["tokens", "turns"] = "tokens"

    def problems(self) -> list[tuple[str, str]]:
        beyond = [] if 0 <= self.gamma <= 1 else [("gamma", f"must be in [0, 1], got {self.gamma}")]
        return super().problems() + beyond


def stored_options_of(path: str) -> dict[str, Any]:
    """{name: value} of a run's config.yaml.

    Raises:
        UserError: that names file, line and option, for a file that cannot be read, a method that is none, and a value that
            training refuses.
    """
    told = read_options(path)
    its_class = _class_of(*told.get("method", (DEFAULT_METHOD, path)))
    parts: list[Any] = [TrainConfig, its_class]
    values: dict[Any, dict[str, Any]] = {part: {} for part in parts}
    for name, (value, where) in told.items():
        part = next((part for part in parts if name in {f.name for f in dataclasses.fields(part)}), None)
        if part is None:
            if its_class is not _Elsewhere and value is not None:
                logger.warning("%s: there is no option %s now; it is passed over", where, brief(name))
            continue
        try:
            values[part][name] = typed(type_hints(part)[name], value)
        except TypeError as error:
            raise UserError(f"{where}: {name} {error}; {_CURE}") from error
    found = {name: value for part in parts for name, value in values[part].items()}
    if found.get("value_model") not in (None, *VALUE_KINDS):  # of other files
        values[its_class]["value_model"] = its_class().value_kind
    made = [part(**values[part]) for part in parts]
    wrong = [problem for config in made for problem in value_problems(config)]
    for name, what in wrong or [problem for config in made for problem in config.problems()]:
        raise UserError(f"{told[name][1] if name in told else path}: {name} {what}; {_CURE}")
    return found


def _class_of(method: Any, where: str) -> type[Objective]:
    """Raises: UserError for what names no method. One of a package that is not here is none of this file's faults."""
    if isinstance(method, str) and ":" in method:
        try:
            return objective_class(str.__str__(method), where)
        except UserError:
            return _Elsewhere
    if not isinstance(method, str) or method not in OBJECTIVES:
        known = ", ".join(OBJECTIVES)
        raise UserError(
            f"{where}: method must be one of {known}, or package.module:Class, got {brief(method)}; {_CURE}"
        )
    return OBJECTIVES[method]
