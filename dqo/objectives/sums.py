"""Sums that objectives share: per response, and [sum, count] metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from dqo_kernels.packed import sequence_index


def sequence_sums(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,): sum of the rows of each sequence."""
    sequence = sequence_index(cu_seqlens, x.shape[0])
    return x.new_zeros(cu_seqlens.numel() - 1).index_add(0, sequence, x)


def mean_metric(x: Tensor, where: Tensor | None = None) -> Tensor:
    """(2,): [sum, count] of x, over `where` when given."""
    x = x.detach()
    if where is None:
        return torch.stack([x.sum(), x.new_tensor(float(x.numel()))])
    return torch.stack([torch.where(where, x, 0.0).sum(), where.sum().to(x.dtype)])


def implicit_rewards(log_ratio: Tensor, label: Tensor, cu_seqlens: Tensor, beta: float) -> dict[str, Tensor]:
    """beta * log(pi/ref) of whole responses, correct ones as `chosen`, the others as `rejected` (TRL's names)."""
    reward = beta * sequence_sums(log_ratio.detach(), cu_seqlens)
    chosen = label[cu_seqlens[1:] - 1] > 0.5
    return {
        "rewards/chosen": mean_metric(reward, chosen),
        "rewards/rejected": mean_metric(reward, ~chosen),
    }


def moments(name: str, x: Tensor) -> dict[str, Tensor]:
    """Mean and mean square, from which variances of the whole step are made."""
    return {f"{name}/mean": mean_metric(x), f"{name}/mean_square": mean_metric(x.square())}
