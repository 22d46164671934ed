"""Which process of a launch this is, and what the processes tell each other.

accelerate (or torchrun) starts them and makes the process group: nccl on GPUs, gloo on CPUs.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from dqo import peers
from dqo.errors import UserError


@dataclass(frozen=True)
class Processes:
    """Alone by default."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    fsdp: bool = False
    local_rank: int = 0  # on its machine

    @property
    def main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Prints once, beside progress bars."""
        if self.main:
            tqdm.write(text)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def largest(self, number: int) -> int:
        """The largest of a small number that each process has; all processes must call it."""
        if self.world == 1:
            return number
        found = torch.tensor(number, dtype=torch.int32, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def from_main(self, function: Callable[[], Any]) -> Any:
        """What `function` returns, or the UserError that it raises, in the first process, which alone calls it."""
        if self.world == 1:
            return function()
        found: list[Any] = [None, None]
        if self.main:
            try:
                found[0] = function()
            except UserError as error:
                found[1] = str(error)
        dist.broadcast_object_list(found)
        if found[1] is not None:
            raise UserError(found[1])
        return found[0]

    def leave(self) -> None:
        """The end of everything that the processes do together."""
        self.barrier()
        if dist.is_initialized():  # by a launcher of one process too
            dist.destroy_process_group()

    def end(self, status: int = 0) -> None:
        """The end of the program. One of several processes ends here and at once: in an ordinary exit threads of gloo that are
        still there now and then abort it (torch 2.13), after all its work is done."""
        if self.world > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


ALONE = Processes()


def start(use_cpu: bool = False, fsdp: bool = False, problem: str | None = None, **group: Any) -> Processes:
    """Joins the process group of the launcher, whose arguments are `group`; one process without a launcher.

    Args:
        problem: why this process cannot go on, which the others are told.

    Raises:
        UserError: with the problem of another process.
    """
    state = PartialState(cpu=use_cpu or not torch.accelerator.is_available(), **group)
    sharded = fsdp and state.num_processes > 1
    processes = Processes(state.process_index, state.num_processes, state.device, sharded, state.local_process_index)
    if processes.world > 1:
        known = gather_objects([(peers.listen(), problem)], processes)
        peers.know([peer for peer, _ in known], processes.rank)
        told = [f"{peers.called(rank)}: {text}" for rank, (_, text) in enumerate(known) if text is not None]
        if told and problem is None:
            raise UserError(told[0])
    return processes


def tell(problem: str) -> None:
    """Tells the other machines of a launch that this process does not go on: they would wait for it until their patience ends.
    Those of this machine are ended by their launcher."""
    if peers.several_machines() and not dist.is_initialized():
        start(os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true", problem=problem).end(2)


def launched(use_cpu: bool = False) -> Processes:
    """The processes of a launcher whose work differs in length: they wait for each other as long as it takes. Alone without a
    launcher, where nothing is joined."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ALONE
    return start(use_cpu, timeout=datetime.timedelta(days=365))


def add_over_processes(tensors: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Sums of [sum, count] pairs over the processes; the names end in /min or /max where extremes are meant. Every process must
    have the same names."""
    if processes.world == 1 or not tensors:
        return tensors
    found: dict[str, Tensor] = {}
    for operation, suffix in ((dist.ReduceOp.MIN, "/min"), (dist.ReduceOp.MAX, "/max"), (dist.ReduceOp.SUM, "")):
        names = sorted(n for n in tensors if n not in found and n.endswith(suffix))
        if names:
            packed = torch.stack([tensors[n].double() for n in names]).to(processes.device)
            dist.all_reduce(packed, operation)
            found |= {n: total.to(tensors[n].device, tensors[n].dtype) for n, total in zip(names, packed)}
    return found


def gather_objects(items: list, processes: Processes) -> list:
    """The lists of all processes, joined in the order of their ranks."""
    if processes.world == 1:
        return items
    lists: list = [None] * processes.world
    dist.all_gather_object(lists, items)
    return [item for members in lists for item in members]
