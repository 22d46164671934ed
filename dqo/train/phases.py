"""The phases of a run, on its steps: which models are trained when. What an objective may ask for is objectives.base.Phase."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import NamedTuple

from dqo.errors import UserError
from dqo.objectives.base import MODELS, Objective, Phase

logger = logging.getLogger(__name__)


class Stretch(NamedTuple):
    """The steps from `begin` (0-based) on, until the next stretch begins."""

    begin: int
    phase: Phase


def as_steps(value: float, total: int) -> int:
    """A number of steps; below 1 a share of all of them (transformers' convention)."""
    return math.ceil(value * total - 1e-9) if 0 < value < 1 else int(value)  # 0.07 * 100 is a little more than 7


def _without_critic(phases: Sequence[Phase]) -> list[Phase]:
    """The phases of a run whose value model is frozen: those that train something else, without it."""
    kept = [(phase, tuple(name for name in phase.trains if name != "critic")) for phase in phases]
    return [dataclasses.replace(phase, trains=trains) for phase, trains in kept if trains]


def check_phases(objective: Objective, value_warmup: float, frozen: bool = False) -> None:
    """Refuses phases that the trainer cannot run. `frozen`: whether the value model is.

    Raises:
        UserError: that names the phase.
    """
    models = MODELS if objective.needs_values else ("policy",)
    phases = objective.phases(value_warmup)
    if not isinstance(phases, tuple | list) or not all(isinstance(phase, Phase) for phase in phases):
        raise UserError(f"the phases of {type(objective).__name__} are no tuple of Phase (dqo.objectives.base)")
    if not phases or phases[-1].steps is not None:
        raise UserError(
            f"the phases of {type(objective).__name__} come to an end; the last must have no number of steps"
        )
    names = [phase.name for phase in phases]
    for i, phase in enumerate(phases):
        name = f"phase {phase.name!r} of {type(objective).__name__}"
        if not isinstance(phase.name, str) or phase.name in names[:i]:  # a run that goes on finds its phases by name
            raise UserError(f"{name}: expected a string for its name, and another for each phase")
        for field in ("trains", "refreshes"):
            if not isinstance(getattr(phase, field), tuple | list):
                raise UserError(f'{name}: {field} is {getattr(phase, field)!r}; expected a tuple, such as ("critic",)')
        _check_refreshes(objective, phase, name)
        _check_part(phase, name)
        if not set(phase.trains) & set(models) or not set(phase.trains) <= set(MODELS):
            raise UserError(f"{name} trains {', '.join(phase.trains) or 'nothing'}; there is {' and '.join(models)}")
        if phase.steps is None and i + 1 < len(phases):
            raise UserError(f"{name} has no number of steps, so that phase {phases[i + 1].name!r} would never begin")
        steps = phase.steps
        number = isinstance(steps, Real) and not isinstance(steps, bool) and 0 <= steps < math.inf
        if steps is not None and not (number and (steps < 1 or steps == int(steps))):
            raise UserError(f"{name} has {steps!r} steps; expected a whole number of at least 0, or a share below 1")
    if frozen and not _without_critic(phases[-1:]):
        raise UserError(
            f"phase {names[-1]!r} of {type(objective).__name__} trains the value model alone, which is frozen"
        )


def _check_refreshes(objective: Objective, phase: Phase, name: str) -> None:
    if not phase.refreshes:
        return
    if set(phase.refreshes) != {"reference"}:
        raise UserError(f"{name} refreshes {', '.join(map(str, phase.refreshes))}; what can be refreshed is reference")
    if not objective.needs_reference:
        raise UserError(f"{name} refreshes the reference, which the method does not read")
    if objective.needs_kl:
        raise UserError(
            f"{name} refreshes the reference, whose logits the exact KL reads all the time: use one of the two"
        )


def _check_part(phase: Phase, name: str) -> None:
    ends = phase.part
    numbers = isinstance(ends, tuple | list) and all(isinstance(x, Real) and not isinstance(x, bool) for x in ends)
    if not (numbers and len(ends) == 2 and 0 <= ends[0] < ends[1] <= 1):
        raise UserError(f"{name} trains on the part {ends!r}; expected two shares, such as (0, 0.5) for the first half")


def stretches(
    objective: Objective, value_warmup: float, total: int, then: dict[str, int] | None = None, frozen: bool = False
) -> list[Stretch]:
    """The phases of `total` steps that have a step, each with its first; warns where the policy is trained in none.

    Args:
        then: {name: first step} of the same phases in the checkpoint that the run goes on from.
        frozen: whether the value model is: phases that train it alone are left out.

    Raises:
        UserError: where these have other names than now.
    """
    found, begin, whole, share = [], 0, 0, 0.0
    planned: Sequence[Phase] = objective.phases(value_warmup)
    if frozen:
        planned = _without_critic(planned)
    for phase in planned:
        if phase.steps is not None and 0 < phase.steps < 1:
            share += phase.steps  # rounded together, so that phases of one share are of like lengths
        else:
            whole += int(phase.steps or 0)
        end = total if phase.steps is None else whole + as_steps(share, total)
        if end > begin:
            found.append(Stretch(begin, phase))
        begin = max(begin, end)
    if then:
        kept = [Stretch(then[phase.name], phase) for phase in planned if phase.name in then]
        new = [s.phase.name for s in found if s.begin < total and s.phase.name not in then]
        if new or [s.phase.name for s in kept] != sorted(then, key=then.__getitem__):
            raise UserError(
                f"the phases of {type(objective).__name__} were {', '.join(then)} in the checkpoint and are "
                f"{', '.join(phase.name for phase in planned)} now; put them back, or choose another --output_dir"
            )
        found = kept
    found = [stretch for stretch in found if stretch.begin < total]
    if not any("policy" in stretch.phase.trains for stretch in found):
        first = found[0].phase
        logger.warning(
            "%s is %d of %d steps: they train the value model alone, and the policy stays as it is",
            first.name,
            as_steps(first.steps or total, total),
            total,
        )
    return found


def last_begin(at: Sequence[Stretch], model: str, steps: int) -> int:
    """The first step (0-based) of the last stretch, where it trains the model; `steps`, those of the run, where it does not."""
    return at[-1].begin if model in at[-1].phase.trains else steps


def trained(at: Iterable[Stretch], step: int) -> tuple[str, ...]:
    """The models that are trained in a step (0-based)."""
    return [stretch.phase.trains for stretch in at if stretch.begin <= step][-1]
