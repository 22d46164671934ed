"""The demonstration's options and numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

HALF_RIGHT, NOISY = "half_right.jsonl", "noisy_labels.jsonl"  # what the methods train on
SHOWN = ("dqo", "dqo-steps", "dqo-noisy")


def _methods() -> dict[str, dict[str, Any]]:
    """{name: options, and the file of the data}: the best of nine settings on another base model (docs/evidence.md, task `d`)."""
    critic = {"method": "dqo", "critic_learning_rate": 1e-3, "beta": 0.1}
    steps = critic | {"nll_on": "steps", "process_reward": "additive"}
    imitating = {"method": "rft", "imitate": "steps"}
    found: dict[str, dict[str, Any]] = {
        "rft": {"method": "rft", "learning_rate": 6e-5},
        "dpo": {"method": "dpo", "learning_rate": 1e-4, "beta": 2.0},
        "kto": {"method": "kto", "learning_rate": 2e-4, "beta": 3.0, "desirable_weight": 9.0},
        "dqo": critic | {"learning_rate": 2e-4, "nll_coef": 0.02},
        "rft-steps": imitating | {"learning_rate": 4e-4},
        "dqo-steps": steps | {"learning_rate": 4e-4, "nll_coef": 0.1, "process_coef": 0.5},
        "rft-noisy": imitating | {"learning_rate": 1e-4, "file": NOISY},
        "dqo-noisy": steps
        | {"learning_rate": 4e-4, "nll_coef": 0.05, "process_coef": 0.25, "beta": 0.2, "file": NOISY},
    }
    return {name: {"file": HALF_RIGHT} | options for name, options in found.items()}


@dataclass(frozen=True)
class DemoConfig:
    """Trains a tiny model by RFT, DPO, KTO and DQO on the built-in arithmetic task and compares them: no network, no GPU."""

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
    rows: int = 4096  # half-right responses, on which the methods train
    right_share: float = 0.1  # of them, that are right
    wrong_labels: float = 0.2  # a share of the labels of steps, in the file with noise
    held_out_problems: int = 250  # whose base samples show what the value model knows
    batch: int = 128
    updates: int = 96  # of the policy, by every method, with batches of `batch` responses
    value_warmup_updates: int = 32  # of the value model alone
    methods: dict[str, dict[str, Any]] = field(default_factory=_methods)

    @property
    def max_new_tokens(self) -> int:
        """A step has six characters with its newline, the answer two, and EOS one."""
        return 6 * self.max_steps + 4
