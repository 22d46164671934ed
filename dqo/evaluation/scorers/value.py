"""The value model's estimate at the last state: of a response that ended before its end token, for a terminal state has no value;
of a beginning after its last token."""

from __future__ import annotations

from torch import Tensor, where

from dqo.data.batches import Batch
from dqo.evaluation.scoring import Models
from dqo.models.critic import ValueHead, value_rows
from dqo.models.policy import hidden_positions

NEEDS = {"value_model"}


def score(models: Models, batch: Batch) -> Tensor:
    assert models.value_model is not None
    hidden = hidden_positions(models.policy, batch) if isinstance(models.value_model, ValueHead) else None
    rows, after = value_rows(models.value_model, batch, hidden)
    return where(batch.terminated, rows[batch.cu_seqlens[1:] - 1], after)
