"""Direct Q-function Optimization (arXiv 2410.09302): the policy is the Q-function, Q = V + beta * log(pi/ref).

Of a response y_1 ... y_T in the states s_1 ... s_T, with rewards r_t and delta_t = log pi(y_t|s_t) - log ref(y_t|s_t):

eq. 4.6    L_V  = w * 1/2 ( V(s_t) - G_t )^2                                                      a token; G_t held fixed
eq. 4.7    L_pi = w * 1/2 ( beta * delta_t - [ r_t + gamma * G_{t+1} - V(s_t) ] )^2               a token; [...] held fixed

           G_t = r_t - beta * delta_t + gamma * ( (1 - lam) * V(s_{t+1}) + lam * G_{t+1} )        the lambda-return
           G_{T+1} = V(s_{T+1}) = 0 where the response ended; both V of its last state where it was cut and is bootstrapped
           w = exp( min( is_cap, sum_t log pi(y_t|s_t) - log mu(y_t|s_t) ) )                      the response's weight; fixed

gamma is 1 but on the last token of a turn with discount turns. Tokens of the environment are no actions: s_{t+1} is the state in
which the model goes on, after what the environment wrote.

mu is the policy that wrote the responses: their stored log-probabilities, or the reference where there are none. With is_level
auto the trainer weighs where mu is known, and w = 1 where it is not (dqo/data/behavior.py). The loss of held-out responses has
w = 1: w falls as the policy moves away from them, and the loss would fall with it.

nll_coef adds -nll_coef * log pi(y_t|s_t) on correct responses, as DPO's RPO term does on chosen ones, or with nll_on steps on
what stands before the first wrong step. Its gradient is that of 4.7 with w = 1 and a bonus of nll_coef / (beta * policy_scale) in
[...]: these tokens are pulled up whatever their weight.

V is a model of its own, or beta * log (sum_a exp logit_a of pi) / (the same of ref). policy_target td puts
(1 - lam) * V(s_{t+1}) + lam * G_{t+1} in the place of G_{t+1} in 4.7, one_step V(s_{t+1}). `dqo_kernels.soft_bellman` computes G
and w, and from them both squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from dqo.objectives.base import Columns, Selection
from dqo.objectives.value_options import ValueOptions


@dataclass(frozen=True)
class _Options:
    """Those before the value model's."""

    beta: float = 0.1
    """The KL temperature is the beta of Q = V + beta * log(pi/ref)."""
    gamma: float = 1.0
    """A reward is discounted by this factor where discount says."""
    discount: Literal["tokens", "turns"] = "tokens"
    """The places where gamma acts: each token that the model wrote, or the last token of each of its turns alone. Tokens of the
    environment discount nothing. lam acts at each token of the model either way."""
    lam: float = 1.0
    """The lambda-return has this lambda. The paper's ablation prefers 1."""
    policy_target: Literal["return", "td", "one_step"] = "return"
    """What the policy regresses on: the lambda-return of the next state (the paper), its TD(lambda) form, or V."""
    target: Literal["detach", "residual"] = "detach"
    """"detach" holds the target of the soft Bellman residual fixed. "residual" trains both of its ends."""
    is_level: Literal["auto", "trajectory", "suffix", "prefix", "token", "none"] = "auto"
    """The importance weights are products over this level. "trajectory" is the paper's. "auto" takes it where the policy that
    wrote the responses is known: by their logprobs, or because their sampling names the reference at temperature 1. Elsewhere it
    takes "none"."""
    is_cap: float | None = 1.0
    """The log importance weight is at most this; 1.0 allows weights up to e. None sets no cap."""
    is_floor: float | None = None
    """The log importance weight is at least this. None sets no floor."""
    policy_scale: float = 1.0
    """The policy loss is multiplied by this factor."""


