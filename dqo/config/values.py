"""Checks of any option: its type, finite numbers, names that file systems take. It also finds the option that was meant."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dqo.data.fields import FLOAT32_MAX
from dqo.errors import UserError, closest
from dqo.files import name_problem

LEAST_TEMPERATURE = 1e-6  # of drawing: logits divided by much less are no float32; 0 is greedy

# Names of the same option in other trainers (TRL, transformers, verl, axolotl, LLaMA-Factory), and short forms.
SYNONYMS = {
    "method": "algo algorithm loss loss_type objective rl rl_algorithm trainer",
    "model_name_or_path": "base_model model model_id model_name model_path policy pretrained",
    "ref_model_name_or_path": "ref_model ref_model_name ref_model_path ref_path reference reference_model",
    "ref_cache_dir": "cache cache_dir ref_cache reference_cache",
    "dataset_name": "data data_path dataset dataset_path datasets input path train_data train_dataset train_file train_files",
    "output_dir": "default_local_dir out out_dir output output_path save_dir save_path",
    "dtype": "model_dtype torch_dtype",
    "bf16": "amp fp16 mixed_precision precision",
    "attn_implementation": "attention attn attn_impl flash_attention flash_attn use_flash_attn",
    "gradient_checkpointing": "activation_checkpointing enable_gradient_checkpointing grad_checkpointing recompute",
    "use_peft": "adapter lora peft use_lora",
    "lora_r": "lora_dim lora_rank peft_r rank r",
    "lora_alpha": "alpha peft_lora_alpha",
    "lora_target_modules": "lora_target target_modules",
    "eval_dataset_name": "eval_data eval_dataset eval_file test_file val_dataset val_files validation_file",
    "eval_fraction": "eval_split test_fraction test_size val_fraction val_set_size val_size validation_split",
    "num_generations": "n n_samples num_return_sequences num_samples",
    "max_completion_length": "max_completion_tokens max_new_tokens max_tokens max_response_length",
    "max_length": "context_length cutoff_len max_len max_seq_len max_seq_length model_max_length seq_len sequence_len",
    "reward_scale": "reward_coef reward_factor",
    "learning_rate": "actor_learning_rate actor_lr learn_rate lr policy_learning_rate policy_lr",
    "critic_learning_rate": "critic_lr value_learning_rate value_lr vf_lr",
    "per_device_train_batch_size": "batch batch_size bs mini_batch_size micro_batch_size per_device_batch_size "
    "ppo_mini_batch_size train_batch_size",
    "gradient_accumulation_steps": "accumulate_grad_batches grad_accum grad_accumulation_steps gradient_accumulation",
    "max_batch_tokens": "max_tokens_per_batch ppo_max_token_len_per_gpu tokens_per_batch",
    "padding_free": "packing sample_packing use_remove_padding",
    "num_train_epochs": "epoch epochs max_epochs n_epochs num_epochs total_epochs train_epochs",
    "max_steps": "iterations num_steps num_train_steps num_training_steps steps total_steps total_training_steps train_steps",
    "lr_scheduler_type": "lr_schedule lr_scheduler scheduler scheduler_type",
    "lr_scheduler_kwargs": "scheduler_kwargs scheduler_specific_kwargs",
    "load_in_4bit": "bnb_4bit bits qlora quantization quantize load_4bit",
    "optim": "optimizer optimizer_name optimizer_type",
    "fsdp_cpu_offload": "cpu_offload offload offload_optimizer offload_params optimizer_offload param_offload",
    "warmup_steps": "lr_warmup_steps num_warmup_steps warmup warmup_ratio",
    "weight_decay": "decay wd",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "adam_eps eps epsilon",
    "max_grad_norm": "clip_grad clip_grad_norm grad_clip grad_norm_clip gradient_clip_val gradient_clipping max_norm",
    "logging_steps": "log_every log_interval log_steps logging_interval",
    "eval_steps": "eval_every eval_interval evaluation_steps test_freq",
    "save_steps": "checkpoint_every checkpoint_steps save_every save_freq save_interval",
    "save_total_limit": "keep_checkpoints max_checkpoints",
    "resume_from_checkpoint": "checkpoint from_checkpoint resume resume_from",
    "report_to": "log_with logger tensorboard tracker wandb",
    "run_name": "exp_name experiment_name name wandb_name wandb_run_name",
    "use_cpu": "cpu device no_cuda",
    "seed": "random_seed rng_seed",
    "beta": "init_kl_coef kl kl_beta kl_coef kl_coeff kl_loss_coef kl_penalty tau",
    "lam": "gae_lambda lambda lambda_ lmbda",
    "gamma": "discount_factor",
    "nll_coef": "cpo_alpha nll_loss_coef nll_weight rpo_alpha sft_coef sft_loss_coef",
    "rpo_alpha": "cpo_alpha nll_coef nll_loss_coef nll_weight sft_coef sft_loss_coef",
    "value_coef": "critic_coef value_loss_coef vf_coef vf_loss_coef",
    "target_ema": "ema ema_decay target_tau",
    "is_cap": "clip_is is_clip importance_sampling_cap",
    "config": "config_file yaml",
}
_SYNONYMS_OF: dict[str, list[str]] = {}
for _option, _words in SYNONYMS.items():
    for _word in _words.split():
        _SYNONYMS_OF.setdefault(_word, []).append(_option)


class Plain(str):
    """An unquoted word of a YAML file. It may stand for a number, because YAML 1.1 reads 1e-6 as a word."""


def brief(value: Any) -> str:
    """A value in one line of at most 80 characters, whatever it is."""
    try:
        text = repr(str.__str__(value)) if isinstance(value, str) else " ".join(repr(value).split())
    except Exception:  # an integer of too many digits, or another's __repr__
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text):,} characters)"


def suggestion(
    word: str, known: Iterable[str], prefix: str = "", of_methods: Mapping[str, set[str]] | None = None
) -> str:
    """What to append to "unknown option": the option of `known` that was probably meant, " Did you mean 'x'?", and the methods
    among `of_methods`, {method: its options}, that have an option of that very name. "" when nothing is near."""
    known, plain = set(known), word.strip().lower().replace("-", "_")
    synonyms = [option for option in (plain, *_SYNONYMS_OF.get(plain, ())) if option in known]
    meant = synonyms[0] if synonyms else closest(plain, known)
    text = f" Did you mean '{prefix}{meant}'?" if meant else ""
    methods = [method for method, names in (of_methods or {}).items() if plain in names]
    return text + (f" {plain} is an option of method {', '.join(methods)}." if methods else "")


@functools.cache
def annotated_types(cls: type) -> dict[str, Any]:
    """The types of a class's fields with what Annotated adds. Python compiles the strings that they are every time."""
    return get_type_hints(cls, include_extras=True)


