"""Float32 master copies of weights in bfloat16: what the optimizer updates, and what checkpoints keep.

A weight in bfloat16 has 8 bits: an update below 1/256 of it is lost. So the gradients of each micro-batch are added up in
float32, the optimizer works on the copy, and the weight is the copy, rounded. Under FSDP2 nothing of this is needed: the shards
are float32, and a layer is cast while it is gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def add_masters(model: nn.Module) -> None:
    """Gives each parameter in 16 bits a float32 copy."""
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.master = parameter.detach().float()  # type: ignore[attr-defined]


def master_of(parameter: Tensor) -> Tensor:
    """What is updated and saved in the place of a parameter: its copy, or where it has none itself."""
    return getattr(parameter, "master", parameter)


def masters_of(model: nn.Module) -> list[Tensor]:
    return [master_of(parameter) for parameter in model.parameters()]


def has_masters(model: nn.Module) -> bool:
    return any(master_of(parameter) is not parameter for parameter in model.parameters())


def take_gradients(model: nn.Module) -> None:
    """Adds the gradients of a backward to those of the copies, and clears them."""
    for parameter in model.parameters():
        master = master_of(parameter)
        if master is parameter or parameter.grad is None:
            continue
        master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
        parameter.grad = None


def clear_gradients(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)
    for master in masters_of(model):
        master.grad = None


@torch.no_grad()
def round_to_weights(model: nn.Module) -> None:
    """The weights from their copies, after an update."""
    for parameter in model.parameters():
        if (master := master_of(parameter)) is not parameter:
            parameter.copy_(master)
