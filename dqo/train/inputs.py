"""What a run is given: options against the file system, and the rows; every check that needs neither model nor torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dqo.config.effects import without_effect
from dqo.config.lora import check_lora_config, check_lora_options
from dqo.config.options import Options, TrainConfig
from dqo.config.values import refuse
from dqo.data.advice import row_warnings
from dqo.data.control import with_shuffled_rewards
from dqo.data.mixed import open_data, weights_of
from dqo.data.rows import Row
from dqo.data.stored import StoredRows, column, take
from dqo.data.together import check_process_reward, split_by_prompt
from dqo.errors import UserError
from dqo.files import is_aside
from dqo.models.objects import check_objects
from dqo.models.value_source import find_value_model
from dqo.objectives.base import VALUE_KINDS
from dqo.objectives.registry import OBJECTIVES
from dqo.requirements import check_packages
from dqo.train.damage import STATE_FILE
from dqo.train.implied_run import implied_run
from dqo.train.phases import check_phases
from dqo.train.schedules import check_schedules

logger = logging.getLogger(__name__)

ROW_CACHE = "row_cache"  # in output_dir


@dataclass
class Given:
    """Objects that a Python caller hands over in the place of options."""

    dataset: Any = None  # anything that read_rows takes
    eval_dataset: Any = None
    model: Any = None
    tokenizer: Any = None
    ref_model: Any = None
    peft_config: Any = None
    callbacks: list = field(default_factory=list)


def check_options(options: Options, given: Given | None = None) -> None:
    """Checks across options and against the file system, before any file is read."""
    config, given = options.train, given or Given()
    adapters = config.use_peft or given.peft_config is not None
    eight_bits = config.optim == "adamw_8bit"
    quantised = {"optim adamw_8bit": eight_bits, "load_in_4bit": config.load_in_4bit}
    check_packages(["peft"] * adapters + ["bitsandbytes"] * any(quantised.values()))
    for what in (name for name, asked in quantised.items() if asked):
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(f"{what} needs the package bitsandbytes: pip install 'dqo[bitsandbytes]'")
    if config.load_in_4bit and not adapters:
        raise UserError(
            "load_in_4bit: weights of 4 bits cannot be trained, adapters on them can: add --use_peft, or leave --load_in_4bit out"
        )
    if config.load_in_4bit and given.model is not None:
        raise UserError(
            "load_in_4bit quantises what model_name_or_path names; give its name in the place of the model object"
        )
    if config.dataset_name is None and given.dataset is None:
        raise UserError("--dataset_name is missing: a .jsonl or .parquet file with prompt, completion, reward")
    if config.model_name_or_path is None and given.model is None:
        raise UserError("--model_name_or_path is missing: a directory or hub name of a causal language model")
    if given.model is not None and given.tokenizer is None and config.model_name_or_path is None:
        raise UserError("a model object needs its tokenizer: processing_class=...")
    if config.truncation == "bootstrap" and not options.objective.needs_values:
        with_values = [name for name, cls in OBJECTIVES.items() if cls().needs_values]
        raise UserError(
            f"truncation bootstrap needs a value model: --method {' or '.join(with_values)}, with --value_model separate"
        )
    if config.ref_model_name_or_path is not None and not options.objective.needs_reference:
        raise UserError(f"method {config.method} has no reference policy; remove --ref_model_name_or_path")
    check_model_options(options)
    _check_value_model(options)
    check_value_options(options)
    check_schedules(options)
    check_phases(options.objective, config.value_warmup_steps, options.frozen_values)
    check_objects(given.model, given.ref_model, given.tokenizer, adapters)
    if given.peft_config is not None:
        check_lora_config(given.peft_config)
        check_lora_options(given.peft_config, options)
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise UserError(f"report_to needs the package {config.report_to}: pip install {config.report_to}")
    used = Path(config.output_dir)
    if used.exists() and not used.is_dir():
        raise UserError(f"output_dir {used} is a file; choose a directory")
    if not used.exists() or all(is_aside(path) or path.name == ROW_CACHE for path in used.iterdir()):
        return
    if config.resume_from_checkpoint == "never":
        raise UserError(f"output_dir {used} is in use; choose another, or --resume_from_checkpoint auto to go on there")
    if not (used / "config.yaml").exists() and not list(used.glob(f"checkpoint-*/{STATE_FILE}")):
        raise UserError(f"output_dir {used} holds other files; choose a new or empty directory")


def check_model_options(options: Options) -> None:
    """Of the frozen models that a method reads."""
    for name in options.objective.reads_models:
        if getattr(options.objective, name) is None:
            raise UserError(
                f"--{name} is missing: method {options.train.method} reads the log-probabilities of that model; give its "
                "directory, such as the output_dir of a run, or its hub name"
            )


def check_value_options(options: Options) -> None:
    """Of a value model: what its kind, or a method without a reference, cannot do."""
    config, objective = options.train, options.objective
    if not objective.needs_values:
        return
    given = {"value_loss": objective.values_loss, "value_init": config.value_init, "value_input": config.value_input}
    plain = {"value_loss": "squared", "value_init": "zero", "value_input": "states"}
    changed = [name for name in given if given[name] != plain[name]]
    if changed and (kind := objective.value_kind) not in ("separate", "head"):
        name = changed[0]
        raise UserError(f"{name} {given[name]} is for value_model separate or head, not {kind}; leave one of them out")
    if "value_input" in changed and not objective.needs_reference:
        raise UserError(f"method {config.method} has no reference policy, which value_input ref_logprob reads")


def _check_value_model(options: Options) -> None:
    config, objective = options.train, options.objective
    kind, fitted = objective.value_kind, None
    if implied_run(objective) is None and kind not in VALUE_KINDS:
        if not Path(kind).is_dir():
            kinds = ", ".join(VALUE_KINDS)
            raise UserError(
                f"method {config.method} has the value_kind {kind!r}; it is one of {kinds}, or the directory of a value model"
            )
        fitted = find_value_model(kind)
        if fitted.form == "q_model":
            raise UserError(
                f"value_model {fitted.path} is a language model of Q; it is the value model of no other method"
            )
    if kind == "q_model" and config.truncation == "bootstrap":
        raise UserError(
            f"method {config.method} has no value of the last state of a response that was cut: no reference is read there; use "
            "--truncation terminal or drop"
        )
    if objective.implied_from and not objective.needs_reference:
        raise UserError(
            f"method {config.method} has no reference policy, which the values of value_model {kind} are implied by"
        )
    if "implicit" in (kind, fitted and fitted.form):
        if not objective.needs_reference:
            raise UserError(
                f"method {config.method} has no reference policy, which an implicit value model is compared with"
            )
        if fitted is not None and hasattr(objective, "value_model"):  # what the word implicit would be refused with
            as_word: Any = {"value_model": "implicit"}
            refuse(dataclasses.replace(objective, **as_word).problems(), options.sources)
    if config.freeze_value_model:
        if fitted is None:
            raise UserError(
                f"freeze_value_model needs a value model that was fitted: give --value_model DIRECTORY (of a run), not {kind}"
            )
        if objective.values_decay is not None:
            raise UserError("target_ema must be None with freeze_value_model: what is frozen has no moving average")


def read(config: TrainConfig, source: Any) -> StoredRows:
    """Rows as the options say; those of a large file are kept in row_cache_dir."""
    root = Path(config.row_cache_dir or Path(config.output_dir) / ROW_CACHE)
    kept = None if config.dry_run and config.row_cache_dir is None else root
    return open_data(source, skip_bad_rows=config.skip_bad_rows, reward_threshold=config.reward_threshold, root=kept)


def read_held_out(config: TrainConfig, source: Any) -> StoredRows:
    """The same of rows to evaluate on.

    Raises:
        UserError: for weights, which would say how often rows are read.
    """
    rows = read(config, source)
    if weights_of(rows) is not None:
        raise UserError(
            f"{source}: has weights, and responses for evaluation are read once each; leave the weights out"
        )
    return rows


def load_rows(options: Options, given: Given | None = None) -> tuple[Sequence[Row], Sequence[Row]]:
    """Rows to train on and rows held out, by problem; every check of the data that needs no model."""
    config, given = options.train, given or Given()
    adapters = config.use_peft or given.peft_config is not None
    held_out_given = config.eval_dataset_name is not None or given.eval_dataset is not None
    if idle := without_effect(options, adapters, held_out_given):
        logger.warning(idle)
    rows: Sequence[Row] = read(config, config.dataset_name if given.dataset is None else given.dataset)
    check_process_reward(rows, config.dataset_name or "the data set", config.process_reward)
    for warning in row_warnings(rows, config, options.objective):
        logger.warning(warning)
    _check_step_rewards(options, rows)
    held_source = config.eval_dataset_name if given.eval_dataset is None else given.eval_dataset
    held_out: Sequence[Row] = []
    if held_source is not None:
        held_out = read_held_out(config, held_source)
        names = config.eval_dataset_name or "eval_dataset", config.dataset_name or "the training rows"
        shared_prompts(column(rows, "prompt"), held_out, *names)
    elif config.eval_fraction:
        rows, held_out = split_by_prompt(rows, config.eval_fraction, config.seed)
    if config.shuffle_rewards:
        rows, said = with_shuffled_rewards(rows, config.seed, step_rewards_used(options))
        logger.warning(said)
    return rows, held_out


def step_rewards_used(options: Options) -> bool:
    """Whether rewards of steps or turns are paid, or say which steps are trained on."""
    return options.train.process_reward not in (None, "none") or bool(options.objective.reads_steps)


def _check_step_rewards(options: Options, rows: Sequence[Row]) -> None:
    """Refuses another sense of step rewards than the method's."""
    wanted, told = options.objective.wants_process_reward, options.train.process_reward
    if wanted in (None, told):
        return
    known = int((column(rows, "paid") >= 0).sum())
    measured = " `dqo score FILE --prefix_values 8` measures pass rates of prefixes." if wanted == "potential" else ""
    raise UserError(
        f"method {options.train.method} reads step rewards in the sense of --process_reward {wanted}, and it is {told}; "
        f"{known:,} of {len(rows):,} rows have them.{measured} Give --process_reward {wanted}"
    )


def shared_prompts(trained: np.ndarray, rows: Sequence[Row], name: str, trained_name: str) -> None:
    """Refuses rows for evaluation whose prompts are trained on. `trained`: the column prompt of the rows that are."""
    prompts = column(rows, "prompt")
    shared = np.isin(prompts, trained)
    if shared.any():
        first = take(rows, np.flatnonzero(shared)[:1])[0]
        raise UserError(
            f"{len(np.unique(prompts[shared]))} prompts of {name} are in {trained_name} too (the first: "
            f"{first.source or repr(first.prompt)[:80]}); take their rows out of one of the two, or give no evaluation "
            "rows: eval_fraction holds prompts out"
        )
