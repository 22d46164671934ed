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


def exchange_in_turn(module: nn.Module) -> None:
    """Every sharded part of `module`, on CPUs."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_custom_all_gather(AllGather())  # type: ignore[arg-type]  # their base classes are not public
            part.set_custom_reduce_scatter(ReduceScatter())  # type: ignore[arg-type]
            part.set_modules_to_backward_prefetch([part])  # itself, which is there: none beside it
