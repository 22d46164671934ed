"""Options of every objective on the demonstration's file, at one budget."""

from __future__ import annotations

from typing import Any

from dqo.demo.recipe import Recipe

RECIPE = Recipe()
BATCH, UPDATES = 256, 128  # twice the demonstration's 16,384 graded samples
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "max_steps": UPDATES,
    "max_length": 256,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.99,
    "process_reward": "none",
    "learning_rate": 1e-4,
}
WITH_VALUES = {"critic_learning_rate": 1e-3, "value_warmup_steps": 64}
PAIRS = {"beta": 0.7, "learning_rate": 6e-5}
PPO = {"behavior": "reference", **WITH_VALUES}  # the base model wrote the file, and stored no log-probabilities
# {OUT}: the directory of the comparison. Those of rft, dpo and dqo were tried on another seed, all others are first guesses.
OPTIONS: dict[str, dict[str, Any]] = {
    "sft": {},
    "rft": {},
    "dpo": PAIRS,
    "curry_dpo": {**PAIRS, "stages": 3},
    "rank_dpo": PAIRS,
    "kto": {"beta": 0.5},
    "rebel": {"beta": 0.2},
    "qrpo": {"beta": 0.2},
    "tbrm": {"beta": 0.2},
    "dro": {"beta": 0.2, **WITH_VALUES},
    "oreo": {"beta": 0.2, **WITH_VALUES},
    "dqo": {"beta": 0.2, "value_model": "separate", "nll_coef": 0.0, **WITH_VALUES},  # as those beside it that fit values
    "dapo": {"beta": 0.2, "process_reward": "potential", "dataset_name": "{OUT}-data/prefix_values.jsonl", **WITH_VALUES},
    "ppo": {"beta": 0.05, **PPO},
    "rto": {"beta": 0.01, "beta1": 0.05, "dpo_model": "{OUT}/dpo-seed0", **PPO},
    # a language model is its critic; the paper's average, of decay 0.995, goes less than half of the way in as many steps
    "etpo": {"beta": 0.2, "target_ema": 0.9, **WITH_VALUES, "critic_learning_rate": 3e-4},
}  # fmt: skip
# Of the comparison alone
WARMUP = 32
BUDGET: dict[str, Any] = {"max_steps": 64, "per_device_train_batch_size": 128, "seed": 0, "eval_fraction": 0.05}
PROBLEMS, SAMPLES = 250, 2


def own_options(method: str) -> dict[str, Any]:
    """Those of one method in the comparison."""
    options = dict(OPTIONS[method])
    if "value_warmup_steps" in options:
        options["value_warmup_steps"] = WARMUP
    if method == "rank_dpo":
        options["per_device_train_batch_size"] = BUDGET["per_device_train_batch_size"] // RECIPE.samples
    return options
