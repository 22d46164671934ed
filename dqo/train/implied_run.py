"""The finished run of --value_model implied:RUN, read without torch, so that one that will not do is refused at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqo.errors import UserError
from dqo.objectives.base import Objective
from dqo.objectives.registry import objective_class
from dqo.train.saved import find_saved, run_options


@dataclass(frozen=True)
class ImpliedRun:
    path: Path  # of its policy
    beta: float
    reference: str | None  # the hash of its reference's weights; None where nothing tells it
    options: dict[str, Any]


def implied_run(objective: Objective) -> ImpliedRun | None:
    """None where the objective's value model is another.

    Raises:
        UserError: for a directory that holds no finished run, a method whose log-ratio is no advantage, and a discount of 0.
    """
    if objective.implied_from is None:
        return None
    path = Path(objective.implied_from)
    name = f"value_model implied:{path}"
    try:
        saved = find_saved(path)
    except UserError as error:
        raise UserError(f"value_model implied:{error}") from error
    options = run_options(path)
    if not options:
        raise UserError(f"{name} has no config.yaml, which tells beta and reference; name the output_dir of a run")
    method = str(options.get("method", "dqo"))
    if options.get("beta") is None or not fits_rewards(method):
        raise UserError(
            f"{name} is a run of method {method}, which does not fit beta * log(pi/ref) to rewards, so that it implies no "
            "values; name a run of a method that does, such as dqo"
        )
    if not objective.discount_factor > 0:
        raise UserError(f"gamma must be above 0 with {name}: it is divided by")
    return ImpliedRun(path, float(options["beta"]), saved.state.get("identity", {}).get("reference"), options)


def fits_rewards(method: str) -> bool:
    """Whether beta * log(pi/ref) of a method is on the scale of rewards."""
    try:
        return objective_class(method).fits_rewards
    except UserError:  # of a package that is not here
        return True
