"""Direct Q-function Optimization (arXiv 2410.09302, eqs. 4.6 and 4.7); the mathematics is `dqo_kernels.soft_bellman`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True)
class DQO:
    beta: float = 0.1
    """KL temperature: Q = V + beta * log(pi/ref)."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 1.0
    """lambda of the lambda-return; the paper's ablation prefers 1."""
    policy_target: Literal["return", "td", "one_step"] = "return"
    """What the policy regresses on: the lambda-return of the next state (the paper), its TD(lambda) form, or V."""
    target: Literal["detach", "residual"] = "detach"
    """"residual" trains both ends of the soft Bellman residual."""
    is_level: Literal["trajectory", "suffix", "prefix", "token", "none"] = "trajectory"
    """Level of the importance weights; "trajectory" is the paper's."""
    is_cap: float | None = 1.0
    """Cap of the log importance weight (1.0: weights up to e)."""
    is_floor: float | None = None
    """Floor of the log importance weight."""
    policy_scale: float = 1.0
    """Factor of the policy loss."""
    value_coef: float = 1.0
    """Factor of the value loss."""
    value_model: Literal["separate", "head", "none"] = "separate"
    """"separate": a model of its own, from the policy's trunk and a zero head; "none": soft values from the logsumexp."""

    unit: ClassVar[str] = "token"
    needs_kl: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True

    @property
    def needs_values(self) -> bool:
        return self.value_model != "none"

    def problems(self) -> list[tuple[str, str]]:
        found = []
        if not self.beta > 0:
            found.append(("beta", f"must be positive, got {self.beta}"))
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                found.append((name, f"must be in [0, 1], got {getattr(self, name)}"))
        if self.is_cap is not None and self.is_floor is not None and self.is_floor > self.is_cap:
            found.append(("is_floor", f"must be at most is_cap = {self.is_cap}, got {self.is_floor}"))
        return found

    def prepare(self, episodes: list) -> list:
        return episodes

    def __call__(self, stats, rows, cu_seqlens):
        from dqo.objectives.sums import implicit_rewards, mean_metric, moments
        from dqo_kernels import soft_bellman

        last = cu_seqlens[1:] - 1
        terms = soft_bellman(
            stats.logprobs,
            rows["ref_logprobs"],
            rows["rewards"],
            rows["values"] if self.needs_values else None,
            cu_seqlens,
            behavior_logprobs=rows.get("behavior_logprobs"),
            lse=stats.lse,
            ref_lse=rows.get("ref_lse"),
            target_values=rows.get("target_values"),
            bootstrap=rows["bootstrap"][last] if "bootstrap" in rows else None,
            beta=self.beta,
            gamma=self.gamma,
            lam=self.lam,
            policy_target=self.policy_target,
            target=self.target,
            is_level=self.is_level,
            is_cap=self.is_cap,
            is_floor=self.is_floor,
        )
        loss = self.policy_scale * terms.policy_loss
        if self.target == "detach":
            loss = loss + self.value_coef * terms.value_loss
        n = stats.logprobs.new_tensor(float(stats.logprobs.numel()))
        weights, capped = terms.weights, 1.0 if self.is_cap is None else 2.718281828459045**self.is_cap * (1 - 1e-6)
        log_ratio = stats.logprobs - rows["ref_logprobs"]
        soft_values = self.beta * (stats.lse - rows["ref_lse"]) if not self.needs_values else rows["values"]
        metrics = {
            "loss/policy": _pair(terms.policy_loss, n),
            "loss/value": _pair(terms.value_loss, n),
            "sampling/importance_sampling_ratio/mean": mean_metric(weights),
            "importance_weight/clipped_frac": mean_metric((weights >= capped).to(weights.dtype)),
            "value/mean": mean_metric(soft_values),
            "returns/mean": mean_metric(terms.returns),
            "advantages/mean": mean_metric(terms.advantages),
            "td_error/abs_mean": mean_metric((self.beta * log_ratio - terms.advantages).abs()),
        }
        metrics |= moments("returns", terms.returns) | moments("value_error", terms.returns - soft_values)
        return loss, metrics | implicit_rewards(log_ratio, rows["label"], cu_seqlens, self.beta)


def _pair(total, count):
    import torch

    return torch.stack([total.detach(), count])