@dataclass(frozen=True)
class DQO(ValueOptions, _Options):
    value_model: str = "head"  # as good as a model of its own where they were compared, for half the time and memory
    kl_coef: float = 0.0
    """The exact KL to the reference, a token, is multiplied by this and added. Above 0 the reference stays in memory."""
    target_ema: float | None = None
    """An exponential moving average of the value model with this decay takes its place in every target. None takes the value
    model itself."""
    nll_coef: float = 0.02
    """The negative log-likelihood of each token that nll_on chooses is multiplied by this and added, without a weight. It keeps
    right tokens likely, which the losses of wrong ones may take down with them. 0 is the paper's."""
    nll_on: Literal["responses", "steps"] = "responses"
    """ "responses" takes the tokens of responses that count as correct. "steps" takes those of any response before the first step
    that the file marks as wrong, and all of a correct response without such a step."""

    value_kinds: ClassVar[tuple[str, ...]] = ("separate", "head", "implicit", "none")
    unit: ClassVar[str] = "token"
    fits_rewards: ClassVar[bool] = True
    likelihood_option: ClassVar[str | None] = "nll_coef"
    earlier: ClassVar[dict[str, Any]] = {"nll_coef": 0.0}  # the paper's

    @property
    def needs_kl(self) -> bool:
        return self.kl_coef > 0

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                found.append((name, f"must be in [0, 1], got {getattr(self, name)}"))
        if self.is_cap is not None and self.is_floor is not None and self.is_floor > self.is_cap:
            found.append(("is_floor", f"must be at most is_cap = {self.is_cap}, got {self.is_floor}"))
        found += self.below(0, "kl_coef", "nll_coef", "policy_scale")
        if self.target == "residual" and self.value_loss != "squared":
            found.append(
                ("value_loss", f"must be squared with target residual, which fits V itself, got {self.value_loss}")
            )
        if self.value_kind == "implicit" and self.gamma != 1.0:
            what = f"must be 1 with value_model implicit, which is fitted to outcomes, got {self.gamma}"
            found.append(("gamma", what))
        if self.target == "residual" and (self.value_kind == "implicit" or self.implied_from):
            kind = "implicit" if self.value_kind == "implicit" else "implied"
            found.append(("target", f"must be detach with value_model {kind}, whose values have no gradient"))
        if self.target_ema is not None:
            if not 0 <= self.target_ema < 1:
                found.append(("target_ema", f"must be in [0, 1) or None, got {self.target_ema}"))
            if self.target == "residual":
                found.append(("target_ema", "must be None with target residual, which trains both ends"))
            if not self.needs_values or self.implied_from:
                kind = "implied" if self.implied_from else "none"
                found.append(
                    ("target_ema", f"must be None with value_model {kind}: there is no value model to average")
                )
        return found

    def __call__(self, stats, rows, cu_seqlens):
        import torch

        from dqo.objectives.sums import (
            Regression,
            discounts,
            mean_metric,
            moments,
            regression_metrics,
            response_metrics,
            right_tokens,
        )
        from dqo.objectives.value_outputs import outcome_losses, value_losses
        from dqo_kernels import soft_bellman

        terms = soft_bellman(
            stats.logprobs,
            rows["ref_logprobs"],
            rows["rewards"],
            rows["values"] if self.needs_values else None,
            cu_seqlens,
            behavior_logprobs=rows.get("behavior_logprobs"),
            lse=stats.lse,
            ref_lse=rows.get("ref_lse"),
            bootstrap=rows["bootstrap"][cu_seqlens[1:] - 1] if "bootstrap" in rows else None,
            target_values=None if self.target_ema is None else rows["target_values"],
            beta=self.beta,
            gamma=self.gamma,
            discounts=discounts(self, rows),
            lam=self.lam,
            policy_target=self.policy_target,
            target=self.target,
            is_level=self._level,
            is_cap=self.is_cap,
            is_floor=self.is_floor,
            reduction="none",
        )
        # terms.returns: G_t. terms.advantages: r_t + gamma * G_{t+1} - V(s_t). terms.weights: w
        loss = self.policy_scale * terms.policy_loss.sum()  # eq. 4.7: w/2 (beta * delta_t - advantage)^2
        # eq. 4.6: w/2 (V(s_t) - G_t)^2
        value_loss, of_loss = value_losses(rows, terms.value_loss, terms.returns, terms.weights)
        value_loss = outcome_losses(rows, cu_seqlens, value_loss)
        if self.target == "detach":
            loss = loss + self.value_coef * value_loss.sum()
        values = rows["values"] if self.needs_values else self.beta * (stats.lse - rows["ref_lse"])
        scaled_ratio = self.beta * (stats.logprobs - rows["ref_logprobs"])
        fitted = Regression(values, terms.returns, scaled_ratio, terms.advantages)
        metrics = regression_metrics(terms.policy_loss, value_loss, fitted) | {
            "sampling/importance_sampling_ratio/mean": mean_metric(terms.weights),
            "importance_weight/clipped_frac": mean_metric(self._clipped(stats, rows, cu_seqlens)),
        }
        if self._level != "none":  # in float64: squares of weights that collapse are 0 in float32
            metrics |= moments("importance_weight", self._units(terms.weights, cu_seqlens).double())
        if self.needs_kl:
            loss = loss + self.kl_coef * stats.kl.sum()
            metrics["loss/kl"] = mean_metric(stats.kl)
        if self.nll_coef > 0:
            correct = right_tokens(rows, cu_seqlens)
            likelihood = torch.where(correct, stats.logprobs, 0.0)
            loss = loss - self.nll_coef * likelihood.sum()
            metrics["loss/nll"] = mean_metric(-likelihood, correct)
        return loss, metrics | of_loss | response_metrics(stats, rows, cu_seqlens, self.beta)

    def idle(self) -> tuple[str, tuple[str, ...]]:
        return ("nll_coef is 0", ("nll_on",)) if self.nll_coef == 0 else super().idle()

    @property
    def reads_steps(self) -> str:
        return "nll_on steps" if self.nll_coef > 0 and self.nll_on == "steps" else ""

    def prepare(self, columns: Columns) -> Selection:
        """Every response."""
        of_steps = {"right_length": columns.right_length} if self.reads_steps else {}
        return Selection(super().prepare(columns).groups, of_steps)

    def advice(self, labels: Sequence[bool], rewards: np.ndarray) -> list[str]:
        if self.nll_coef == 0 or self.reads_steps:
            return []
        right = sum(labels)
        if right in (0, len(labels)):
            what = "no response counts as correct: nll_coef has no effect"
            if right:
                what = "every response counts as correct: nll_coef makes all of them likely"
            return [f"{what}; is --reward_threshold right?"] * bool(labels)
        values = len(np.unique(rewards))
        if values > 2:
            return [
                f"rewards have {values:,} values, and {right:,} of {len(labels):,} responses count as correct, which nll_coef "
                "keeps likely: is --reward_threshold right? --nll_coef 0 goes by rewards alone"
            ]
        return []

    def evaluation(self, stats, rows, cu_seqlens):
        import torch

        loss, metrics = self(stats, rows, cu_seqlens)
        if self._level == "none":
            return loss, metrics
        weighted = torch.stack([loss.detach(), loss.new_tensor(float(stats.logprobs.numel()))])
        loss, plain = replace(self, is_level="none")(stats, rows, cu_seqlens)
        unweighted = {name: plain[name] for name in ("loss/policy", "loss/value")}
        return loss, metrics | unweighted | {"weighted_loss": weighted}

    def weights(self, log_ratio, cu_seqlens):
        from dqo_kernels.core.packed import sequence_index
        from dqo_kernels.soft_bellman import importance_weights

        if self._level == "none":
            return None
        sequence = sequence_index(cu_seqlens, log_ratio.shape[0])
        each = importance_weights(log_ratio, sequence, cu_seqlens, self._level, self.is_cap, self.is_floor)
        return self._units(each, cu_seqlens)

    @property
    def _level(self) -> str:
        """Called without the trainer, which chooses, "auto" is the paper's level."""
        return "trajectory" if self.is_level == "auto" else self.is_level

    def _units(self, weights, cu_seqlens):
        """One weight for each that may differ: of a response (B,), or of a token (N,)."""
        return weights[cu_seqlens[:-1]] if self._level == "trajectory" else weights

    def _clipped(self, stats, rows, cu_seqlens):
        """(N,) 1.0 where the log importance weight was beyond its cap or floor, by more than rounding."""
        from dqo_kernels.core.packed import sequence_index
        from dqo_kernels.soft_bellman import importance_weights

        logprobs = stats.logprobs.detach()
        ratio = logprobs - rows.get("behavior_logprobs", rows["ref_logprobs"])
        sequence = sequence_index(cu_seqlens, logprobs.shape[0])
        whole = importance_weights(ratio, sequence, cu_seqlens, self._level, None, None).log()
        bounded = self._level != "none"
        above = whole > (self.is_cap + 1e-6 if bounded and self.is_cap is not None else float("inf"))
        below = whole < (self.is_floor - 1e-6 if bounded and self.is_floor is not None else -float("inf"))
        return (above | below).to(logprobs.dtype)
