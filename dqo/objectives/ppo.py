"""Proximal Policy Optimization on stored responses, offline and clipped (arXiv 1707.06347; for language models 2307.04964).

eq. 7    L_pi = - min( rho_t * A_t, clip( rho_t, 1 - clip_range, 1 + clip_range ) * A_t )           a token; A_t held fixed
         L_V  = value_coef * 1/2 max( ( V(s_t) - G_t )^2, ( V_clip - G_t )^2 )                      a token; G_t held fixed

         rho_t = pi(y_t|s_t) / mu(y_t|s_t)                             mu: the policy that wrote the responses, stored
         k_t = r_t - beta * ( log pi(y_t|s_t) - log ref(y_t|s_t) )     reward with the KL penalty; held fixed
         A_t = G_t - V_old(s_t)
         G_t = k_t + gamma * ( (1 - lam) * V_old(s_{t+1}) + lam * G_{t+1} )                         GAE (arXiv 1506.02438)
         V_clip = V_old + clip( V - V_old, -value_clip, value_clip )

eq. 7 is that of 1707.06347; both papers take the rest from implementations, and clip_range, value_clip, lam, gamma, beta and
value_coef are the defaults of TRL's PPO. With whiten the A_t of eq. 7 are those of the step, less their mean and over their
standard deviation; those of G_t are not. Nothing is sampled again: mu stays what it was, so that rho_t is no step of a proximal
iteration but the whole way from the data, clip_range bounds that way, and the weights of the states before t are left out. V_old,
elsewhere the values of the last sampling, is the moving average of the value model, and V itself without value_clip.

Where every rho_t is 1 and nothing is clipped or whitened, the gradient is that of DQO with policy_target td, over beta. Where no
ratio is clipped, ref * exp(Q/beta), the optimum of DQO, is a fixed point: there every A_t is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from dqo.errors import UserError
from dqo.objectives.base import Columns, Objective, Selection

FAR = 20.0  # of a log-ratio, beyond which it is held: exp of more is no use, and soon no float32


@dataclass(frozen=True)
class PPO(Objective):
    beta: float = 0.05
    """The KL penalty of a token is this times log(pi/ref)."""
    gamma: float = 1.0
    """A reward is discounted by this factor where discount says."""
    discount: Literal["tokens", "turns"] = "tokens"
    """The places where gamma acts: each token that the model wrote, or the last token of each of its turns alone."""
    lam: float = 0.95
    """The generalised advantage estimate has this lambda."""
    behavior: Literal["stored", "reference"] = "stored"
    """Whose log-probabilities the ratio is to: the stored ones of the policy that wrote the responses, or the reference's, for a
    file that the reference wrote at temperature 1."""
    clip_range: float | None = 0.2
    """The ratio to the policy that wrote the responses is clipped to 1 - clip_range and 1 + clip_range. None does not clip."""
    whiten: bool = True
    """The advantages of an optimizer step are shifted and scaled to mean 0 and variance 1. It costs one more forward pass."""
    value_clip: float | None = 0.2
    """The values are clipped to at most this distance from their moving average, and the larger of both losses counts. None does
    not clip."""
    target_ema: float | None = 0.9
    """The moving average of the value model has this decay; advantages and returns are made of it. None takes the value model
    itself, and needs value_clip None."""
    value_coef: float = 0.1
    """The value loss is multiplied by this factor."""
    value_model: str = "separate"
    """ "separate" trains a model of its own, from the policy's trunk and a zero head. "head" trains an MLP on the policy's
    hidden states. The directory of a run, of its critic/ or of a model with one label begins from the value model there."""

    unit: ClassVar[str] = "token"

    @property
    def needs_step_sums(self) -> bool:
        return self.whiten

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems() + self.below(0, "value_coef", "clip_range", "value_clip")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                found.append((name, f"must be in [0, 1], got {getattr(self, name)}"))
        if self.target_ema is not None and not 0 <= self.target_ema < 1:
            found.append(("target_ema", f"must be in [0, 1) or None, got {self.target_ema}"))
        if self.target_ema is None and self.value_clip is not None:
            found.append(
                ("value_clip", "must be None without target_ema: there is nothing that the values could leave")
            )
        return found + self.no_value_model("separate", "head")

    def prepare(self, columns: Columns) -> Selection:
        """Every response.

        Raises:
            UserError: where log-probabilities are read that are not stored.
        """
        if self.behavior == "stored" and not columns.has_logprobs.all():
            known = int(columns.has_logprobs.sum())
            first = columns.source[int(np.argmin(columns.has_logprobs))]
            raise UserError(
                f"ppo reads the log-probabilities of the policy that wrote the responses, and {known:,} of "
                f"{len(columns.has_logprobs):,} responses have them (the first without: {first}); `dqo sample` stores them as "
                "logprobs. --behavior reference takes those of the reference, for a file that it wrote at temperature 1"
            )
        return super().prepare(columns)

    def step_sums(self, stats, rows, cu_seqlens):
        from dqo.objectives.sums import mean_metric

        advantages = self._fitted(stats, rows, cu_seqlens)[0]
        return {"advantage_mean": mean_metric(advantages), "advantage_square": mean_metric(advantages.square())}

    def __call__(self, stats, rows, cu_seqlens):
        import torch

        from dqo.objectives.sums import Regression, mean_metric, regression_metrics, response_metrics

        advantages, returns = self._fitted(stats, rows, cu_seqlens)
        wanted = advantages
        if self.whiten:
            variance = rows["advantage_square"] - rows["advantage_mean"].square()
            wanted = (advantages - rows["advantage_mean"]) * (variance.clamp(min=0.0) + 1e-8).rsqrt()
        behavior = rows["behavior_logprobs" if self.behavior == "stored" else "ref_logprobs"]
        log_ratio = stats.logprobs - behavior
        ratio = log_ratio.clamp(-FAR, FAR).exp()
        clipped = ratio if self.clip_range is None else ratio.clamp(1.0 - self.clip_range, 1.0 + self.clip_range)
        policy_loss = -torch.minimum(ratio * wanted, clipped * wanted)  # (N,) eq. 7

        values, old = rows["values"], self._old(rows)
        value_loss = 0.5 * (values - returns).square()
        far = torch.zeros_like(values)
        if self.value_clip is not None:
            near = old + (values - old).clamp(-self.value_clip, self.value_clip)
            value_loss = torch.maximum(value_loss, 0.5 * (near - returns).square())
            far = ((values - old).abs() > self.value_clip).to(values.dtype)

        scaled_ratio = self.beta * (stats.logprobs - rows["ref_logprobs"]).detach()
        metrics = regression_metrics(
            policy_loss, value_loss, Regression(values, returns, scaled_ratio, advantages + scaled_ratio)
        )
        metrics |= {
            "ppo/ratio": mean_metric(ratio),
            "ppo/clipped_frac": mean_metric((clipped * wanted < ratio * wanted).to(ratio.dtype)),
            "ppo/values_clipped_frac": mean_metric(far),
            "ppo/approx_kl": mean_metric((ratio - 1.0) - log_ratio),  # k3 to the policy that wrote the responses
        }
        metrics |= response_metrics(stats, rows, cu_seqlens, self.beta)
        return policy_loss.sum() + self.value_coef * value_loss.sum(), metrics

    def _fitted(self, stats, rows, cu_seqlens):
        """(N,) A_t before whitening and G_t, without a gradient."""
        from dqo.objectives.sums import discounts
        from dqo_kernels import soft_bellman

        logprobs = stats.logprobs.detach()
        terms = soft_bellman(
            logprobs,
            rows["ref_logprobs"],
            rows["rewards"],
            self._old(rows),
            cu_seqlens,
            bootstrap=rows["bootstrap"][cu_seqlens[1:] - 1] if "bootstrap" in rows else None,
            beta=self.beta,
            gamma=self.gamma,
            discounts=discounts(self, rows),
            lam=self.lam,
            policy_target="td",
            is_level="none",
            reduction="none",
        )  # terms.advantages: without the KL penalty of the token itself
        return terms.advantages - self.beta * (logprobs - rows["ref_logprobs"]), terms.returns

    def _old(self, rows):
        """(N,) V_old."""
        return (rows["values"] if self.target_ema is None else rows["target_values"]).detach()
