"""gather_weight: a head that FSDP2 has sharded, whole for one call."""

from __future__ import annotations

import sys

from torch import Tensor


def gather_weight(weight: Tensor) -> Tensor:
    """The whole of a sharded weight (or bias), for the linear_* functions, which refuse a shard.

    Every process must call it, and computes the loss of its own batch. The backward averages the gradients of the processes and
    shards the result, as FSDP2 does with other weights. A call costs one all-gather, its backward one reduce-scatter. The whole
    weight takes memory as long as the result lives.

    Args:
        weight: a DTensor, as `fully_shard` makes of parameters; any other tensor is returned as it is.

    Returns:
        A plain tensor of the global shape, differentiable in `weight`.
    """
    sharding = sys.modules.get("torch.distributed.tensor")  # without it nobody can have made one
    if sharding is None or not isinstance(weight, sharding.DTensor):
        return weight
    average = [sharding.Partial("avg")] * weight.device_mesh.ndim
    return weight.full_tensor(grad_placements=average)
