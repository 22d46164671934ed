"""Everything before the first step: options against the file system, rows, tokenizer, episodes, models, reference columns."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dqo.batches import groups_of
from dqo.config import Options
from dqo.episodes import Episode, fingerprint, make_episodes
from dqo.errors import UserError
from dqo.models import check_head, load_policy, load_tokenizer, value_model_from, vocabulary_size, weights_hash
from dqo.objectives import UNIT_EPISODES
from dqo.reference import add_reference, check_agreement, warn_about_behavior
from dqo.rows import Row, check_contrast, duplicate_count, read_rows, split_by_prompt

logger = logging.getLogger(__name__)

# Options that change neither data nor updates: a run may be continued with other values.
FREE_OPTIONS = {
    "output_dir",
    "resume_from_checkpoint",
    "dry_run",
    "save_steps",
    "save_total_limit",
    "eval_tasks",
    "verifier",
    "num_generations",
    "max_completion_length",
}


@dataclass
class Prepared:
    """What the loop trains on and with. `groups` are the episodes that stay together: singles, or pairs."""

    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    policy: PreTrainedModel
    value_model: PreTrainedModel | None
    groups: list[list[Episode]]
    held_out: list[Episode]
    identity: dict  # hashes and options that a continued run must share

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    def episodes(self) -> list[Episode]:
        """The distinct episodes that are trained on."""
        return list({id(e): e for group in self.groups for e in group}.values())


def check_options(options: Options) -> None:
    """Checks across options and against the file system, before any file is read."""
    config = options.train
    if config.dataset_name is None:
        raise UserError("--dataset_name is missing: a .jsonl or .parquet file with prompt, completion, reward")
    if config.model_name_or_path is None:
        raise UserError("--model_name_or_path is missing: a directory or hub name of a causal language model")
    if config.truncation == "bootstrap" and not options.objective.needs_values:
        raise UserError("truncation bootstrap needs a value model: --method dqo --value_model separate")
    used = Path(config.output_dir)
    if used.exists() and not used.is_dir():
        raise UserError(f"output_dir {used} is a file; choose a directory")
    if not used.exists() or not any(used.iterdir()):
        return
    if config.resume_from_checkpoint == "never":
        raise UserError(f"output_dir {used} is in use; choose another, or --resume_from_checkpoint auto to go on there")
    if not (used / "config.yaml").exists():
        raise UserError(f"output_dir {used} holds other files; choose a new or empty directory")


def load_rows(options: Options) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out, by problem; every check of the data that needs no model."""
    config = options.train

    def read(path: str) -> list[Row]:
        return read_rows(path, skip_bad_rows=config.skip_bad_rows, reward_threshold=config.reward_threshold)

    rows = read(config.dataset_name)
    if any(row.step_rewards is not None for row in rows) and config.process_reward is None:
        raise UserError(
            f"{config.dataset_name} has step_rewards; choose what they do: --process_reward additive (paid on the last token of "
            "their step) or --process_reward none"
        )
    if options.objective.needs_reference:  # sft and rft may train on right responses alone
        warning = check_contrast(rows)
        if warning:
            logger.warning(warning)
    duplicates = duplicate_count(rows)
    if duplicates:
        logger.warning("%d of %d rows repeat another row's prompt and completion", duplicates, len(rows))
    if config.eval_dataset_name is None:
        return split_by_prompt(rows, config.eval_fraction, config.seed) if config.eval_fraction else (rows, [])
    held_out = read(config.eval_dataset_name)
    shared = {json.dumps(row.prompt) for row in rows} & {json.dumps(row.prompt) for row in held_out}
    if shared:
        raise UserError(
            f"{len(shared)} prompts of {config.eval_dataset_name} are in {config.dataset_name} too; held-out rows must be of "
            "other problems"
        )
    return rows, held_out


def prepare(options: Options, train_rows: list[Row], held_rows: list[Row]) -> Prepared:
    """Loads the models, tokenises the rows and computes the reference columns."""
    config, objective = options.train, options.objective
    device = PartialState().device
    tokenizer = load_tokenizer(config.model_name_or_path)
    vocab_size = vocabulary_size(config.model_name_or_path)

    def tokenized(rows: list[Row]) -> list[Episode]:
        return make_episodes(
            rows,
            tokenizer,
            vocab_size=vocab_size,
            max_length=config.max_length,
            process_reward=config.process_reward or "none",
            truncation=config.truncation,
            allow_truncation=config.allow_truncation,
            reward_scale=config.reward_scale,
            reward_shift=config.reward_shift,
        )

    episodes = objective.prepare(tokenized(train_rows))
    held_out = tokenized(held_rows) if held_rows else []
    if not episodes:
        nothing = {"dpo": "no prompt has both a better and a worse response: 0 pairs", "rft": "no response is correct"}
        raise UserError(f"method {config.method}: {nothing.get(config.method, 'no response to train on')}")
    policy = load_policy(config.model_name_or_path, device)
    options_that_bind = {name: value for name, value in options.flat().items() if name not in FREE_OPTIONS}
    identity = {"data": fingerprint(episodes), "model": weights_hash(policy), "options": options_that_bind}

    check_head(policy, (episodes[0].prompt_ids + episodes[0].completion_ids)[-64:])
    if objective.needs_reference:
        distinct = list({id(e): e for e in episodes + held_out}.values())
        add_reference(distinct, policy, tokenizer.pad_token_id, 4 * config.per_device_train_batch_size)
        check_agreement(distinct, policy, tokenizer.pad_token_id)
        warn_about_behavior(distinct)
    value_model = value_model_from(policy) if objective.needs_values else None
    groups = groups_of(episodes, UNIT_EPISODES[objective.unit])
    return Prepared(device, tokenizer, policy, value_model, groups, held_out, identity)
