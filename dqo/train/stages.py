"""What the phases of a run train on, in which order, and the reference that a phase begins with.

output_dir/reference-400/    the policy of step 400, as transformers loads it, where a phase that refreshes the reference begins
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from dqo.config.options import Options
from dqo.data.batches import distinct
from dqo.data.joined import Joined
from dqo.errors import UserError
from dqo.files import replacing
from dqo.train.checkpoint import save_models
from dqo.train.machines import seen
from dqo.train.order import Order
from dqo.train.phases import Stretch
from dqo.train.prepare import Prepared
from dqo.train.run_models import reference_columns
from dqo.train.sharded import load_frozen


class Pool(NamedTuple):
    """The groups that are trained on from the step `begin` on."""

    begin: int
    bounds: list[tuple[int, int]]  # of its part of each data set's groups
    order: Order


def pools_of(stretches: list[Stretch], order: Order) -> list[Pool]:
    """The parts of all groups that the phases train on, each a part of every data set; phases in a row with one part have one
    pool. `order`: that of all groups.

    Raises:
        UserError: for a phase whose part holds no group.
    """
    found: list[Pool] = []
    for begin, phase in stretches:
        bounds = [(round(phase.part[0] * len(own)), round(phase.part[1] * len(own))) for own in order.members]
        empty = [first == last for first, last in bounds]
        if all(empty) or (order.weights is not None and any(empty)):
            count = f"{order.size:,} in all" if all(empty) else f"{min(map(len, order.members)):,} of a data set"
            raise UserError(
                f"phase {phase.name!r} has no group to train on: there are {count}, and it takes a share of "
                f"{phase.part[1] - phase.part[0]:.3g}; give fewer phases, or more data"
            )
        if not found or found[-1].bounds != bounds:
            members = [own[first:last] for own, (first, last) in zip(order.members, bounds)]
            of_all = [*map(len, members)] == [*map(len, order.members)]
            part = order if of_all else dataclasses.replace(order, members=members, _known={})
            found.append(Pool(begin, bounds, part))
    return found


class Stages:
    """The groups of every step, from the seed and the step alone, and the references of the phases.

    Args:
        stretches: the run's phases on its `steps`.
        step: where the run begins, or goes on.
    """

    def __init__(self, options: Options, prepared: Prepared, stretches: list[Stretch], steps: int, step: int):
        self.options, self.prepared, self.stretches = options, prepared, stretches
        self.pools = pools_of(stretches, prepared.order)
        planned = prepared.objective.phases(options.train.value_warmup_steps)
        there = {stretch.phase.name for stretch in stretches}
        missing = [p.name for p in planned if p.name not in there and tuple(p.part) != (0.0, 1.0)]
        if missing:
            raise UserError(
                f"{steps} steps leave none for {', '.join(map(repr, missing))} of the {len(planned)} phases; give more "
                "steps, or fewer phases"
            )
        before = [begin for begin, phase in stretches if phase.refreshes and begin < step]
        if before:
            self._use_reference(before[-1])

    def groups(self, step: int, position: int) -> list[int]:
        """Indices of the groups of a step; `position` counts the steps that were left out too."""
        pool = [pool for pool in self.pools if pool.begin <= step][-1]
        return pool.order.step(position - pool.begin).tolist()

    def enter(self, step: int) -> None:
        """Before a step: where a phase begins with it that refreshes the reference, the policy as it is becomes the reference.
        All processes must call it."""
        if any(begin == step and phase.refreshes for begin, phase in self.stretches):
            prepared = self.prepared
            with replacing(self._directory(step)) as beside:
                save_models(beside, prepared.learner, prepared.tokenizer, prepared.processes, value_model=False)
            prepared.processes.barrier()
            prepared.processes.say(
                f"step {step}: the policy as it is becomes the reference, kept in {self._directory(step)}"
            )
            self._use_reference(step)

    def _directory(self, begin: int) -> Path:
        return Path(self.options.train.output_dir) / f"reference-{begin}"

    def _use_reference(self, begin: int) -> None:
        """Reads the reference of the phase that begins there: the same weights for a run that goes on."""
        prepared, directory = self.prepared, self._directory(begin)
        there = seen(directory, prepared.processes)
        if not there or not any((directory / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise UserError(
                f"{directory} is missing: it is the reference policy of this phase, which began after step {begin}; put it back, "
                "or choose another --output_dir"
            )
        prepared.refreshed = directory
        config, processes = self.options.train, prepared.processes
        reference, sharded, sha256 = load_frozen(directory, config, processes, prepared.module is not None)
        reference_columns(
            dataclasses.replace(config, dtype="float32"),
            Joined(prepared.episodes(), distinct(prepared.held_out)),
            prepared.learner.policy,
            reference,
            prepared.batching,
            prepared.identity | {"reference": sha256},
            processes,
            resuming=True,
            sharded=sharded,
        )
