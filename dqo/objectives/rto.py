"""Reinforced Token Optimization (arXiv 2404.18922): the log-ratio of a model that DPO trained pays every token.

Sec. 4    r_t = beta1 * log( pi_dpo(y_t|s_t) / ref(y_t|s_t) ) + 1[t = T] * beta3 * R - beta2 * log( pi(y_t|s_t) / ref(y_t|s_t) )
L       = that of dqo/objectives/ppo.py, or of dqo/objectives/dqo.py, with these rewards

pi_dpo is a third model, frozen, whose log-probabilities are computed once and cached. reward_coef is beta3, R what the file pays,
that of steps too where it is used. With the algorithm ppo, the paper's, beta is beta2 and the rest is dqo/objectives/ppo.py. With
dqo the KL is its own, its temperature beta, and there are no importance weights: the optimum is ref * exp(Q/beta), so that with
beta = beta1 and reward_coef 0 it is pi_dpo itself, beside V = 0.

beta1 and reward_clip are 0.05 in the paper's script for 8B models, as dpo_reward_scale and dpo_reward_clip, and beta2 is 0.01.
How its code clips is not known here: reward_clip bounds beta1 * log(pi_dpo/ref) on both sides, and is off by default.

`dqo score --by implicit:RUN` writes sums of the same log-ratios over steps into a file: rewards of steps, not of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dqo.objectives.base import Columns, Objective, Selection
from dqo.objectives.dqo import DQO
from dqo.objectives.ppo import PPO


@dataclass(frozen=True)
class RTO(PPO):
    dpo_model: str | None = None
    """The model that DPO trained is in this directory, such as the output_dir of a run, or has this name on the hub."""
    algorithm: Literal["ppo", "dqo"] = "ppo"
    """What learns from the rewards: "ppo" (the paper) with all its options, or "dqo" with beta, gamma, discount, lam, target_ema,
    value_coef and value_model."""
    beta1: float = 0.05
    """The reward of a token is this times log(pi_dpo/ref)."""
    reward_coef: float = 1.0
    """The rewards of the file are multiplied by this, the paper's beta3, and added."""
    reward_clip: float | None = None
    """The reward of a token by log(pi_dpo/ref) is clipped to this size. None does not clip."""
    beta: float = 0.01
    """The KL penalty of a token is this times log(pi/ref): the paper's beta2, and with algorithm dqo the KL temperature."""

    not_of_dqo: ClassVar[tuple[str, ...]] = ("behavior", "clip_range", "whiten", "value_clip")
    reads_models: ClassVar[tuple[str, ...]] = ("dpo_model",)

    @property
    def needs_step_sums(self) -> bool:
        return self.algorithm == "ppo" and super().needs_step_sums

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems() + self.below(0, "reward_coef", "reward_clip")
        if self.algorithm == "dqo":
            found = [(name, what) for name, what in found if name not in self.not_of_dqo]
        return found + ([] if self.beta1 > 0 else [("beta1", f"must be positive, got {self.beta1}")])

    def idle(self) -> tuple[str, tuple[str, ...]]:
        return ("algorithm is dqo", self.not_of_dqo) if self.algorithm == "dqo" else super().idle()

    def prepare(self, columns: Columns) -> Selection:
        """Every response."""
        return super().prepare(columns) if self.algorithm == "ppo" else Objective.prepare(self, columns)

    def step_sums(self, stats, rows, cu_seqlens):
        return super().step_sums(stats, self._paid(rows), cu_seqlens)

    def __call__(self, stats, rows, cu_seqlens):
        from dqo.objectives.sums import mean_metric

        paid = self._paid(rows)
        if self.algorithm == "ppo":
            loss, metrics = super().__call__(stats, paid, cu_seqlens)
        else:
            shared = ("beta", "gamma", "discount", "lam", "target_ema", "value_coef", "value_model")
            dqo = DQO(is_level="none", nll_coef=0.0, **{name: getattr(self, name) for name in shared})
            loss, metrics = dqo(stats, paid, cu_seqlens)
        return loss, metrics | {"rto/token_reward": mean_metric(self._token_rewards(rows))}

    def _token_rewards(self, rows):
        """(N,) of log(pi_dpo/ref)."""
        rewards = self.beta1 * (rows["dpo_model_logprobs"] - rows["ref_logprobs"])
        return rewards if self.reward_clip is None else rewards.clamp(-self.reward_clip, self.reward_clip)

    def _paid(self, rows):
        """The rows with the reward of every token, but for the KL penalty."""
        return rows | {"rewards": self._token_rewards(rows) + self.reward_coef * rows["rewards"]}
