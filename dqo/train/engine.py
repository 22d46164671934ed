"""What computes steps and evaluations: the models over the processes, and how episodes become their batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from torch import nn

from dqo.data.batches import Batch, Batching, Group, micro_batch_plan
from dqo.processes import Processes
from dqo.train.learner import Learner


@dataclass(frozen=True)
class Engine:
    module: nn.Module  # `learner`, or what wraps it over the processes
    learner: Learner
    batching: Batching
    processes: Processes


class Planned:
    """This process's micro-batches of a step, as many as every other process has: (batch, whether it counts, whether it is the
    last). One that does not count keeps the processes in step, and has weight 0."""

    def __init__(self, groups: list[Group], engine: Engine):
        self.batching, processes = engine.batching, engine.processes
        self.filler = min(groups, key=lambda group: max(e.length for e in group))
        plans = micro_batch_plan(groups, processes.world, self.batching.max_tokens, self.batching.packed)
        self.plan = plans[processes.rank]

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[tuple[Batch, bool, bool]]:
        for i, groups in enumerate(self.plan):
            chosen = [self.filler] if groups is None else groups
            batch = self.batching.collate(list(chain(*chosen)), [len(group) for group in chosen])
            yield batch, groups is not None, i + 1 == len(self.plan)
