"""AdamW, learning-rate schedule and clipping, the same for policy and value model, each with its own learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from dqo.parallel import whole


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


def as_steps(value: float, total: int) -> int:
    """A number of steps; below 1 a share of all of them (transformers' convention)."""
    return math.ceil(value * total) if 0 < value < 1 else int(value)


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


def apply(optimizer: torch.optim.AdamW, model: nn.Module, learning_rate: float, max_grad_norm: float) -> float:
    """Clips, steps, clears; returns the gradient norm before clipping."""
    norm = whole(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
    if not torch.isfinite(norm):
        return norm.item()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()
