"""Packed rows for the tests of objectives, and derivatives by differences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dqo_kernels import TokenStats, token_stats

VOCAB = 7


def stats_of(logprobs: Tensor) -> TokenStats:
    """Of an objective that reads log-probabilities alone."""
    return TokenStats(logprobs, torch.zeros_like(logprobs), torch.zeros_like(logprobs))


def random_case(lengths: list[int], seed: int = 0) -> tuple[Tensor, Callable[[Tensor], TokenStats], dict, Tensor]:
    """float64 logits (N, 7), the function that makes statistics of them (two policies), rows, and cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits, ref_logits = normal(n, VOCAB), normal(n, VOCAB)
    actions = torch.randint(VOCAB, (n,), generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    labels = torch.arange(len(lengths)) % 2 == 0
    ref = token_stats(ref_logits, actions)
    rows = {
        "ref_logprobs": ref.logprobs,
        "ref_lse": ref.lse,
        "rewards": normal(n),
        "values": normal(n),
        "target_values": normal(n),
        "q": normal(n),
        "turn_end": torch.zeros(n, dtype=torch.float64),
        "pass_rate": torch.linspace(0.1, 0.9, n, dtype=torch.float64),
        "outcome": torch.ones(n, dtype=torch.float64),
        "cut": torch.zeros(n, dtype=torch.float64),
        "dpo_model_logprobs": ref.logprobs + torch.linspace(-0.3, 0.4, n, dtype=torch.float64),
        "step": torch.cat([torch.arange(length) // 2 for length in lengths]),
        "label": labels.repeat_interleave(torch.tensor(lengths)).double(),
        "companion_mean": torch.full((n,), 0.3, dtype=torch.float64),
        "behavior_logprobs": ref.logprobs - 0.1,
        "group": (torch.arange(len(lengths)) // 2).repeat_interleave(torch.tensor(lengths)),
    }
    return logits, lambda logits: token_stats(logits, actions, ref_logits), rows, cu_seqlens


def differences(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of a scalar function of x (float64)."""
    found = torch.zeros_like(x)
    for i in range(x.numel()):
        offset = torch.zeros_like(x).flatten()
        offset[i] = step
        offset = offset.view_as(x)
        found.view(-1)[i] = (function(x + offset) - function(x - offset)) / (2 * step)
    return found
