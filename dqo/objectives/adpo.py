"""Active Direct Preference Optimization (arXiv 2402.09401): labels are asked where the policy is unsure; else it labels the pair.

Alg. 2    m = beta * (S(y) - S(y'))        S(y) = sum_t log pi(y_t|s_t) - log ref(y_t|s_t), of the policy as it is
          o = the label, 1 where y is the better one, else -1        asked if |m| < threshold
          o = sign( m )                                              the policy's own label, if |m| >= threshold
          L = - log sigmoid( o * m )        a pair of responses y, y'; o is held fixed; any variant of DPO in its place

An infinite threshold asks every label: it is DPO. With 0 none is asked, and the policy only grows surer of what it thinks; a pair
with m = 0 has no label then and no gradient. A label that was asked once is known: it is used from then on, however sure the
policy is, and is not counted again. Equal pairs of responses are one question. The trainer counts: `queries` are the questions
that were asked so far, `pseudo_labels` the pairs that were trained on with a label of the policy.

Offline all labels lie in the file, put there by people or by `dqo score`; the gate decides which of them are looked at, and
`queries` is what a run would have had to pay for. Three things look at all of them: the pairs, which are those of DPO, so that it
is known for nothing that one of the two is better, though not which; the held-out loss, which is that of DPO; and the metrics of
training, such as labels/pseudo_accuracy, which train nothing.

The authors' program has m = beta * (...) and threshold 1.3 at beta 0.1; it asks in one epoch, so that no question comes twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dqo.objectives.dpo import DPO


@dataclass(frozen=True)
class ADPO(DPO):
    threshold: float = 1.3
    """A label is asked where the implicit rewards, beta * log(pi/ref) of whole responses, differ by less than this."""

    asks: ClassVar[bool] = True

    def problems(self) -> list[tuple[str, str]]:
        return super().problems() + self.below(0, "threshold")

    def asked(self, stats, rows, cu_seqlens):
        return self._margins(stats, rows, cu_seqlens).abs() < self.threshold

    def signs(self, margin, rows, cu_seqlens):
        import torch

        known = rows["known"][cu_seqlens[:-1]][0::2] > 0
        return torch.where(known | (margin.abs() < self.threshold), 1.0, margin.sign())

    def _margins(self, stats, rows, cu_seqlens):
        """(pairs,): m, without a gradient."""
        reward = self.implicit_rewards(stats, rows, cu_seqlens).detach()
        return reward[0::2] - reward[1::2]

    def evaluation(self, stats, rows, cu_seqlens):
        import torch

        return super().__call__(stats, rows | {"known": torch.ones_like(rows["ref_logprobs"])}, cu_seqlens)

    def __call__(self, stats, rows, cu_seqlens):
        from dqo.objectives.sums import mean_metric

        loss, metrics = super().__call__(stats, rows, cu_seqlens)
        margin = self._margins(stats, rows, cu_seqlens)
        known, unsure = rows["known"][cu_seqlens[:-1]][0::2] > 0, margin.abs() < self.threshold
        pseudo = ~(known | unsure)
        metrics["labels/asked"] = mean_metric((unsure & ~known).to(margin.dtype))
        metrics["labels/pseudo"] = mean_metric(pseudo.to(margin.dtype))
        metrics["labels/pseudo_accuracy"] = mean_metric((margin > 0).to(margin.dtype), pseudo)
        return loss, metrics
