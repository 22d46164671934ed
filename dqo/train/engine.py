"""What computes steps and evaluations: the models over the processes, and how episodes become their batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

from torch import nn

from dqo.data.batches import Batch, Batching, Group, micro_batch_plan, positions_of
from dqo.errors import UserError, is_out_of_memory
from dqo.models.memory import LESS, Found, in_memory, ran_out
from dqo.processes import Processes
from dqo.train.learner import Learner


@dataclass
class Engine:
    module: nn.Module  # `learner`, or what wraps it over the processes
    learner: Learner
    batching: Batching  # its micro-batches become smaller where memory runs out
    processes: Processes

    def in_memory(self, work: Callable[[], Found], what: str, *planned: list[Group]) -> Found:
        """`work()`; where memory runs out, again with micro-batches of half the size, which stay so small.

        Args:
            work: makes micro-batches of `planned`, a plan each, and leaves nothing behind when it is broken off.
            what: names the work in messages.

        Raises:
            UserError: one line with the cure, where nothing smaller is left; and over several processes, which meet inside a
                micro-batch and could not go back alone.
        """
        if self.processes.world > 1:
            try:
                return work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                now = self.batching.max_tokens
                raise UserError(
                    f"{what}: {ran_out(self.batching.device, now)}, which several processes do not lower by themselves: "
                    f"--max_batch_tokens {self._smaller(planned) or max(1, now // 2)}. {LESS}"
                ) from error

        def attempt(tokens: int) -> Found:
            self.batching = replace(self.batching, max_tokens=tokens)
            return work()

        remark = "the result does not depend on their size"
        if self.learner.router_aux_loss_coef:
            remark = "the router's auxiliary loss alone depends on their size"
        tokens, device = self.batching.max_tokens, self.batching.device
        return in_memory(attempt, tokens, lambda _: self._smaller(planned), what, device, remark)

    def _smaller(self, planned: tuple[list[Group], ...]) -> int | None:
        """Half of the largest micro-batch that can be split; None where each holds one group."""
        limit, packed = self.batching.max_tokens, self.batching.packed
        plans = [micro_batch_plan(groups, 1, limit, packed)[0] for groups in planned if groups]
        sizes = [
            positions_of(batch, packed) for plan in plans for batch in plan if batch is not None and len(batch) > 1
        ]
        return max(sizes) // 2 if sizes else None


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
