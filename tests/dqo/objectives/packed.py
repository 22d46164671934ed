"""Packed rows for the tests of objectives, and derivatives by differences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dqo_kernels import TokenStats, token_stats
from tests.tabular import Tree

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
        "known": torch.ones(n, dtype=torch.float64),
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


def lbfgs(tree: Tree, objective, order: list[int], columns: dict[str, Tensor] | None = None) -> Tensor:
    """(S, A): what a table of logits comes to from the reference, by the loss of all responses at once.

    Args:
        order: trajectories of the tree, one behind the other, those of a group together; one may come several times.
        columns: (len(order),) further columns of each response.
    """
    bounds = tree.cu_seqlens.tolist()
    at = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in order])
    lengths = torch.tensor([bounds[i + 1] - bounds[i] for i in order])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    reference = token_stats(tree.ref_logits[tree.states], tree.actions, backend="reference")
    size = len(order) if objective.group_size is None else objective.group_size
    rows = {
        "ref_logprobs": reference.logprobs[at],
        "ref_lse": reference.lse[at],
        "rewards": tree.rewards[at],
        "label": torch.ones(len(at)),
        "group": (torch.arange(len(order)) // size).repeat_interleave(lengths),
    }
    rows |= {name: x.repeat_interleave(lengths) for name, x in (columns or {}).items()}
    logits = tree.ref_logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        stats = token_stats(logits[tree.states], tree.actions, backend="reference")
        loss, _ = objective(TokenStats(*(None if x is None else x[at] for x in stats)), rows, cu_seqlens)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach()
