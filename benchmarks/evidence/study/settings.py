"""The methods, the declared settings of each, and the ablations: the same number of settings for every method that is tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from benchmarks.evidence.study.sizes import LENGTH, TASKS, Task

Settings = dict[str, Any]  # options of `dqo train`

COUNT = 6  # of settings, of every method
COMMON: Settings = {
    "max_length": LENGTH, "lr_scheduler_type": "constant", "adam_beta2": 0.99, "process_reward": "none", "eval_fraction": 0.0,
    "save_steps": 10_000, "save_total_limit": 1,
}  # fmt: skip
ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Method:
    fixed: Settings
    settings: list[Settings]
    file: str = ROWS  # of the task's data
    pairs: bool = False
    warm: bool = False  # the value model begins alone
    tuned_as: str | None = None  # the method whose setting is used; None: its own
    only: tuple[str, ...] = field(default_factory=tuple)  # tasks; (): wherever all methods are


def grid(rates: tuple[float, ...], **values: tuple) -> list[Settings]:
    names = ["learning_rate", *values]
    return [dict(zip(names, chosen)) for chosen in product(rates, *values.values())]


PLAIN_RATES = (3e-5, 6e-5, 1e-4, 2e-4, 4e-4, 8e-4)
RATES = (1e-4, 2e-4)
WIDE = (0.1, 0.3, 1.0)
HEAD: Settings = {"value_model": "head", "critic_learning_rate": 1e-3}
SEPARATE: Settings = {"value_model": "separate", "critic_learning_rate": 1e-3}
DQO: Settings = {"method": "dqo", "lam": 1.0, "is_level": "auto", **HEAD}
STEPS = grid(RATES, process_coef=(0.25, 0.5, 1.0))
LABELLED = ("d", "f")  # tasks with rewards of steps

METHODS: dict[str, Method] = {
    "sft": Method({"method": "sft"}, grid((3e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3))),
    "rft": Method({"method": "rft"}, grid(PLAIN_RATES)),
    "dpo": Method({"method": "dpo"}, grid((6e-5, 2e-4), beta=(0.1, 0.3, 0.8)), pairs=True),
    "kto": Method({"method": "kto"}, grid(RATES, beta=WIDE)),
    "dqo": Method(
        DQO,
        [
            {"learning_rate": 1e-4, "beta": 0.1},
            {"learning_rate": 1e-4, "beta": 0.2},
            {"learning_rate": 2e-4, "beta": 0.2},
            {"learning_rate": 2e-4, "beta": 0.4},
            {"learning_rate": 2e-4, "beta": 0.1, "is_level": "none"},
            {"learning_rate": 2e-4, "beta": 0.2, "is_level": "none"},
        ],
        warm=True,
    ),
    "shuffled": Method(DQO | {"shuffle_rewards": True}, [], warm=True, tuned_as="dqo"),
    "dqo-steps": Method(
        DQO | {"beta": 0.2, "process_reward": "additive"}, STEPS, file="steps.jsonl", warm=True, only=LABELLED
    ),
    "rft-steps": Method({"method": "rft"}, grid(PLAIN_RATES), file="prefixes.jsonl", only=LABELLED),
    "dpo-nll": Method(
        {"method": "dpo"}, grid((1e-4,), beta=(0.1, 0.3, 0.8), rpo_alpha=(0.1, 1.0)), pairs=True
    ),
    "dro": Method({"method": "dro", **SEPARATE}, grid(RATES, beta=(0.05, 0.2, 0.5)), warm=True),
    "oreo": Method({"method": "oreo", **SEPARATE}, grid(RATES, beta=(0.05, 0.2, 0.5)), warm=True),
    "qrpo": Method({"method": "qrpo"}, grid(RATES, beta=WIDE)),
    "rebel": Method({"method": "rebel"}, grid(RATES, beta=WIDE), pairs=True),
    "dqo-paper": Method(
        {"method": "dqo", "preset": "paper", "critic_learning_rate": 1e-3}, grid(RATES, beta=(0.1, 0.2, 0.4))
    ),
    "dqo-soft": Method({"method": "dqo", "preset": "soft"}, grid(RATES, beta=WIDE)),
    "dqo-noisy": Method(
        DQO | {"beta": 0.2, "process_reward": "additive"}, STEPS, file="noisy.jsonl", warm=True, only=("d",)
    ),
    "dqo-measured": Method(
        DQO | {"beta": 0.2, "process_reward": "potential"}, STEPS, file="measured.jsonl", warm=True, only=("d",)
    ),
    "dqo-unweighted": Method(
        DQO | {"is_level": "none"}, grid(RATES, beta=(0.1, 0.2, 0.4)), warm=True, only=("e1", "e3")
    ),
}  # fmt: skip
BASE = "base"  # the base model itself, which is not trained
RIVALS = ("sft", "rft", "dpo", "dpo-nll", "kto", "dro", "oreo", "qrpo", "rebel", "rft-steps")
FEWER = {  # tasks on which not all methods are run
    "b28": ("sft", "rft", "dpo", "kto", "dqo", "shuffled", "dqo-paper"),
    "e3": ("sft", "rft", "dpo", "kto", "dqo", "shuffled", "dqo-unweighted"),
    "g2": ("rft", "dpo", "kto", "dqo"),
    "g4": ("rft", "dpo", "kto", "dqo"),
}


def methods_of(task: str) -> list[str]:
    """The trained methods of a task, the main ones first."""
    there = [name for name, method in METHODS.items() if not method.only or task in method.only]
    return [name for name in there if task not in FEWER or name in FEWER[task]]


# One change at a time to the chosen options of dqo. "file" and "warmup" are not options of `dqo train`
Change = Callable[[Settings], Settings]
ABLATED = ("a", "b14")
ABLATIONS: dict[str, Change] = {
    "lambda 0.9": lambda _: {"lam": 0.9},
    "lambda 0.95": lambda _: {"lam": 0.95},
    "lambda 0.95, td": lambda _: {"lam": 0.95, "policy_target": "td"},
    "one_step": lambda _: {"policy_target": "one_step"},
    "weights of suffixes": lambda _: {"is_level": "suffix"},
    "no weights": lambda _: {"is_level": "none"},
    "weights of responses": lambda _: {"is_level": "trajectory"},
    "weights of responses, no cap": lambda _: {"is_level": "trajectory", "is_cap": None},
    "beta halved": lambda chosen: {"beta": chosen["beta"] / 2},
    "beta doubled": lambda chosen: {"beta": chosen["beta"] * 2},
    "beta times 4": lambda chosen: {"beta": chosen["beta"] * 4},
    "value model separate": lambda _: {"value_model": "separate"},
    "value model implicit": lambda _: {"value_model": "implicit", "critic_learning_rate": 3e-4},
    "soft values": lambda _: {"value_model": "none", "warmup": 0},
    "critic's rate 3e-4": lambda _: {"critic_learning_rate": 3e-4},
    "critic's rate 3e-3": lambda _: {"critic_learning_rate": 3e-3},
    "no warm-up": lambda _: {"warmup": 0},
    "warm-up 64": lambda _: {"warmup": 64},
    "2 samples a problem": lambda _: {"file": "samples-2.jsonl"},
    "4 samples a problem": lambda _: {"file": "samples-4.jsonl"},
}


def options_for(task: Task, method: Method, setting: Settings, change: Change | None = None) -> Settings:
    """Options of `dqo train` but for places and seed, for one round, and "file", the name of the data."""
    options = COMMON | method.fixed | setting
    options = {"file": method.file, "warmup": task.warmup if method.warm else 0} | options
    if change is not None:
        options |= change(options)
    warmup, updates = options.pop("warmup") // task.rounds, task.updates // task.rounds
    options |= {"max_steps": updates + warmup, "value_warmup_steps": warmup} if warmup else {"max_steps": updates}
    return options | {"per_device_train_batch_size": task.batch // 2 if method.pairs else task.batch}


def tuned_on(task: str) -> str:
    return TASKS[task].tuned_on or task
