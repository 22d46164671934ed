"""The lowest step of a response by the policy's implicit reward: beta * log(pi / ref), summed over the step's tokens.

A response is as good as its weakest step, as process reward models are read (Lightman et al., arXiv 2305.20050; Math-Shepherd,
2312.08935). A step ends with a token of `models.separators`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqo.data.batches import Batch
from dqo.evaluation.scorers.implicit import log_ratios
from dqo.evaluation.scoring import Models

NEEDS = {"reference", "separators"}


def score(models: Models, batch: Batch) -> Tensor:
    separators = torch.tensor(sorted(models.separators), dtype=torch.long, device=batch.actions.device)
    ends = torch.isin(batch.actions, separators)
    ends[batch.cu_seqlens[1:] - 1] = True  # an episode's last step ends with it
    step = ends.cumsum(0) - ends.long()  # (N,) the step of each token, counted through the batch
    steps = int(ends.sum())
    sums = torch.zeros(steps, device=ends.device).index_add(0, step, models.beta * log_ratios(models, batch).float())
    episode = torch.searchsorted(batch.cu_seqlens[1:], ends.nonzero()[:, 0], right=True)
    return torch.full((len(batch.episodes),), torch.inf, device=ends.device).scatter_reduce(0, episode, sums, "amin")
