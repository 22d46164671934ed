"""Sums that objectives share: per response, and [sum, count] metrics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dqo.objectives.base import Objective
from dqo_kernels import TokenStats
from dqo_kernels.core.packed import sequence_index


def sequence_sums(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,): sum of the rows of each sequence."""
    sequence = sequence_index(cu_seqlens, x.shape[0])
    return x.new_zeros(cu_seqlens.numel() - 1).index_add(0, sequence, x)


def sequence_means(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,): mean of the rows of each sequence."""
    return sequence_sums(x, cu_seqlens) / cu_seqlens.diff()


class Steps(NamedTuple):
    """The steps of the responses as actions: where they begin among N tokens, and how many each response has."""

    starts: Tensor  # (K,) the first row of each step
    cu_tokens: Tensor  # (K+1,) boundaries of the steps among the rows
    cu_steps: Tensor  # (B+1,) boundaries of the responses among the steps

    def sums(self, x: Tensor) -> Tensor:
        """(K,): sum of the rows of each step."""
        return sequence_sums(x, self.cu_tokens)


def steps_of(rows: dict[str, Tensor], cu_seqlens: Tensor) -> Steps:
    """Of rows with the column step. Tokens that share it are one action."""
    step = rows["step"]
    begins = torch.ones_like(step, dtype=torch.bool)
    begins[1:] = step[1:] != step[:-1]
    begins[cu_seqlens[:-1]] = True
    starts = begins.nonzero()[:, 0]
    cu_tokens = torch.cat([starts, cu_seqlens[-1:]])
    return Steps(starts, cu_tokens, torch.searchsorted(cu_tokens, cu_seqlens))


def discounts(objective: Objective, rows: dict[str, Tensor]) -> Tensor | None:
    """(N,) gamma of every action; None where it is the same at all of them."""
    if objective.discount_at == "tokens" or objective.discount_factor == 1.0:
        return None
    return torch.where(rows["turn_end"] > 0, objective.discount_factor, 1.0)


class Regression(NamedTuple):
    """What a method fits in each state: V to `returns`, beta * log(pi/ref) to `advantages`. The two targets are detached."""

    values: Tensor
    returns: Tensor
    scaled_ratio: Tensor  # beta * log(pi/ref)
    advantages: Tensor


def response_regression(
    stats: TokenStats, rows: dict[str, Tensor], cu_seqlens: Tensor, beta: float, everywhere: bool = False
) -> Regression:
    """(B,) fields, of the response as one action in the state of its prompt; V of its last state is paid if it was cut.
    `everywhere`: (N,) the same beside the value of each of its states."""
    paid = rows["rewards"] + rows["bootstrap"].detach() if "bootstrap" in rows else rows["rewards"]
    outcome = sequence_sums(paid, cu_seqlens)
    scaled_ratio = beta * sequence_sums(stats.logprobs - rows["ref_logprobs"], cu_seqlens)
    values = rows["values"]
    if everywhere:
        sequence = sequence_index(cu_seqlens, len(values))
        outcome, scaled_ratio = outcome[sequence], scaled_ratio[sequence]
    else:
        values = values[cu_seqlens[:-1]]
    return Regression(values, outcome - scaled_ratio.detach(), scaled_ratio, outcome - values.detach())


def mean_metric(x: Tensor, where: Tensor | None = None) -> Tensor:
    """(2,): [sum, count] of x, over `where` when given."""
    x = x.detach()
    if where is None:
        return torch.stack([x.sum(), x.new_tensor(float(x.numel()))])
    return torch.stack([torch.where(where, x, 0.0).sum(), where.sum().to(x.dtype)])


def moments(name: str, x: Tensor) -> dict[str, Tensor]:
    """Mean and mean square, from which variances of the whole step are made."""
    return {f"{name}/mean": mean_metric(x), f"{name}/mean_square": mean_metric(x.square())}


def response_metrics(
    stats: TokenStats,
    rows: dict[str, Tensor],
    cu_seqlens: Tensor,
    beta: float | None = None,
    chosen: Tensor | None = None,
) -> dict[str, Tensor]:
    """Sums over whole responses, by TRL's names: log-probabilities and, given `beta`, implicit rewards beta * log(pi/ref).

    `chosen` (B,) bool tells which are `chosen`, the others being `rejected`; without it the label does.
    """
    if chosen is None:
        chosen = rows["label"][cu_seqlens[:-1]] > 0.5
    logprobs = stats.logprobs.detach()
    totals = {"logps": sequence_sums(logprobs, cu_seqlens)}
    if beta is not None:
        totals["rewards"] = beta * sequence_sums(logprobs - rows["ref_logprobs"], cu_seqlens)
    metrics: dict[str, Tensor] = {}
    for name, total in totals.items():
        metrics |= {f"{name}/chosen": mean_metric(total, chosen), f"{name}/rejected": mean_metric(total, ~chosen)}
    if "behavior_logprobs" in rows:
        metrics["sampling/logp_difference/mean"] = mean_metric((logprobs - rows["behavior_logprobs"]).abs())
    return metrics


def regression_metrics(policy_loss: Tensor, value_loss: Tensor, fitted: Regression) -> dict[str, Tensor]:
    """The losses before their factors, with an entry for each unit (for each response where the value model has a loss of its
    own), and what is fitted in the states.

    loss/policy and loss/value are equal numbers wherever both regressions have the same residual, beta * log(pi/ref) -
    advantage = V - return (DRO, OREO, and DQO without target_ema at lam 1 and policy_target return, its defaults, or at
    policy_target td): each is differentiated for its own model, so that their gradients differ.
    """
    values, returns, scaled_ratio, advantages = (x.detach() for x in fitted)
    metrics = {
        "loss/policy": mean_metric(policy_loss),
        "loss/value": mean_metric(value_loss),
        "value/mean": mean_metric(values),
        "td_error/abs_mean": mean_metric((scaled_ratio - advantages).abs()),
    }
    return (
        metrics
        | moments("returns", returns)
        | moments("advantages", advantages)
        | moments("value_error", returns - values)
    )


def right_tokens(rows: dict[str, Tensor], cu_seqlens: Tensor) -> Tensor:
    """(N,) bool: of each response the first `right_length` tokens, or without that column all tokens of correct responses."""
    if "right_length" not in rows:
        return rows["label"] > 0.5
    place = torch.arange(len(rows["right_length"]), device=cu_seqlens.device)
    return place - cu_seqlens[sequence_index(cu_seqlens, len(place))] < rows["right_length"]
