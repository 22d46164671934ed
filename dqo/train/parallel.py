"""Processes: which one this is, and one module over all of them, by DDP or sharded by FSDP2.

    accelerate launch --multi_gpu --num_processes 8 -m dqo.train ...                      DDP
    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8 -m dqo.train ...      FSDP2 (or --fsdp)

accelerate (or torchrun) starts the processes and makes the process group; torch's own wrappers do the rest, so that the same code
runs on GPUs (nccl) and CPUs (gloo). Every process reads all the data and knows every step's counts without communication.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from dqo.config.launcher import blocks_to_shard
from dqo.errors import UserError


@dataclass(frozen=True)
class Processes:
    rank: int
    world: int
    device: torch.device
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
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()

    def end(self) -> None:
        """The end of the program. One of several processes ends here and at once: in an ordinary exit threads of gloo that are
        still there now and then abort it (torch 2.13), after all its work is done."""
        if self.world > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def start(use_cpu: bool = False, fsdp: bool = False) -> Processes:
    """Joins the process group of the launcher; one process without a launcher."""
    state = PartialState(cpu=use_cpu or not torch.accelerator.is_available())
    sharded = fsdp and state.num_processes > 1
    return Processes(state.process_index, state.num_processes, state.device, sharded, state.local_process_index)


def wrap(module: nn.Module, processes: Processes, bf16: bool = False, some_unused: bool = False) -> nn.Module:
    """`module` with its gradients averaged over the processes, and its parameters sharded where that was asked for.

    Args:
        some_unused: a backward may leave parameters without gradient (the policy's, while the value model warms up).
    """
    if processes.world == 1:
        return module
    if not processes.fsdp:
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=some_unused)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.world,))
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    own = {name for part in module.modules() for name in (getattr(part, "_no_split_modules", None) or ())}
    blocks = blocks_to_shard() or own
    missing = blocks_to_shard() - {type(part).__name__ for part in module.modules()}
    if missing:
        raise UserError(
            f"FSDP_TRANSFORMER_CLS_TO_WRAP={', '.join(sorted(missing))}: the model has no such module; its own blocks are "
            f"{', '.join(sorted(own)) or 'unknown'}"
        )
    for part in module.modules():
        if type(part).__name__ in blocks:
            fully_shard(part, mesh=mesh, mp_policy=precision)
    return fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)


def without_sync(module: nn.Module, last: bool):
    """Context of a backward whose gradients stay here until the step's last; FSDP2 reduces each, to keep them sharded."""
    if isinstance(module, nn.parallel.DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, on every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor sharded as `parameter` is."""
    if isinstance(parameter, DTensor) and tensor.dim() > 0:
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict with every tensor whole, tied ones once; all processes must call it."""
    gathered: dict[int, Tensor] = {}
    state = module.state_dict(keep_vars=True)  # with them a tied parameter is one object
    for value in state.values():
        if id(value) not in gathered:
            gathered[id(value)] = whole(value.detach())
    return {name: gathered[id(value)] for name, value in state.items()}


def load_whole_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies whole tensors into the module's own, in place. Raises KeyError for a name the module has and `state` has not."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            value.copy_(like(state[name].to(value.dtype), value))


def add_over_processes(tensors: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Sums of [sum, count] pairs over the processes; the names end in /min or /max where extremes are meant. Every process must
    have the same names."""
    if processes.world == 1 or not tensors:
        return tensors
    found = {}
    for operation, suffix in ((dist.ReduceOp.MIN, "/min"), (dist.ReduceOp.MAX, "/max"), (dist.ReduceOp.SUM, "")):
        names = sorted(n for n in tensors if n not in found and n.endswith(suffix))
        if names:
            packed = torch.stack([tensors[n].double() for n in names]).to(processes.device)
            dist.all_reduce(packed, operation)
            found |= dict(zip(names, packed.to(tensors[names[0]].device).float()))
    return found


def gather_objects(items: list, processes: Processes) -> list:
    """The lists of all processes, joined in the order of their ranks."""
    if processes.world == 1:
        return items
    lists: list = [None] * processes.world
    dist.all_gather_object(lists, items)
    return [item for members in lists for item in members]
