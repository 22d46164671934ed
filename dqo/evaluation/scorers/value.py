"""The value model's estimate at the last state: of a response that ended before its end token, for a terminal state has no value;
of a beginning after its last token."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, where

from dqo.data.batches import Batch
from dqo.evaluation.scoring import Models
from dqo.models.critic import ValueHead, value_rows
from dqo.models.policy import hidden_positions, policy_stats
from dqo.models.value_form import form_of

NEEDS = {"value_model"}


def score(models: Models, batch: Batch) -> Tensor:
    assert models.value_model is not None
    hidden = hidden_positions(models.policy, batch) if isinstance(models.value_model, ValueHead) else None
    if form_of(models.value_model).reads_reference:
        assert models.reference is not None  # load_models has found it
        batch = replace(batch, columns=batch.columns | {"ref_logprobs": policy_stats(models.reference, batch).logprobs})
    rows, after = value_rows(models.value_model, batch, hidden)
    return where(batch.terminated, rows[batch.cu_seqlens[1:] - 1], after)
