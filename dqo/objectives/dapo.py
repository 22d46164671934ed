"""Direct Advantage Policy Optimization (arXiv 2412.18279): steps are fitted to the advantages of a frozen critic.

phase 1, the critic alone    L_V  = cross-entropy of V(s_k) with P(s_k), the pass rate of the prefix       a step
phase 2, the policy alone    L_pi = 1/2 ( log pi(a_k|s_k) - log ref(a_k|s_k) - A(s_k, a_k) / beta )^2      a step
                             A(s_k, a_k) = V(s_{k+1}) - V(s_k),    V(s_{K+1}) = R, the outcome

a_k is a whole step, log pi(a_k|s_k) the sum over its tokens; both losses are means over the steps of a response. P is what the
file says of its prefixes, measured by continuations of them or labelled: --process_reward potential. That of the prompt is
prompt_value, or where there is none the mean outcome of its responses. V lies in [0, 1], and so must the outcomes.

ByteDance's DAPO is another method. The equations are those of the paper's abstract and of a summary, so that their numbers and
constants are not known here; beta is ours. The paper samples several next steps in each state; here they are those of the stored
responses. It is DQO with policy_target one_step whose value model is frozen and whose actions are steps: the policy losses differ
by the factor beta^2 where rewards are paid at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from dqo.errors import UserError
from dqo.objectives.base import Columns, Objective, Phase, Selection

CRITIC_SHARE = 0.5  # of all steps, where value_warmup_steps is 0


@dataclass(frozen=True)
class DAPO(Objective):
    beta: float = 0.1
    """The advantage of a step, divided by this, is what log(pi/ref) of the step is fitted to."""
    value_loss: Literal["squared", "bce", "hl_gauss"] = "bce"
    """What fits the critic to pass rates: "bce", the paper's cross-entropy, "hl_gauss", that of a distribution over bins between
    0 and 1, or "squared" error."""
    value_model: str = "separate"
    """ "separate" trains a model of its own, from the policy's trunk and a zero head. "head" trains an MLP on the policy's
    hidden states. The directory of a run, of its critic/ or of a model with one label begins from the value model there, which
    freeze_value_model leaves as it is: there is no phase 1 then."""

    fits_rewards: ClassVar[bool] = True
    wants_process_reward: ClassVar[str | None] = "potential"
    values_column: ClassVar[str | None] = "pass_rate"

    @property
    def needs_steps(self) -> bool:
        return True

    def problems(self) -> list[tuple[str, str]]:
        return super().problems() + self.no_value_model("separate", "head")

    def phases(self, value_warmup: float) -> tuple[Phase, ...]:
        """The critic for value_warmup steps, or half of all where that is 0; then the policy, beside the critic as it is."""
        critic = Phase("critic", value_warmup or CRITIC_SHARE, ("critic",))
        return critic, Phase("policy", trains=("policy",))

    def prepare(self, columns: Columns) -> Selection:
        """Every response.

        Raises:
            UserError: where a step has no pass rate, and where an outcome is none.
        """
        known = columns.has_step_rewards
        if not known.all():
            raise UserError(
                f"dapo fits its critic to pass rates of prefixes, and {int(known.sum()):,} of {len(known):,} responses have one "
                f"for each step (the first without: {columns.source[int(np.argmin(known))]}); `dqo score FILE --prefix_values 8` "
                "measures them"
            )
        outside = ~((columns.reward >= 0) & (columns.reward <= 1))
        if outside.any():
            first = int(np.argmax(outside))
            raise UserError(
                "dapo takes the difference between outcomes and pass rates, which lie between 0 and 1, and "
                f"{int(outside.sum()):,} of {len(outside):,} responses have another reward (the first: {columns.source[first]}, "
                f"{columns.reward[first]:g}); bring them there with --reward_scale and --reward_shift, without "
                "--normalize_rewards"
            )
        _, prompt = np.unique(columns.prompt, return_inverse=True)
        mean_outcome = np.bincount(prompt, columns.reward) / np.bincount(prompt)
        potential = columns.potential
        pass_rate = np.where(np.isnan(potential), np.repeat(mean_outcome[prompt], columns.length), potential)
        more = {"pass_rate": pass_rate, "outcome": columns.reward, "cut": columns.truncated.astype(np.float64)}
        return Selection(super().prepare(columns).groups, more)

    def __call__(self, stats, rows, cu_seqlens):
        import torch

        from dqo.objectives.sums import Regression, regression_metrics, response_metrics, sequence_means, steps_of
        from dqo.objectives.value_outputs import value_losses
        from dqo_kernels.core.packed import next_row, sequence_index

        steps, last = steps_of(rows, cu_seqlens), cu_seqlens[1:] - 1
        values, pass_rates = rows["values"][steps.starts], rows["pass_rate"][steps.starts]
        ends = rows["outcome"][last]
        if "bootstrap" in rows:  # of responses that were cut; the trainer gives it where these have no outcome
            ends = torch.where(rows["cut"][last] > 0, rows["bootstrap"][last].detach(), ends)
        still = values.detach()
        advantages = next_row(still, sequence_index(steps.cu_steps, len(still)), ends) - still
        log_ratio = steps.sums(stats.logprobs - rows["ref_logprobs"])
        policy_loss = 0.5 * (log_ratio - advantages / self.beta).square()
        squared = 0.5 * (values - pass_rates).square()
        value_loss, of_loss = value_losses(rows, squared, pass_rates, at=steps.starts)
        policy_loss, value_loss = (sequence_means(loss, steps.cu_steps) for loss in (policy_loss, value_loss))
        fitted = Regression(values, pass_rates, self.beta * log_ratio, advantages)
        metrics = regression_metrics(policy_loss, value_loss, fitted) | of_loss
        metrics |= response_metrics(stats, rows, cu_seqlens, self.beta)
        return policy_loss.sum() + value_loss.sum(), metrics
