"""The methods, the declared settings of each, and the ablations: the same number of settings for every method that is tuned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from benchmarks.evidence.study.sizes import LENGTH, TASKS

Settings = dict[str, Any]  # options of `dqo train`

COUNT = 9  # of settings, of every method
COMMON: Settings = {
    "max_length": LENGTH, "lr_scheduler_type": "constant", "adam_beta2": 0.99, "process_reward": "none", "eval_fraction": 0.0,
    "save_steps": 10_000, "save_total_limit": 1,
}  # fmt: skip
ROWS, MISLABELLED = "rows.jsonl", "mislabelled.jsonl"


@dataclass(frozen=True)
class Method:
    fixed: Settings
    settings: list[Settings]
    file: str = ROWS  # of the task's data
    pairs: bool = False
    warm: bool = False  # the value model begins alone
    tuned_as: str | None = None  # the method whose setting is used; None: its own
    only: tuple[str, ...] = field(default_factory=tuple)  # tasks; (): wherever all methods are
    added: bool = False  # when results were known: it is not tested


def grid(rates: tuple[float, ...], **values: tuple) -> list[Settings]:
    return listed(*product(rates, *values.values()), names=("learning_rate", *values))


def listed(*chosen: tuple[float, ...], names: Sequence[str] = ("learning_rate", "beta")) -> list[Settings]:
    return [dict(zip(names, values)) for values in chosen]


# A list's last three are beyond the edges of its first six, where the best of task `a` lay
RFT_RATES = (3e-5, 6e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1e-5, 4.5e-5, 1.6e-3)
RATES = (1e-4, 2e-4)
WIDE = (0.1, 0.3, 1.0)
SMALL_BETA = listed((1e-4, 0.03), (2e-4, 0.03), (1e-4, 0.01))
HEAD: Settings = {"value_model": "head", "critic_learning_rate": 1e-3}
SEPARATE: Settings = {"value_model": "separate", "critic_learning_rate": 1e-3}
DQO: Settings = {"method": "dqo", "lam": 1.0, "is_level": "auto", **HEAD}
STEPS = grid(RATES, process_coef=(0.25, 0.5, 1.0)) + listed(
    (1e-4, 2.0), (2e-4, 2.0), (4e-4, 1.0), names=("learning_rate", "process_coef")
)
STEPS_NLL = ("learning_rate", "process_coef", "beta", "nll_coef")
LABELLED = ("d", "f")  # tasks with rewards of steps

METHODS: dict[str, Method] = {
    "sft": Method({"method": "sft"}, grid((3e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 1e-5, 6e-5, 3.2e-3))),
    "rft": Method({"method": "rft"}, grid(RFT_RATES)),
    "dpo": Method(
        {"method": "dpo"},
        grid((6e-5, 2e-4), beta=(0.1, 0.3, 0.8)) + listed((3e-5, 0.8), (6e-5, 2.0), (1e-4, 2.0)),
        pairs=True,
    ),
    "kto": Method({"method": "kto"}, grid(RATES, beta=WIDE) + listed((2e-4, 3.0), (4e-4, 1.0), (4e-4, 3.0))),
    "dqo": Method(
        DQO,
        [
            {"learning_rate": 1e-4, "beta": 0.1},
            {"learning_rate": 1e-4, "beta": 0.2},
            {"learning_rate": 2e-4, "beta": 0.2},
            {"learning_rate": 2e-4, "beta": 0.4},
            {"learning_rate": 2e-4, "beta": 0.1, "is_level": "none"},
            {"learning_rate": 2e-4, "beta": 0.2, "is_level": "none"},
            *listed((1e-4, 0.05), (2e-4, 0.1), (4e-4, 0.2)),
        ],
        warm=True,
    ),
    "dqo-nll": Method(
        DQO,
        listed(
            (1e-4, 0.1, 0.02), (2e-4, 0.05, 0.02), (2e-4, 0.1, 0.01), (2e-4, 0.1, 0.02), (2e-4, 0.1, 0.04), (2e-4, 0.2, 0.04),
            (4e-4, 0.1, 0.02), (4e-4, 0.1, 0.04), (4e-4, 0.2, 0.04), names=("learning_rate", "beta", "nll_coef"),
        ),
        warm=True,
        added=True,
    ),
    "shuffled": Method(DQO | {"shuffle_rewards": True}, [], warm=True, tuned_as="dqo"),
    "dqo-steps": Method(
        DQO | {"beta": 0.2, "process_reward": "additive"}, STEPS, file="steps.jsonl", warm=True, only=LABELLED
    ),
    "rft-steps": Method({"method": "rft"}, grid(RFT_RATES), file="prefixes.jsonl", only=LABELLED),
    "dpo-nll": Method(
        {"method": "dpo"},
        grid((1e-4,), beta=(0.1, 0.3, 0.8), rpo_alpha=(0.1, 1.0))
        + listed((1e-4, 0.3, 3.0), (1e-4, 0.8, 3.0), (2e-4, 0.3, 1.0), names=("learning_rate", "beta", "rpo_alpha")),
        pairs=True,
    ),
    "dro": Method(
        {"method": "dro", **SEPARATE},
        grid(RATES, beta=(0.05, 0.2, 0.5)) + listed((1e-4, 0.1), (2e-4, 0.1), (4e-4, 0.2)),
        warm=True,
    ),
    "oreo": Method(
        {"method": "oreo", **SEPARATE},
        grid(RATES, beta=(0.05, 0.2, 0.5)) + listed((2e-4, 0.02), (4e-4, 0.02), (4e-4, 0.05)),
        warm=True,
    ),
    "qrpo": Method({"method": "qrpo"}, grid(RATES, beta=WIDE) + SMALL_BETA),
    "rebel": Method({"method": "rebel"}, grid(RATES, beta=WIDE) + SMALL_BETA, pairs=True),
    "dqo-paper": Method(
        {"method": "dqo", "preset": "paper", "critic_learning_rate": 1e-3},
        grid(RATES, beta=(0.1, 0.2, 0.4)) + listed((1e-4, 0.05), (2e-4, 0.05), (4e-4, 0.2)),
    ),
    "dqo-soft": Method(
        {"method": "dqo", "preset": "soft"}, grid(RATES, beta=WIDE) + listed((4e-4, 0.1), (4e-4, 0.3), (8e-4, 0.3))
    ),
    "dqo-steps-nll": Method(
        DQO | {"process_reward": "additive", "nll_on": "steps"},
        listed(
            (2e-4, 1.0, 0.2, 0.05), (2e-4, 1.0, 0.2, 0.1), (2e-4, 0.5, 0.1, 0.1), (4e-4, 0.5, 0.1, 0.1),
            (4e-4, 0.5, 0.2, 0.1), (4e-4, 1.0, 0.2, 0.1), (4e-4, 1.0, 0.2, 0.2), (4e-4, 1.0, 0.2, 0.4),
            (8e-4, 1.0, 0.2, 0.2), names=STEPS_NLL,
        ),
        file="steps.jsonl", warm=True, only=LABELLED, added=True,
    ),
    "dqo-noisy-nll": Method(
        DQO | {"process_reward": "additive", "nll_on": "steps"},
        listed(
            (1e-4, 0.25, 0.2, 0.05), (2e-4, 0.25, 0.2, 0.02), (2e-4, 0.25, 0.2, 0.05), (2e-4, 0.25, 0.2, 0.1),
            (2e-4, 0.25, 0.1, 0.05), (2e-4, 0.5, 0.2, 0.05), (2e-4, 0.5, 0.2, 0.1), (4e-4, 0.25, 0.2, 0.05),
            (4e-4, 0.25, 0.2, 0.1), names=STEPS_NLL,
        ),
        file=MISLABELLED, warm=True, only=("d",), added=True,
    ),
    "dqo-measured-nll": Method(
        DQO | {"process_reward": "potential"},
        listed(
            (1e-4, 0.5, 0.1, 0.02), (2e-4, 0.25, 0.1, 0.02), (2e-4, 0.5, 0.1, 0.01), (2e-4, 0.5, 0.1, 0.02),
            (2e-4, 1.0, 0.1, 0.02), (2e-4, 0.5, 0.05, 0.02), (2e-4, 0.5, 0.1, 0.04), (4e-4, 0.5, 0.1, 0.02),
            (2e-4, 0.5, 0.2, 0.02), names=STEPS_NLL,
        ),
        file="measured.jsonl", warm=True, only=("d",), added=True,
    ),
    "rft-noisy": Method(
        {"method": "rft", "imitate": "steps"}, grid(RFT_RATES), file=MISLABELLED, only=("d",), added=True
    ),
    "rft-noisy-whole": Method(
        {"method": "rft"}, grid(RFT_RATES), file="mislabelled-whole.jsonl", only=("d",), added=True
    ),
    "dqo-noisy": Method(
        DQO | {"beta": 0.2, "process_reward": "additive"}, STEPS, file=MISLABELLED, warm=True, only=("d",)
    ),
    "dqo-measured": Method(
        DQO | {"beta": 0.2, "process_reward": "potential"}, STEPS, file="measured.jsonl", warm=True, only=("d",)
    ),
    "dqo-unweighted": Method(
        DQO | {"is_level": "none"},
        grid(RATES, beta=(0.1, 0.2, 0.4)) + listed((1e-4, 0.05), (2e-4, 0.05), (4e-4, 0.2)),
        warm=True,
        only=("e1", "e3"),
    ),
}  # fmt: skip
BASE = "base"  # the base model itself, which is not trained
RIVALS = ("sft", "rft", "dpo", "dpo-nll", "kto", "dro", "oreo", "qrpo", "rebel", "rft-steps")
FEWER = {  # tasks on which not all methods are run
    "b28": ("sft", "rft", "dpo", "kto", "dqo", "dqo-nll", "shuffled", "dqo-paper"),
    "e3": ("sft", "rft", "dpo", "kto", "dqo", "dqo-nll", "shuffled", "dqo-unweighted"),
    "g2": ("rft", "dpo", "kto", "dqo", "dqo-nll"),
    "g4": ("rft", "dpo", "kto", "dqo", "dqo-nll"),
}


def methods_of(task: str) -> list[str]:
    """The trained methods of a task, the main ones first."""
    there = [name for name, method in METHODS.items() if not method.only or task in method.only]
    return [name for name in there if task not in FEWER or name in FEWER[task]]


# Bad responses over good ones in the files of a task: with this weight of the good ones kto reads as much of both
BALANCE = {"a": 1.3, "b14": 6.7, "b28": 50.0, "c": 20.0, "d": 9.0, "e1": 1.7, "e3": 1.5, "f": 1.6}
FAR_FROM_0 = ("f", "g2", "g4")  # where a value model would need more than its warm-up to reach the mean return


def of_task(task: str, method: Method) -> Settings:
    """Options that a task's data ask for."""
    if method.fixed["method"] == "kto":
        return {"desirable_weight": BALANCE[{"g2": "a", "g4": "a"}.get(task, task)]}
    fitted = method.fixed.get("value_model") in ("head", "separate") or method.fixed.get("preset") == "paper"
    return {"value_init": "mean_return"} if fitted and task in FAR_FROM_0 else {}


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
    "weights of responses, no cap": lambda _: {"is_level": "trajectory", "is_cap": None},
    "weights of responses, floor -1": lambda _: {"is_level": "trajectory", "is_floor": -1.0},
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
    "likelihood 0.02": lambda _: {"nll_coef": 0.02},
    "implicit, likelihood 0.02": lambda _: {"value_model": "implicit", "critic_learning_rate": 3e-4, "nll_coef": 0.02},
}


def options_for(name: str, method: Method, setting: Settings, change: Change | None = None) -> Settings:
    """Options of `dqo train` for a task, but for places and seed, for one round, and "file", the name of the data."""
    task = TASKS[name]
    options = COMMON | method.fixed | of_task(name, method) | setting
    options = {"file": method.file, "warmup": task.warmup if method.warm else 0} | options
    if change is not None:
        options |= change(options)
    warmup, updates = options.pop("warmup") // task.rounds, task.updates // task.rounds
    options |= {"max_steps": updates + warmup, "value_warmup_steps": warmup} if warmup else {"max_steps": updates}
    return options | {"per_device_train_batch_size": task.batch // 2 if method.pairs else task.batch}


def tuned_on(task: str) -> str:
    return TASKS[task].tuned_on or task
