"""Shapes and plain-torch pieces that the benchmarks of sequence operations share: B sequences of T rows, packed or as (B, T)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.harness.timing import Case

SMOKE = ((32, 128),)
DEFAULT = ((32, 128), (32, 1024), (1, 16384))
FULL = (*DEFAULT, (256, 512), (1, 131072))
GPU = ((32, 1024), (256, 512), (1, 32768))


def cases(device_type: str, size: str) -> list[Case]:
    shapes = {"smoke": SMOKE, "default": DEFAULT, "full": FULL}[size]
    shapes = GPU if device_type == "cuda" and size != "smoke" else shapes
    return [Case(f"{sequences}x{length}", (sequences, length), graph=True) for sequences, length in shapes]


def boundaries(case: Case, device: torch.device) -> Tensor:
    sequences, length = case.dims
    return torch.arange(0, sequences * length + 1, length, device=device)


def floats(count: int):
    """Bytes of `count` float32 numbers a row."""
    return lambda case: 4 * count * case.dims[0] * case.dims[1]


def following(x: Tensor) -> Tensor:
    """(B, T): x_{t+1}, 0 after the end."""
    return pad(x[:, 1:], (0, 1))


def returns_by_doubling(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """(B, T) lambda-returns in log2(T) vectorised steps: the best that plain torch does."""
    x, decay, stride = rewards + gamma * (1 - lam) * following(values), gamma * lam, 1
    while stride < x.shape[1] and decay > 1e-9:
        x = x + decay * pad(x[:, stride:], (0, stride))
        stride, decay = 2 * stride, decay * decay
    return x


def returns_by_loop(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """(B, T): what most trainers run, a few torch operations a time step."""
    steps, carry, ahead = [], torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        carry = rewards[:, t] + gamma * ((1 - lam) * ahead + lam * carry)
        ahead = values[:, t]
        steps.append(carry)
    return torch.stack(steps[::-1], dim=1)
