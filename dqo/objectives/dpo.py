"""Direct Preference Optimization (arXiv 2305.18290) on pairs made of one prompt's better and worse responses.

eq. 7     L = - log sigmoid( m ),    m = beta * (S(y_w) - S(y_l))        a pair of the better response y_w and the worse y_l
          S(y) = sum_t log pi(y_t|s_t) - log ref(y_t|s_t); with length_normalized its mean over the tokens

Its variants, with e = label_smoothing and a = rpo_alpha:

sigmoid   L = - (1 - e) * log sigmoid( m ) - e * log sigmoid( -m )                     cDPO (ericmitchell.ai/cdpo.pdf, eq. 3)
robust    L = ( - (1 - e) * log sigmoid( m ) + e * log sigmoid( -m ) ) / (1 - 2e)      rDPO (arXiv 2403.00409)
ipo       L = ( m / beta - 1 / (2 * beta) )^2, where S is always the mean              IPO (arXiv 2310.12036, eq. 17)
each      L - a * mean_t log pi(y_t|s_t) of y_w                                        RPO (arXiv 2404.19733, third version)

The paper of IPO writes sums. TRL takes means and tells that its authors did so in their experiments. robust is the estimate of
the loss of clean labels from labels of which a share e is wrong: (1 - e) * L(m) + e * L(-m) = - log sigmoid( m ).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dqo.objectives.base import Columns, Objective, Selection
from dqo.objectives.groups import pairs


@dataclass(frozen=True)
class DPO(Objective):
    beta: float = 0.1
    """The KL temperature multiplies log(pi/ref); for ipo it is the paper's tau."""
    loss_type: Literal["sigmoid", "ipo", "robust"] = "sigmoid"
    """What is made of a pair: "sigmoid" takes the logistic loss of its margin, "ipo" a squared error between the margin and
    1 / (2 beta), "robust" the logistic loss corrected for a share label_smoothing of wrong preferences."""
    label_smoothing: float = 0.0
    """This share of the preferences is taken to be wrong, with loss_type sigmoid or robust. It is below 0.5."""
    rpo_alpha: float = 0.0
    """The mean negative log-likelihood of the better response, a token, is multiplied by this and added."""
    length_normalized: bool = False
    """The log-ratio of a response is divided by its number of tokens. Loss_type ipo does so in any case."""
    max_pairs_per_prompt: int = 4
    """Each prompt gives at most this many pairs. Every response is used before one is used again."""

    unit: ClassVar[str] = "group"
    reads_rewards: ClassVar[str] = "order"
    group_size: ClassVar[int | None] = 2
    likelihood_option: ClassVar[str | None] = "rpo_alpha"
    nothing_left: ClassVar[str] = "no prompt has both a better and a worse response: 0 pairs"

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems() + self.below(1, "max_pairs_per_prompt") + self.below(0, "rpo_alpha")
        if not 0 <= self.label_smoothing < 0.5:
            found.append(("label_smoothing", f"must be in [0, 0.5), got {self.label_smoothing}"))
        if self.loss_type == "ipo" and self.label_smoothing > 0:
            found.append(("label_smoothing", "must be 0 with loss_type ipo, which has no such form"))
        if self.loss_type == "ipo" and self.length_normalized:
            found.append(("length_normalized", "must be off with loss_type ipo, which takes means over tokens already"))
        return found

    def idle(self) -> tuple[str, tuple[str, ...]]:
        if self.loss_type == "robust" and not self.label_smoothing:
            return "label_smoothing is 0, which makes it sigmoid", ("loss_type",)
        return super().idle()

    def prepare(self, columns: Columns) -> Selection:
        """(better, worse) in each group."""
        return Selection(pairs(columns, self.max_pairs_per_prompt))

    def __call__(self, stats, rows, cu_seqlens):
        import torch

        from dqo.objectives.sums import mean_metric, response_metrics, sequence_means

        reward = self.implicit_rewards(stats, rows, cu_seqlens)
        margin = reward[0::2] - reward[1::2]  # of the implicit rewards, whatever the loss makes of them
        sign = self.signs(margin.detach(), rows, cu_seqlens)
        chosen = torch.arange(len(reward), device=reward.device) % 2 == 0  # by reward; both may have the same label
        metrics = {
            "rewards/margins": mean_metric(margin),
            "rewards/accuracies": mean_metric((margin > 0).to(margin.dtype)),
        }
        metrics |= response_metrics(stats, rows, cu_seqlens, self.beta, chosen)
        if self.length_normalized or self.loss_type == "ipo":
            scaled = reward / cu_seqlens.diff()
            margin = scaled[0::2] - scaled[1::2]
        loss = self.of_margins(sign * margin).sum()
        if self.rpo_alpha > 0:
            likelihood = sequence_means(stats.logprobs, cu_seqlens)
            likelihood = torch.where(sign < 0, likelihood[1::2], likelihood[0::2])
            loss = loss - self.rpo_alpha * (sign.abs() * likelihood).sum()  # a pair without a label has no better one
            metrics["loss/nll"] = mean_metric(-likelihood)
        return loss, metrics

    def implicit_rewards(self, stats, rows, cu_seqlens):
        """(2 * pairs,): beta * S of each response, S being the sum."""
        from dqo.objectives.sums import sequence_sums

        return self.beta * sequence_sums(stats.logprobs - rows["ref_logprobs"], cu_seqlens)

    def signs(self, margin, rows, cu_seqlens):
        """(pairs,): 1 where the first response counts as the better one, -1 where the second does, 0 where neither. `margin` is
        that of the policy, without a gradient."""
        import torch

        return torch.ones_like(margin)

    def of_margins(self, margin):
        """The losses of pairs, of their margins m: sigmoid is eq. 7 where label_smoothing is 0."""
        from torch.nn import functional as F

        share = self.label_smoothing
        if self.loss_type == "ipo":
            return (margin / self.beta - 1.0 / (2.0 * self.beta)).square()
        right, wrong = -(1.0 - share) * F.logsigmoid(margin), -share * F.logsigmoid(-margin)
        return (right - wrong) / (1.0 - 2.0 * share) if self.loss_type == "robust" else right + wrong
