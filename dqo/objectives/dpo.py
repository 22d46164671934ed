"""Direct Preference Optimization (arXiv 2305.18290, eq. 7) on pairs made of one prompt's better and worse responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class DPO:
    beta: float = 0.1
    """The KL temperature multiplies log(pi/ref)."""
    max_pairs_per_prompt: int = 4
    """Each prompt gives at most this many pairs. Every response is used before one is used again."""

    unit: ClassVar[str] = "pair"
    needs_reference: ClassVar[bool] = True
    needs_values: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = False
    needs_contrast: ClassVar[bool] = True

    def problems(self) -> list[tuple[str, str]]:
        found = []
        if not self.beta > 0:
            found.append(("beta", f"must be positive, got {self.beta}"))
        if self.max_pairs_per_prompt < 1:
            found.append(("max_pairs_per_prompt", f"must be at least 1, got {self.max_pairs_per_prompt}"))
        return found

    def prepare(self, episodes: list) -> list:
        """chosen, rejected, chosen, rejected, ...; prompts whose responses share one reward give no pair."""
        prompts: dict[int, list] = {}
        for episode in episodes:
            prompts.setdefault(episode.prompt_index, []).append(episode)
        paired = []
        for members in prompts.values():
            ranked = sorted(members, key=lambda e: -e.reward)  # stable: the file's order among equals
            better = [e for e in ranked if e.reward > ranked[-1].reward]
            worse = [e for e in ranked if e.reward < ranked[0].reward][::-1]
            for i in range(min(self.max_pairs_per_prompt, max(len(better), len(worse)))):
                chosen, rejected = better[i % len(better)], worse[i % len(worse)]
                if chosen.reward > rejected.reward:
                    paired += [chosen, rejected]
        return paired

    def __call__(self, stats, rows, cu_seqlens):
        import torch
        from torch.nn import functional as F

        from dqo.objectives.sums import mean_metric, response_metrics, sequence_sums

        reward = self.beta * sequence_sums(stats.logprobs - rows["ref_logprobs"], cu_seqlens)  # (2 * pairs,)
        margin = reward[0::2] - reward[1::2]
        chosen = torch.arange(len(reward), device=reward.device) % 2 == 0  # by reward; both may have the same label
        metrics = {
            "rewards/margins": mean_metric(margin),
            "rewards/accuracies": mean_metric((margin > 0).to(margin.dtype)),
        }
        metrics |= response_metrics(stats, rows, cu_seqlens, self.beta, chosen)
        return -F.logsigmoid(margin).sum(), metrics
