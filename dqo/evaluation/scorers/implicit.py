"""The policy's implicit reward, beta * log(pi / ref) summed over the tokens: what it has learnt to be paid for."""

from __future__ import annotations

from torch import Tensor

from dqo.data.batches import Batch
from dqo.evaluation.scoring import Models
from dqo.models.policy import policy_stats
from dqo.objectives.sums import sequence_sums

NEEDS = {"reference"}


def score(models: Models, batch: Batch) -> Tensor:
    return models.beta * sequence_sums(log_ratios(models, batch), batch.cu_seqlens)


def log_ratios(models: Models, batch: Batch) -> Tensor:
    """(N,) log pi - log ref of each token."""
    assert models.reference is not None
    return policy_stats(models.policy, batch).logprobs - policy_stats(models.reference, batch).logprobs
