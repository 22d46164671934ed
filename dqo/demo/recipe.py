"""The demonstration's options and numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DemoConfig:
    """Trains a tiny model by SFT, RFT, DPO and DQO on the built-in arithmetic task and compares them: no network, no GPU."""

    output_dir: str = "dqo-demo"
    """The directory where data, models and report.html are written. A demonstration that was killed goes on there."""
    seed: int = 0
    """Problems, model and samples depend on this seed. The task's hard entries do not."""

    def problems(self) -> list[tuple[str, str]]:
        return [] if self.seed >= 0 else [("seed", f"must be at least 0, got {self.seed}")]


@dataclass(frozen=True)
class Recipe:
    """Every number of the demonstration."""

    min_steps: int = 6
    max_steps: int = 10
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    intermediate_size: int = 128
    initializer_range: float = (
        0.05  # at width 64 the usual 0.02 leaves the model unable to copy from the prompt for long
    )
    demonstrations: int = 51200
    sft_batch: int = 64
    sft_epochs: float = 1.0
    sft_learning_rate: float = 5e-3
    prompts: int = 2048
    samples: int = 8
    eval_problems: int = 1000
    eval_samples: int = 4
    held_out_problems: int = 250  # whose base samples show what the value model knows
    batch: int = 256
    updates: int = 128  # of the policy, by every method, with batches of `batch` responses
    learning_rates: dict[str, float] = field(
        default_factory=lambda: {"sft": 1e-3, "rft": 1e-4, "dpo": 6e-5, "dqo": 1e-4}
    )
    critic_learning_rate: float = 1e-3
    value_warmup_updates: int = 64  # of the value model alone
    betas: dict[str, float] = field(default_factory=lambda: {"dpo": 0.7, "dqo": 0.2})

    @property
    def max_new_tokens(self) -> int:
        """A step has six characters with its newline, the answer two, and EOS one."""
        return 6 * self.max_steps + 4


METHODS = {"sft": "sft-continued", "rft": "rft", "dpo": "dpo", "dqo": "dqo"}
