"""FSDP2's exchanges on CPUs, where nothing is computed while they run: one after the other, without a second copy.

On GPUs FSDP2 gathers the next layer while one computes, and keeps buffers until streams have read them. On a CPU each exchange
is waited for, so that this would cost memory and save no time; and gloo's own all-gather and reduce-scatter copy what they get.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class _Buffers:
    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class AllGather(_Buffers):
    """Each process sends its part of the one buffer that all parts lie in. For FSDP2's `set_custom_all_gather`."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        work, parts = None, output_tensor.chunk(group.size())
        own = parts[group.rank()]
        if own.data_ptr() != input_tensor.data_ptr():
            own.copy_(input_tensor)
        for rank, part in enumerate(parts):
            work = dist.broadcast(part, group_src=rank, group=group, async_op=True)
            assert work is not None  # this process is of the group
            work.wait()
        return work  # with one FSDP2 gives the buffer back once it was read, without one it keeps it until the next exchange


class ReduceScatter(_Buffers):
    """Each process is sent the sum of its part, and the buffer is given back. For `set_custom_reduce_scatter`."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        assert op in (dist.ReduceOp.AVG, dist.ReduceOp.SUM) and not async_op
        parts = input_tensor.chunk(group.size())
        for rank, part in enumerate(parts):
            dist.reduce(part, group_dst=rank, op=dist.ReduceOp.SUM, group=group)
        output_tensor.copy_(parts[group.rank()])
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(group.size())
        input_tensor.untyped_storage().resize_(0)  # FSDP2 holds it until the next layer's gradients


class TableGradient:
    """The gradient of a table of embeddings that is sharded by rows, which is never whole: of some rows at a time each process
    adds up what its tokens give, and the one that keeps those rows is sent the sum. autograd would make all of it, and FSDP2 a
    copy: the largest part of most models twice.

    Args:
        table: with nn.Embedding's own forward; `fully_shard` was called with it.
        at_once: bytes of the rows.
    """

    def __init__(self, table: nn.Embedding, at_once: int = 2**23):
        self.table, self.at_once = table, at_once
        self.shard: Any = table.weight
        self.plain = table.forward
        table.register_forward_pre_hook(self.note, prepend=True)
        table.forward = self.forward  # type: ignore[assignment, method-assign]

    def note(self, table: nn.Module, _: tuple) -> None:
        """Before FSDP2 gathers it: the parameter changes when weights are read into one without memory."""
        self.shard = table.weight if isinstance(table.weight, DTensor) else self.shard

    def forward(self, ids: Tensor) -> Tensor:
        live = torch.is_grad_enabled() and self.table.weight.requires_grad
        return _LookUp.apply(self.table.weight, ids, self) if live else self.plain(ids)

    def add_up(self, ids: Tensor, gradient: Tensor) -> None:
        """ids: (N,); gradient: (N, D) of what was read of the table. Adds this process's rows to the gradient of its shard."""
        shard, mesh = self.shard, self.shard.device_mesh
        group, (count, width) = mesh.get_group(), shard.shape
        if self.table.padding_idx is not None:
            ids, gradient = ids[ids != self.table.padding_idx], gradient[ids != self.table.padding_idx]
        own, rows = torch.zeros_like(shard.to_local(), dtype=torch.float32), -(-count // group.size())
        step = max(1, self.at_once // (4 * width))
        for rank in range(group.size()):  # as FSDP2 divides the rows
            first, last = min(rank * rows, count), min((rank + 1) * rows, count)
            for begin in range(first, last, step):
                end = min(begin + step, last)
                mine, here = rank == group.rank(), (ids >= begin) & (ids < end)
                some = own[begin - first : end - first] if mine else own.new_zeros((end - begin, width))
                some.index_add_(0, ids[here] - begin, gradient[here].float())
                dist.reduce(some, group_dst=rank, op=dist.ReduceOp.SUM, group=group)
                del some  # before the next
        own.div_(group.size())
        found = DTensor.from_local(
            own, mesh, shard.placements, run_check=False, shape=shard.shape, stride=shard.stride()
        )
        shard.grad = found if shard.grad is None else shard.grad.add_(found)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, of: TableGradient) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.of = of
        return of.plain(ids)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        ctx.of.add_up(ids.flatten(), gradients[0].flatten(0, -2))
        return None, None, None


def exchange_in_turn(module: nn.Module) -> None:
    """Every sharded part of `module`, on CPUs."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_custom_all_gather(AllGather())  # type: ignore[arg-type]  # their base classes are not public
            part.set_custom_reduce_scatter(ReduceScatter())  # type: ignore[arg-type]
            part.set_modules_to_backward_prefetch([part])  # itself, which is there: none beside it
