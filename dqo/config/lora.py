"""Checks that a peft.LoraConfig asks for plain LoRA, before any work and without torch."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from dqo.config.options import Options
from dqo.errors import UserError

# Fields whose every value is plain LoRA: fixed weights plus scale * B A, with B = 0 at the start.
PLAIN = {
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "fan_in_fan_out",  # peft itself corrects a wrong one
    "use_rslora",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "revision",
}
# Fields that say nothing of the training, or that the trainer sets.
BOOKKEEPING = {"peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "inference_mode"}
PREFIX = "peft_config."  # of its fields among the options of a run
SAME_AS_DEFAULT = {"init_lora_weights": ("gaussian",), "task_type": ("CAUSAL_LM",)}


def check_lora_config(config: Any) -> None:
    """Refuses each field that is neither plain LoRA nor at its default, by its name, and so also those that a later
    peft adds.

    Raises:
        UserError: for another class of configuration, or a field that would make the reference, critic or a reload wrong.
    """
    if type(config).__name__ != "LoraConfig":  # AdaLoraConfig and others inherit from it
        raise UserError(f"peft_config is a {type(config).__name__}; only peft.LoraConfig is supported")
    if config.lora_dropout:
        raise UserError(
            f"lora_dropout is {config.lora_dropout}; with dropout the policy would differ from itself: use 0"
        )
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), _default(field)
        if field.name in PLAIN | BOOKKEEPING or value == default or (not value and not default):
            continue
        told = getattr(value, "value", value)  # of an enumeration
        if str(told).lower() not in map(str.lower, SAME_AS_DEFAULT.get(field.name, ())):
            raise UserError(
                f"peft_config: {field.name}={told!r} is not plain LoRA, which alone can be switched off for the reference and "
                f"merged into the critic; leave it at {default!r}"
            )
    for name, values in (("r", [config.r]), ("rank_pattern", config.rank_pattern.values())):
        if any(type(value) is not int or value < 1 for value in values):
            raise UserError(f"peft_config: {name}={getattr(config, name)!r}; a rank is a whole number of at least 1")
    for name, values in (("lora_alpha", [config.lora_alpha]), ("alpha_pattern", config.alpha_pattern.values())):
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise UserError(f"peft_config: {name}={getattr(config, name)!r}; it must be positive and finite")


def check_lora_options(config: Any, options: Options) -> None:
    """Refuses an option lora_* that was given and says something else than the peft.LoraConfig.

    Raises:
        UserError: naming both.
    """
    targets = config.target_modules
    told = {
        "lora_r": ("r", config.r),
        "lora_alpha": ("lora_alpha", config.lora_alpha),
        "lora_target_modules": (
            "target_modules",
            targets if targets is None or isinstance(targets, str) else {*targets},
        ),
    }
    for option, (field, value) in told.items():
        given = getattr(options.train, option)
        if option in options.sources and (set(given) if isinstance(given, tuple) else given) != value:
            raise UserError(
                f"{option} {given} (from {options.sources[option]}) and peft_config with {field}={value!r} contradict each "
                "other; remove one"
            )


def described(config: Any) -> dict[str, Any]:
    """{"peft_config.r": 8, ...}: the fields that say what is trained, as they are after writing to JSON and reading back."""
    values = {name: getattr(config, name) for name in sorted(PLAIN) if hasattr(config, name)}
    values = {name: sorted(value) if isinstance(value, (set, list, tuple)) else value for name, value in values.items()}
    return json.loads(json.dumps({f"{PREFIX}{name}": value for name, value in values.items()}, default=str))


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
