"""One module over all processes, by DDP or sharded by FSDP2.

    accelerate launch --multi_gpu --num_processes 8 -m dqo.train ...                      DDP
    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8 -m dqo.train ...      FSDP2 (or --fsdp)

torch's own wrappers do the work, so that the same code runs on GPUs and CPUs. Every process reads all the
data and knows every step's counts without communication.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from dqo.config.launcher import blocks_to_shard
from dqo.errors import UserError
from dqo.models.policy import WITH_WEIGHTS
from dqo.processes import Processes
from dqo.train.in_turn import TableGradient, exchange_in_turn
from dqo.train.masters import has_masters, master_of, round_to_weights
from dqo_kernels.core import dispatch

PIECE = 2**23  # bytes


def wrap(
    module: nn.Module, processes: Processes, bf16: bool = False, some_unused: bool = False, cpu_offload: bool = False
) -> nn.Module:
    """`module` with its gradients averaged over the processes, and its parameters sharded where that was asked for.

    Args:
        some_unused: a backward may leave parameters without gradient (the policy's, while the value model warms up).
        cpu_offload: shards and optimizer states lie in main memory.
    """
    if processes.world == 1:
        return module
    if not processes.fsdp:
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=some_unused)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(processes.device.type, (processes.world,))
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy(pin_memory=processes.device.type != "cpu") if cpu_offload else OffloadPolicy()
    own = {name for part in module.modules() for name in (getattr(part, "_no_split_modules", None) or ())}
    blocks = blocks_to_shard() or own
    missing = blocks_to_shard() - {type(part).__name__ for part in module.modules()}
    if missing:
        raise UserError(
            f"FSDP_TRANSFORMER_CLS_TO_WRAP={', '.join(sorted(missing))}: the model has no such module; its own blocks are "
            f"{', '.join(sorted(own)) or 'unknown'}"
        )
    options: Any = {"mesh": mesh, "mp_policy": precision, "offload_policy": offload}
    native = dispatch.choose("linear_row_loss", processes.device.type, None, torch.float32) != "reference"
    for part in list(module.modules()):
        table, head = _table_and_head(part)
        if table is not None:
            alone: Any = fully_shard(table, **options)
            if type(table).forward is nn.Embedding.forward:  # the gradient is made of ids alone
                alone.set_unshard_in_backward(False)
                pieces_will_do = processes.device.type == "cpu" and not table.scale_grad_by_freq
                TableGradient(table) if pieces_will_do else _reduced_at_once(table)
        if head is not None:
            setattr(head, WITH_WEIGHTS, lambda work, hidden: work(hidden))
            alone = fully_shard(head, **options)
            # the policy's gradients are made while its loss is computed
            alone.set_unshard_in_backward(not native or part is not getattr(module, "policy", None))
            register_fsdp_forward_method(head, WITH_WEIGHTS)
        if type(part).__name__ in blocks:
            for matrix in _matrices(part) if processes.device.type == "cpu" else ():
                fully_shard(matrix, **options)
            fully_shard(part, **options)
    fully_shard(module, **options, reshard_after_forward=True)
    if processes.device.type == "cpu":
        exchange_in_turn(module)
    return module


def _reduced_at_once(table: nn.Module) -> None:
    """FSDP2 takes the gradient of a module's input as the sign that those of its parameters are there. Ids have none, and the
    whole gradient of a table would lie there until the backward ends: a zero that has one is added to what the table gives."""

    def with_zero(module: Any, inputs: tuple, options: dict) -> tuple[tuple, dict]:
        live = torch.is_grad_enabled() and module.weight.requires_grad
        return inputs, options | {"zero": torch.zeros((), device=module.weight.device, requires_grad=live)}

    plain: Any = table.forward

    def forward(*inputs: Tensor, zero: Tensor, **options: Any) -> Tensor:
        found = plain(*inputs, **options)
        return found + zero.to(found.dtype)

    table.forward = forward
    table.register_forward_pre_hook(with_zero, with_kwargs=True, prepend=True)


def _matrices(block: nn.Module) -> list[nn.Linear]:
    """The large layers of a block, which are gathered one by one where nothing is computed meanwhile: what is gathered is there
    twice while FSDP2 copies it, and then beside its gradient."""
    least = sum(parameter.numel() for parameter in block.parameters()) / 32  # those of adapters are much smaller
    return [part for part in block.modules() if type(part) is nn.Linear and part.weight.numel() >= least]


def _table_and_head(part: nn.Module) -> tuple[nn.Embedding | None, nn.Module | None]:
    """The table of embeddings and the head of a whole model, each of which is gathered alone. One tensor that is both belongs to
    what is gathered for a whole forward and backward."""
    if not isinstance(part, PreTrainedModel) or part.base_model is part:
        return None, None
    table, head = part.get_input_embeddings(), part.get_output_embeddings()
    if head is not None and (not isinstance(head, nn.Linear) or head.weight is table.weight):
        return None, None
    return table if isinstance(table, nn.Embedding) else None, head


def without_sync(module: nn.Module, last: bool):
    """Context of a backward whose gradients stay here until the step's last; FSDP2 reduces each, to keep them sharded, and so
    does DDP with weights in bfloat16, whose gradients are added up in float32."""
    if isinstance(module, nn.parallel.DistributedDataParallel) and not last and not has_masters(module):
        return module.no_sync()
    return contextlib.nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, on every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def pieces(tensor: Tensor, processes: Processes) -> Iterator[Tensor]:
    """The rows of a tensor, sharded by rows or whole, one part behind the other, of a sharded one at most `PIECE` bytes at once:
    less than the shard itself. All processes must take them."""
    if not isinstance(tensor, DTensor) or not tensor.placements[0].is_shard(0):
        yield whole(tensor)
        return
    own, rows = tensor.to_local(), -(-len(tensor) // processes.world)  # as torch.chunk divides them
    at_once = max(1, PIECE // max(1, tensor.itemsize * (tensor.numel() // max(1, len(tensor)))))
    for rank in range(processes.world):
        for begin in range(0, min(rows, len(tensor) - rank * rows), at_once):
            count = min(at_once, min(rows, len(tensor) - rank * rows) - begin)
            if rank == processes.rank:
                part = own[begin : begin + count].contiguous().to(processes.device)
            else:
                part = torch.empty((count, *tensor.shape[1:]), dtype=tensor.dtype, device=processes.device)
            dist.broadcast(part.view(-1).view(torch.uint8), src=rank)
            yield part


def own_rows(parameter: Tensor) -> slice:
    """The rows of a whole tensor that this process's shard of `parameter` has; of one that is not sharded all of them."""
    if not isinstance(parameter, DTensor):
        return slice(None)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return slice(offset[0], offset[0] + shape[0])


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, which every process has, sharded as `parameter` is; what is kept is a copy."""
    if not isinstance(parameter, DTensor) or tensor.dim() == 0:
        return tensor
    own = tensor[own_rows(parameter)].to(parameter.device, copy=True).contiguous()
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def whole_state(module: nn.Module, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The module's state dict with every tensor whole and in full precision, tied ones once; all processes must call it.
    `names`: of those that are wanted; None: all."""
    gathered: dict[int, Tensor] = {}
    state = module.state_dict(keep_vars=True)  # with them a tied parameter is one object
    state = state if names is None else {name: state[name] for name in names}
    for value in state.values():
        if id(value) not in gathered:
            gathered[id(value)] = whole(master_of(value).detach())
    return {name: gathered[id(value)] for name, value in state.items()}


def load_whole_state(module: nn.Module, state: dict[str, Tensor], names: Collection[str] | None = None) -> None:
    """Copies whole tensors into the module's own, in place: into all, or those of `names`. Raises KeyError for a name that
    `state` has not."""
    own = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in own.items() if names is None else [(name, own[name]) for name in names]:
            master = master_of(value)
            master.copy_(like(state[name].to(master.dtype), value))
    round_to_weights(module)
