"""Presets: options that are set together, in the place of their defaults. A flag, a YAML file and a keyword win over them.

`paper` is the setting of arXiv 2410.09302 as far as its text and its reviews tell it: lambda 1, importance weights of whole
responses with the cap e, no discount, a value model of its own that a squared error fits. beta, learning rates, batch and epochs
are not told there, and keep their defaults.

`soft` has no value model: V is beta * log (sum_a exp logit_a of pi) / (the same of ref), as in "From r to Q*" (arXiv 2404.12358),
whose language model is a Q-function with that V. That paper trains on preferences alone, so that the rest is ours: `paper`,
without importance weights, which matter where V is to be that of the policy.

`reasoning` has the options of DQO that did best on a real model whose answers are graded (`dqo-nll` in docs/evidence_results.md):
a head as the value model, which begins alone, and the likelihood of correct responses, without which these may become unlikely
together with the wrong ones.
"""

from __future__ import annotations

from typing import Any

from dqo.config.values import brief
from dqo.errors import UserError, did_you_mean

_PAPER: dict[str, Any] = {
    "method": "dqo",
    "gamma": 1.0,
    "discount": "tokens",
    "lam": 1.0,
    "policy_target": "return",
    "target": "detach",
    "target_ema": None,
    "is_level": "trajectory",
    "is_cap": 1.0,
    "is_floor": None,
    "policy_scale": 1.0,
    "value_coef": 1.0,
    "kl_coef": 0.0,
    "nll_coef": 0.0,
    "nll_on": "responses",
    "value_model": "separate",
    "value_loss": "squared",
    "value_init": "zero",
    "value_input": "states",
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "soft": _PAPER | {"value_model": "none", "is_level": "none"},
    "reasoning": _PAPER
    | {"beta": 0.03, "value_model": "head", "is_level": "auto", "nll_coef": 0.03}
    | {"value_warmup_steps": 0.2},
}

Given = dict[str, tuple[Any, str]]  # {option: (value, where it comes from)}


def under(given: Given, flags: Given) -> Given:
    """`given`, on top of the preset that it or `flags`, which win, names.

    Raises:
        UserError: for a preset that is none, and a method beside that of the preset.
    """
    name, source = (given | flags).get("preset", (None, ""))
    if name is None:
        return given
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise UserError(f"preset must be {known}, got {brief(name)} (from {source}).{did_you_mean(str(name), PRESETS)}")
    preset = PRESETS[name]
    method, its_source = (given | flags).get("method", (preset["method"], ""))
    if method != preset["method"]:
        raise UserError(
            f"preset {name} (from {source}) is of method {preset['method']}, and method is {method} (from {its_source}); remove "
            "one"
        )
    return {option: (value, f"preset {name}") for option, value in preset.items()} | given
