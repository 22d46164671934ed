"""Objectives on the tabular tree of tests/tabular.py, whose optimum is known."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dqo.objectives.base import Objective
from dqo_kernels import token_stats
from tests.tabular import Tree, fit


def alike(tree: Tree) -> Tree:
    """The same tree with a behaviour under which all its responses are equally likely: a sum over them is its expectation."""
    counts = torch.zeros(tree.children.shape, dtype=torch.float64)
    counts.index_put_((tree.states, tree.actions), torch.ones(len(tree.states), dtype=torch.float64), accumulate=True)
    return replace(tree, behavior_logits=counts.log())


def rows_of(tree: Tree) -> dict[str, Tensor]:
    """The columns of all responses of the tree that no model trains."""
    ref = token_stats(tree.ref_logits[tree.states], tree.actions, backend="reference")
    n = len(tree.states)
    return {
        "ref_logprobs": ref.logprobs,
        "ref_lse": ref.lse,
        "behavior_logprobs": tree.behavior_logprobs,
        "rewards": tree.rewards,
        "label": torch.ones(n, dtype=torch.float64),
        "group": tree.sequences,
        "turn_end": torch.zeros(n, dtype=torch.float64),
        "step": torch.arange(n) - tree.cu_seqlens[:-1][tree.sequences],  # every token is a step
    }


def loss_of(objective: Objective, tree: Tree, logits: Tensor, values: Tensor, **columns: Tensor) -> Tensor:
    """Over all responses of the tree, of tables logits (S, A) and values (S,)."""
    stats = token_stats(logits[tree.states], tree.actions, tree.ref_logits[tree.states], backend="reference")
    own = values[tree.states]
    known = rows_of(tree) | {"values": own, "target_values": own.detach()} | columns
    return objective(stats, known, tree.cu_seqlens)[0]


def trained(
    objective: Objective, tree: Tree, scale: float = 1.0, max_steps: int = 450, **columns: Tensor
) -> tuple[Tensor, Tensor]:
    """(log_policy (S, A), values (S,)) at which an objective of the tree's beta arrives from (ref, 0), by the steps of `fit`;
    `scale` is of them. The tree is one of `alike`."""
    n = len(tree.states)

    def row_loss(logits: Tensor, values: Tensor) -> Tensor:
        stats = token_stats(logits, tree.actions, tree.ref_logits[tree.states], backend="reference")
        known = rows_of(tree) | {"values": values, "target_values": values.detach()} | columns
        return (scale * objective(stats, known, tree.cu_seqlens)[0] / n).expand(n)

    return fit(tree, row_loss, max_steps=max_steps)
