"""Returns of the training data, before any log-ratio: where a value model starts, and between which ends it lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from dqo.config.options import Options
from dqo.data.episode import Episode
from dqo.data.episodes import ended
from dqo.errors import UserError
from dqo.models.policy import weights_hash
from dqo.models.value_form import ValueForm
from dqo.objectives.base import Objective
from dqo_kernels.core.packed import sequence_index
from dqo_kernels.lambda_return import lambda_return_reference

_TOGETHER = 1024  # episodes, so that a large data set is not copied


class Returns(NamedTuple):
    """Over the states that a method fits V to: every state, or the first of each response."""

    mean: float
    low: float
    high: float


def returns_of(objective: Objective, episodes: Sequence[Episode]) -> Returns:
    """Of what is paid from a state on, discounted as the objective does. Responses that were cut are left out where others are
    not: what would have followed is unknown. Of a method that fits V to a column: of that column, between 0 and 1."""
    if objective.values_column is not None:
        return Returns(float(np.concatenate([e.columns[objective.values_column] for e in episodes]).mean()), 0.0, 1.0)
    episodes = ended(episodes)
    pieces = []
    for begin in range(0, len(episodes), _TOGETHER):
        some = episodes[begin : begin + _TOGETHER]
        counts = torch.tensor([e.action_count for e in some])
        cu_seqlens = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        rewards = torch.cat([torch.from_numpy(e.rewards) for e in some]).double()
        gamma: float | torch.Tensor = objective.discount_factor
        if objective.discount_at == "turns":
            gamma = torch.where(torch.cat([torch.from_numpy(e.turn_end) for e in some]) > 0, gamma, 1.0).double()
        nothing = torch.zeros(len(some), dtype=torch.float64)
        sequence = sequence_index(cu_seqlens, len(rewards))
        found = lambda_return_reference(rewards, torch.zeros_like(rewards), nothing, sequence, gamma, 1.0)
        pieces.append(found if objective.unit == "token" else found[cu_seqlens[:-1]])
    found = torch.cat(pieces)
    return Returns(found.mean().item(), found.min().item(), found.max().item())


class ValueStart(NamedTuple):
    """The form of a new value model, V at first (None: the last layer is zero), and a line that says both where it was asked."""

    form: ValueForm
    value: float | None = None
    told: str | None = None


def value_start(options: Options, episodes: Sequence[Episode], reference: PreTrainedModel) -> ValueStart:
    """As the options ask. `episodes` are those that are trained on; `reference` is the reference policy.

    Raises:
        UserError: for a cross-entropy where all returns are equal.
    """
    config, objective = options.train, options.objective
    kind, mean = objective.values_loss, config.value_init == "mean_return"
    form = ValueForm(input=config.value_input)
    if form.reads_reference and objective.needs_values:
        form = replace(form, reference=weights_hash(reference, torch.float32))
    if not objective.needs_values or (kind == "squared" and not mean):
        return ValueStart(form)
    found = returns_of(objective, episodes)
    said = []
    if mean:
        said.append(f"V starts at {found.mean:.4g}, the mean return of the training data")
    if kind != "squared":
        if not found.low < found.high:
            raise UserError(
                f"value_loss {kind}: every return of the training data is {found.low:g}, and V would have no range; use "
                "--value_loss squared"
            )
        form = replace(form, loss=kind, low=found.low, high=found.high)
        said.append(f"V lies between {found.low:.4g} and {found.high:.4g}, the least and the greatest return")
    return ValueStart(form, found.mean if mean else None, f"value model: {', '.join(said)}")
