"""AdamW, learning-rate schedule and clipping, the same for policy and value model, each with its own learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from dqo.train.parallel import whole


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.AdamW:
    """Weight decay on matrices only. Fused: one pass over the parameters, on the CPU too."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)


def steps_of(epochs: float, per_epoch: int) -> int:
    """Whole optimizer steps of `epochs` passes, rounded up, at least one. A product that is a whole number but for the rounding
    of floats is that number: 0.3 passes of 10 steps are 3."""
    return max(1, math.ceil(epochs * per_epoch * (1.0 - 1e-12)))


def schedule(step: int, total: int, warmup: int, kind: str) -> float:
    """Factor of the learning rate at `step` (0-based) of `total`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def clip(model: nn.Module, max_grad_norm: float) -> float:
    """Clips the gradients; returns their norm before that. Where it is not finite they stay as they are, to be looked at."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    found = whole(norm).item()
    if math.isfinite(found):
        nn.utils.clip_grads_with_norm_(model.parameters(), max_grad_norm, norm)
    return found


def update(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """One step of the optimizer; the gradients stay."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
