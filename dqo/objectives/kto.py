"""Kahneman-Tversky Optimization (arXiv 2402.01306, eqs. 7 and 8): responses labelled good or bad, no pairs.

S  = sum_t log pi(y_t|s_t) - log ref(y_t|s_t)
z0 = max(0, mean of S over responses given to other prompts than their own), a constant
L  = desirable_weight * (1 - sigmoid(beta * (S - z0))), or undesirable_weight * (1 - sigmoid(beta * (z0 - S)))
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import ClassVar

from dqo.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KTO:
    beta: float = 0.1
    """The KL temperature multiplies log(pi/ref)."""
    desirable_weight: float = 1.0
    """The loss of responses labelled correct is multiplied by this factor."""
    undesirable_weight: float = 1.0
    """The loss of responses labelled wrong is multiplied by this factor."""

    unit: ClassVar[str] = "sequence"
    needs_reference: ClassVar[bool] = True
    needs_values: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = False
    needs_contrast: ClassVar[bool] = False

    def problems(self) -> list[tuple[str, str]]:
        found = [] if self.beta > 0 else [("beta", f"must be positive, got {self.beta}")]
        for name in ("desirable_weight", "undesirable_weight"):
            if not getattr(self, name) >= 0:
                found.append((name, f"must be at least 0, got {getattr(self, name)}"))
        return found

    def prepare(self, episodes: list) -> list:
        """Gives every episode as companion its own prompt with a completion of the next prompt, its i-th response with that
        prompt's i-th, so that all completions are used alike. A companion that is there stays.

        Raises:
            UserError: when all responses have one prompt.
        """
        prompts: dict[int, list] = {}
        for episode in episodes:
            prompts.setdefault(episode.prompt_index, []).append(episode)
        if len(prompts) == 1:
            raise UserError(
                "kto needs responses of at least two prompts: its KL term is estimated from responses given to other "
                "prompts; add prompts, or use --method dqo"
            )
        if episodes and len({bool(e.label) for e in episodes}) == 1:
            kind = "correct" if episodes[0].label else "wrong"
            logger.warning("every response is labelled %s: kto has nothing to compare them with", kind)
        longest = max((e.length for e in episodes), default=0)
        members = list(prompts.values())
        for own, others in zip(members, members[1:] + members[:1]):
            for i, episode in enumerate(own):
                if episode.companion is None:
                    episode.companion = _mismatched(episode, others[i % len(others)], longest)
        return episodes

    def companion_sums(self, stats, rows, cu_seqlens):
        """(2,): [sum, count] of S over companions; their mean is the column companion_mean."""
        from dqo.objectives.sums import mean_metric, sequence_sums

        return mean_metric(sequence_sums(stats.logprobs - rows["ref_logprobs"], cu_seqlens))

    def __call__(self, stats, rows, cu_seqlens):
        import torch

        from dqo.objectives.sums import mean_metric, response_metrics, sequence_sums

        first = cu_seqlens[:-1]
        desirable = rows["label"][first] > 0.5  # (B,)
        z0 = rows["companion_mean"][first].detach().clamp(min=0)
        margin = self.beta * (sequence_sums(stats.logprobs - rows["ref_logprobs"], cu_seqlens) - z0)
        miss = torch.sigmoid(torch.where(desirable, -margin, margin))  # 1 - sigmoid(x) without its cancellation
        loss = torch.where(desirable, self.desirable_weight * miss, self.undesirable_weight * miss).sum()
        return loss, {"kto/z0": mean_metric(z0)} | response_metrics(stats, rows, cu_seqlens, self.beta)


def _mismatched(episode, other, longest: int):
    """The prompt of one with the completion of the other, cut where it would be longer than any response of the data."""
    import numpy as np

    completion = other.completion_ids[: longest - len(episode.prompt_ids)]
    return dataclasses.replace(
        episode,
        completion_ids=completion,
        rewards=np.zeros(len(completion), dtype=np.float32),
        reward=0.0,
        label=False,
        terminated=True,
        source=f"{episode.source} with the completion of {other.source}",
        behavior_logprobs=None,
        step_ends=[],
        step_rewards=[],
        ref_logprobs=None,
        ref_lse=None,
    )
