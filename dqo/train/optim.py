"""AdamW and clipping, the same for policy and value model, each with its own learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from dqo.train.masters import master_of, masters_of
from dqo.train.parallel import whole


def make_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    epsilon: float,
    eight_bits: bool = False,
) -> torch.optim.Optimizer:
    """Weight decay on matrices only. Fused: one pass over the parameters, on the CPU too. `eight_bits`: averages in 8 bits, of
    tensors with 4,096 numbers or more."""
    parameters = [master_of(p) for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if eight_bits:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=learning_rate, betas=betas, eps=epsilon)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)


def steps_of(epochs: float, per_epoch: int) -> int:
    """Whole optimizer steps of `epochs` passes, rounded up, at least one. A product that is a whole number but for the rounding
    of floats is that number: 0.3 passes of 10 steps are 3."""
    return max(1, math.ceil(epochs * per_epoch * (1.0 - 1e-12)))


def clip(model: nn.Module, max_grad_norm: float) -> float:
    """Clips the gradients; returns their norm before that. Where it is not finite they stay as they are, to be looked at."""
    updated = masters_of(model)
    norm = nn.utils.get_total_norm([p.grad for p in updated if p.grad is not None])
    found = whole(norm).item()
    if math.isfinite(found):
        nn.utils.clip_grads_with_norm_(updated, max_grad_norm, norm)
    return found


def update(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """One step of the optimizer; the gradients stay."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
