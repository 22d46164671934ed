"""The mean log-probability of a token under the policy: likelihood, normalised by length."""

from __future__ import annotations

from torch import Tensor

from dqo.data.batches import Batch
from dqo.evaluation.scoring import Models
from dqo.models.policy import policy_stats
from dqo.objectives.sums import sequence_sums

NEEDS: set[str] = set()


def score(models: Models, batch: Batch) -> Tensor:
    lengths = batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]
    return sequence_sums(policy_stats(models.policy, batch).logprobs, batch.cu_seqlens) / lengths
