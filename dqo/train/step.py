"""One optimizer step's gradients: micro-batches -> forward -> objective -> backward, the same for any split of the step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from dqo.data.batches import Group, unit_count
from dqo.objectives.base import MODELS, Objective
from dqo.processes import add_over_processes
from dqo.train import metrics
from dqo.train.asked import Asked
from dqo.train.engine import Engine, Planned
from dqo.train.learner import ASKED, companion_sums, objective_sums, step_sums
from dqo.train.masters import take_gradients
from dqo.train.not_finite import NotFinite, rows_of
from dqo.train.parallel import without_sync


def companions_of(groups: list[Group]) -> list[Group]:
    """The companions of all episodes, each a group."""
    return [[e.companion] for group in groups for e in group if e.companion is not None]


def means_of_step(engine: Engine, objective: Objective, groups: list[Group]) -> dict[str, float]:
    """What the objective asks of the whole step before any micro-batch, of the companions and of the responses: {column: the
    number on every row}; {} when it asks nothing."""
    found: dict[str, float] = {}
    if companions := companions_of(groups):
        found |= _means(engine, companion_sums, objective, companions)
    if objective.needs_step_sums:
        found |= _means(engine, step_sums, objective, groups)
    return found


def _means(engine: Engine, work: Callable, objective: Objective, groups: list[Group]) -> dict[str, float]:
    """Of the sums that `work` finds in all micro-batches and processes."""
    total: dict[str, Tensor] = {}
    for batch, counts, _ in Planned(groups, engine):
        with torch.no_grad():  # outside too: DDP would wait for a backward
            found = engine.module(work, objective, batch)
        total = metrics.add(total, found if counts else metrics.none_of(found))
    total = add_over_processes(total, engine.processes)
    return {name: (pair[0] / pair[1]).item() for name, pair in total.items()}


def accumulate(
    engine: Engine,
    objective: Objective,
    groups: list[Group],
    trains: Collection[str] = MODELS,
    substep_end: Callable[[], Any] = lambda: None,
    known: Asked | None = None,
) -> tuple[dict[str, Tensor], int]:
    """Gradients of one optimizer step. Divides by the step's count of units, known before any forward pass, so that any split
    into micro-batches and processes gives one large batch's gradient.

    Args:
        groups: the whole step's, the same on every process.
        trains: the models that get a gradient, of "policy" and "critic".
        substep_end: called after every micro-batch but the last.
        known: takes which labels the objective asks for; None: none was asked before, and nothing is noted.

    Returns:
        This process's metric sums, and the number of tokens of the step, prompts included.
    """
    module, world = engine.module, engine.processes.world
    units = unit_count(groups, objective.unit)
    means = means_of_step(engine, objective, groups)
    known = Asked(objective) if known is None else known
    known.begin()
    sums: dict[str, Tensor] = {}
    tokens = sum(e.length for group in groups for e in group)
    for batch, counts, last in Planned(groups, engine):
        # the wrappers average over the processes what is to be summed
        scale = world / units if counts else 0.0
        share = world * batch.tokens / tokens if counts else 0.0
        known.put_known(batch)
        with without_sync(module, last):
            loss, more = module(objective_sums, objective, batch, trains, scale, means, share)
            if not torch.isfinite(loss):
                what = f"the loss is {loss.item()} on a batch with rows {rows_of(batch.episodes)}"
                raise NotFinite(what, batch.episodes)
            if loss.requires_grad:
                loss.backward()
                take_gradients(engine.learner)
        asked = more.pop(ASKED, None)
        if asked is not None and counts:
            known.note(batch, asked)
        of_batch = float(unit_count(batch.groups, objective.unit))
        more |= {"loss": torch.stack([loss.detach() * units / world, loss.new_tensor(of_batch)])}
        more |= metrics.of_batch(batch)
        sums = metrics.add(sums, more if counts else metrics.none_of(more))
        if not last:
            substep_end()
    return sums, tokens