@functools.cache
def type_hints(cls: type) -> dict[str, Any]:
    """The types of a class's fields."""
    return get_type_hints(cls)


def typed(expected: Any, value: Any) -> Any:
    """`value` as the type of an annotation. Numbers of numpy and torch, paths, and ints for floats are converted, no others.

    Raises:
        TypeError: when the value has another type, or is none of the annotation's words.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if getattr(value, "shape", None) == ():
        value = value.item()
    whole = get_origin(expected) in (Literal, tuple) or not get_args(expected)
    options = (expected,) if whole else get_args(expected)
    for option in options:
        origin = get_origin(option)
        if origin is tuple and isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return tuple(map(str.__str__, value))
        if origin is tuple and isinstance(value, Mapping):  # arguments by name, as other trainers take them
            return tuple(f"{name}={item}" for name, item in value.items())
        if origin is Literal and isinstance(value, str) and str.__str__(value) in get_args(option):
            return str.__str__(value)
        if option is type(None) and value is None:
            return None
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, Integral) and not isinstance(value, bool):
            return int(value)
        if option is float and isinstance(value, Real) and not isinstance(value, bool):
            return _float(value)
        if (
            option is float
            and isinstance(value, Plain)
            and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", value, re.I)
        ):
            return float(value)
        if option is str and isinstance(value, str):
            return str.__str__(value)
    kind = str(expected).replace("typing.", "") if get_args(expected) else expected.__name__
    raise TypeError(f"must be {kind}, got {brief(value)}")


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond the doubles
        return math.inf if value > 0 else -math.inf


def value_problems(config: Any) -> list[tuple[str, str]]:
    """(field, what is wrong) of each number that is not finite or too large, and each name that no file system takes."""
    found = []
    hints = type_hints(config.__class__)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        optional = " or None" if type(None) in get_args(hints[field.name]) else ""
        if isinstance(value, float) and not abs(value) <= FLOAT32_MAX:
            found.append((field.name, f"must be a finite float32 number{optional}, got {value}"))
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            found.append((field.name, f"must be an integer of 64 bits{optional}, got {brief(value)}"))
        names = value if isinstance(value, (tuple, list)) else [value]
        problems = (name_problem(name) for name in names if isinstance(name, str))
        found += [(field.name, what) for what in problems if what]
    return found


def refuse(problems: list[tuple[str, str]], sources: Mapping[str, str]) -> None:
    """Raises a UserError with a line for each problem, and where its value came from."""
    if problems:
        raise UserError("\n".join(f"{name} {what} (from {sources.get(name, 'default')})" for name, what in problems))


def checked_config(cls: type, given: Mapping[str, Any]) -> Any:
    """A command's dataclass from what a Python caller gave, each value checked as flags are.

    Raises:
        UserError: for an unknown option, and for values that do not fit.
    """
    hints = type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    values = {}
    for name, value in given.items():
        if name not in names:
            raise UserError(f"unknown option {brief(name)}.{suggestion(name, names)}")
        try:
            values[name] = typed(hints[name], value)
        except TypeError as error:
            raise UserError(f"{name} {error}") from error
    config = cls(**values)
    refuse(value_problems(config) or config.problems(), dict.fromkeys(given, "the call"))
    return config
