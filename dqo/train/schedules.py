"""Learning-rate schedules: three of this trainer, and those of transformers' `get_scheduler` that depend on the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from dqo.config.optimizer import argument_values
from dqo.config.options import Options
from dqo.errors import UserError
from dqo.models.value_source import find_value_model
from dqo.objectives.base import VALUE_KINDS

OWN = ("constant", "linear", "cosine")
# Of a value model for which no rate is given. A head has everything to learn, and is small; the others begin as trained models
HEAD_RATE, MODEL_RATE = 1e-3, 1e-5


def critic_rate(options: Options) -> float:
    """The learning rate of the value model that a run trains."""
    if (given := options.train.critic_learning_rate) is not None:
        return given
    kind = options.objective.value_kind
    form = kind if kind in VALUE_KINDS else find_value_model(kind).form
    return HEAD_RATE if form == "head" else MODEL_RATE


def schedule(step: int, total: int, warmup: int, kind: str) -> float:
    """Factor of the learning rate at `step` (0-based) of `total`, by one of `OWN`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def factors(
    kind: str,
    texts: tuple[str, ...],
    learning_rate: float,
    warmup: int,
    total: int,
    option: str = "lr_scheduler_kwargs",
) -> Callable[[int], float]:
    """step (0-based) -> factor of the learning rate. It has no state: a run that goes on needs nothing of it.

    Args:
        texts: arguments of the schedule, as `argument_values` reads them.
        option: names them in messages.

    Raises:
        UserError: for arguments that the schedule does not have, or that make a rate below 0 or none at all.
    """
    if kind in OWN:
        if texts:
            raise UserError(f"{option}: {kind} has no arguments; remove {', '.join(texts)}, or choose another schedule")
        return lambda step: schedule(step, total, warmup, kind)
    import torch
    from transformers import get_scheduler

    values: dict[str, Any] = argument_values(texts)
    for name, value in values.items():
        if name.endswith("_steps") and isinstance(value, float) and 0 < value < 1:
            values[name] = math.ceil(value * total)
    unused = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)  # transformers asks it for the rate
    said = f"{option}: lr_scheduler_type {kind} with {', '.join(texts) or 'no arguments'}"
    try:
        if any(isinstance(value, float) and not math.isfinite(value) for value in values.values()):
            raise ValueError("expected finite numbers")
        if kind == "warmup_stable_decay" and warmup + values.get("num_decay_steps", 0) > total:
            raise ValueError(f"{warmup} steps of warm-up and num_decay_steps are more than the {total} steps")
        made: Any = get_scheduler(kind, unused, warmup, total, values)
        factor = made.lr_lambdas[0]
        for step in {0, min(warmup, total - 1), total // 2, total - 1}:
            if not 0.0 <= float(factor(step)) < math.inf:
                raise ValueError(f"the rate of step {step + 1} would be {factor(step) * learning_rate:g}")
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{said}: {' '.join(str(error).split())}") from error
    return lambda step: float(factor(step))


def check_schedules(options: Options) -> None:
    """Refuses arguments that no schedule has, before any work. The number of steps may not be known yet."""
    config = options.train
    steps = config.max_steps if config.max_steps > 0 else 10**6
    warmup = 0 if config.warmup_steps < 1 else min(int(config.warmup_steps), steps)
    rates = {"policy": config.learning_rate}
    if options.trains_values:
        rates["critic"] = critic_rate(options)
    for model, rate in rates.items():
        own = model == "critic" and config.critic_lr_scheduler_type is not None
        option = "critic_lr_scheduler_kwargs" if own else "lr_scheduler_kwargs"
        factors(*config.schedule_of(model), rate, warmup, steps, option)
