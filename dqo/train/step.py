"""One optimizer step's gradients: micro-batches -> forward -> objective -> backward, the same for any split of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dqo.data.batches import Batch, collate, groups_of, micro_batch_plan, unit_count
from dqo.data.episodes import Episode
from dqo.errors import UserError
from dqo.objectives import UNIT_EPISODES
from dqo.train import metrics
from dqo.train.learner import Learner, companion_sums, objective_sums
from dqo.train.parallel import Processes, add_over_processes, without_sync


class Planned:
    """This process's micro-batches of a step, as many as every other process has: (batch, whether it counts, whether it is the
    last). One that does not count keeps the processes in step, and has weight 0."""

    def __init__(
        self, groups: list[list[Episode]], learner: Learner, processes: Processes, max_tokens: int, pad_id: int
    ):
        self.filler = min(groups, key=lambda group: max(e.length for e in group))
        self.plan = micro_batch_plan(groups, processes.world, max_tokens, learner.packed)[processes.rank]
        self.learner, self.pad_id = learner, pad_id

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[tuple[Batch, bool, bool]]:
        for i, episodes in enumerate(self.plan):
            chosen = self.filler if episodes is None else episodes
            batch = collate(chosen, self.pad_id, self.learner.device, self.learner.packed)
            yield batch, episodes is not None, i + 1 == len(self.plan)


def mean_over_companions(
    module: nn.Module,
    learner: Learner,
    objective: Any,
    groups: list,
    processes: Processes,
    max_tokens: int,
    pad_id: int,
) -> float | None:
    """What the objective asks of the companions of the whole step, before any micro-batch; None when it asks nothing."""
    companions = [[e.companion] for group in groups for e in group if e.companion is not None]
    if not companions:
        return None
    total = torch.zeros(2, device=learner.device)
    for batch, counts, _ in Planned(companions, learner, processes, max_tokens, pad_id):
        with torch.no_grad():  # outside too: DDP would wait for a backward
            found = module(companion_sums, objective, batch)
        total += found if counts else 0.0 * found
    total = add_over_processes({"companions": total}, processes)["companions"]
    return (total[0] / total[1]).item()


def accumulate(
    module: nn.Module,
    learner: Learner,
    objective: Any,
    groups: list[list[Episode]],
    max_tokens: int,
    pad_id: int,
    processes: Processes,
    train_policy: bool = True,
    substep_end: Callable[[], Any] = lambda: None,
) -> tuple[dict[str, Tensor], int]:
    """Gradients of one optimizer step. Divides by the step's count of units, known before any forward pass, so that any split
    into micro-batches and processes gives one large batch's gradient.

    Args:
        module: `learner`, or what wraps it over the processes.
        groups: the whole step's, the same on every process. max_tokens: of a micro-batch.
        substep_end: called after every micro-batch but the last.

    Returns:
        This process's metric sums, and the number of tokens of the step, prompts included.
    """
    units, size = unit_count(groups, objective.unit), UNIT_EPISODES[objective.unit]
    companion_mean = mean_over_companions(module, learner, objective, groups, processes, max_tokens, pad_id)
    sums: dict[str, Tensor] = {}
    tokens = sum(e.length for group in groups for e in group)
    for batch, counts, last in Planned(groups, learner, processes, max_tokens, pad_id):
        # the wrappers average over the processes what is to be summed
        scale = processes.world / units if counts else 0.0
        share = processes.world * batch.tokens / tokens if counts else 0.0
        with without_sync(module, last):
            loss, more = module(objective_sums, objective, batch, train_policy, scale, companion_mean, share)
            if not torch.isfinite(loss):
                raise UserError(_not_finite(loss, batch))
            if loss.requires_grad:
                loss.backward()
        of_batch = float(unit_count(groups_of(batch.episodes, size), objective.unit))
        more |= {"loss": torch.stack([loss.detach() * units / processes.world, loss.new_tensor(of_batch)])}
        more |= metrics.of_batch(batch)
        sums = metrics.add(sums, more if counts else metrics.none_of(more))
        if not last:
            substep_end()
    return sums, tokens


def _not_finite(loss: Tensor, batch: Batch) -> str:
    rows = ", ".join(e.source for e in batch.episodes[:5])
    return (
        f"the loss is {loss.item()} on a batch with rows {rows} ...; lower the learning rate or raise beta, and look for rewards "
        "or stored logprobs that are far too large"
    )


def out_of_memory(device: torch.device, max_tokens: int) -> str:
    """What to change when memory has run out with micro-batches of `max_tokens`."""
    return (
        f"out of memory on {device} (peak {metrics.peak_memory_gb():.1f} GB) with micro-batches of up to {max_tokens:,} tokens; "
        f"the result does not depend on their size: --max_batch_tokens {max(1, max_tokens // 2)}. More is saved by "
        "--gradient_checkpointing, --bf16, and --use_peft"
    )
