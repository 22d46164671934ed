"""Log-probabilities and logsumexps of the reference policy, computed once and stored on the episodes."""

from __future__ import annotations

import logging

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from dqo import attention
from dqo.batches import collate, micro_batches
from dqo.episodes import Episode
from dqo.errors import UserError
from dqo.models import policy_stats

logger = logging.getLogger(__name__)


@torch.no_grad()
def add_reference(
    episodes: list[Episode], reference: PreTrainedModel, pad_id: int, max_tokens: int, quiet: bool = False
) -> None:
    """Fills `ref_logprobs` and `ref_lse`, float32 (T,), of every episode, longest first."""
    packed = attention.packs(reference)
    batches = micro_batches([[e] for e in episodes], max_tokens, packed)
    for members in tqdm(batches, desc="reference", unit="batch", disable=quiet, leave=False):
        stats = policy_stats(reference, collate(members, pad_id, reference.device, packed))
        sizes = [len(e.completion_ids) for e in members]
        for e, logprobs, lse in zip(members, stats.logprobs.cpu().split(sizes), stats.lse.cpu().split(sizes)):
            e.ref_logprobs, e.ref_lse = logprobs.numpy(), lse.numpy()


def warn_about_behavior(episodes: list[Episode], bound: float = 0.1) -> None:
    """Says when the stored log-probabilities are far from the reference's, as they are when the sampler's were tempered."""
    gaps = [np.abs(e.behavior_logprobs - e.ref_logprobs) for e in episodes if e.behavior_logprobs is not None]
    if gaps and (mean := float(np.concatenate(gaps).mean())) > bound:
        logger.warning(
            "logprobs in the file differ from the reference policy's by %.2f nats a token on average: another sampler, or "
            "processed (temperature, top-p) rather than raw log-probabilities? Importance weights are made from them",
            mean,
        )


@torch.no_grad()
def check_agreement(episodes: list[Episode], policy: PreTrainedModel, pad_id: int, bound: float = 1e-5) -> None:
    """Recomputes 64 responses in a batch of another shape: the reference was declared equal to the initial policy.

    `bound` is relative to 1 + |logprob|, float32 rounding of a forward pass whose matrix shapes differ.
    """
    members = episodes[:: max(1, len(episodes) // 64)][:64]
    batch = collate(members, pad_id, policy.device, attention.packs(policy))
    expected = batch.columns["ref_logprobs"]
    excess = (policy_stats(policy, batch).logprobs - expected).abs() / (1.0 + expected.abs())
    if not excess.max().item() <= bound:
        raise UserError(
            f"the reference's log-probabilities differ from the initial policy's by up to {excess.max().item():.3g} "
            "(relative to 1 + |logprob|) at step 0; they should agree. The forward pass is not deterministic, or not causal"
        )
