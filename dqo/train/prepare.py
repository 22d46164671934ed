"""Everything between rows and the first step: tokenizer, episodes, models, reference columns."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dqo.config.lora import described
from dqo.config.options import Options
from dqo.data.batches import Batching, Group, distinct
from dqo.data.behavior import ReferenceName, reference_samples
from dqo.data.ends import ends_of
from dqo.data.episode import Episode
from dqo.data.episodes import Episodes, open_episodes
from dqo.data.joined import Joined
from dqo.data.marks import Marks
from dqo.data.rows import Row
from dqo.data.selection import (
    EpisodeColumns,
    Groups,
    called,
    data_fingerprint,
    nothing_selected,
    selected,
    selection_fingerprint,
)
from dqo.errors import UserError
from dqo.models import attention
from dqo.models.critic import backbone
from dqo.models.fitness import check_adapter, check_model
from dqo.models.limits import check_positions, check_tokenizer
from dqo.models.lora import has_adapter
from dqo.models.named import load_config, stop_ids, tokenizer_of
from dqo.models.policy import architecture, ready, weights_hash
from dqo.models.router import check_router
from dqo.objectives.base import Objective
from dqo.processes import Processes
from dqo.train.checkpoint import claim_output, read_state, save_base
from dqo.train.fitted_values import configuration_of, fitted_value_model
from dqo.train.frozen_models import add_columns, frozen_models
from dqo.train.implied_values import ImpliedValues, implied_values_of
from dqo.train.inputs import Given
from dqo.train.learner import Learner
from dqo.train.machines import check_same
from dqo.train.masters import add_masters
from dqo.train.optim import steps_of
from dqo.train.order import Order, order_of
from dqo.train.resume import FITTED, OF_OBJECTIVE, TRAINED_END
from dqo.train.returns import value_start
from dqo.train.room import warn_of_little_room
from dqo.train.run_models import (
    base_of,
    bf16_problem,
    explicit_reference,
    load_initial,
    make_learner,
    reference_columns,
    reference_config,
    save_dtype_of,
    shards_from_files,
)
from dqo.train.sharded import shard, shard_reference, try_model
from dqo.train.template_time import TEMPLATE_TIME, told_time
from dqo.train.weighting import Weighting, at_start, check_behavior, chosen, reference_name

logger = logging.getLogger(__name__)

# Options that change neither data nor, beyond rounding, updates: a run may be continued with other values.
FREE_OPTIONS = {
    "preset",  # what it sets is among the options
    "per_device_train_batch_size",  # their product with the number of processes is in the identity
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "max_batch_tokens",
    "padding_free",
    "attn_implementation",
    "use_cpu",
    "fsdp",
    "fsdp_cpu_offload",
    "report_to",
    "run_name",
    "project",
    "output_dir",
    "resume_from_checkpoint",
    "ref_cache_dir",
    "row_cache_dir",
    "dry_run",
    "save_dtype",
    "save_steps",
    "save_total_limit",
    "metric_for_best_model",
    "greater_is_better",
    "load_best_model_at_end",
    "eval_tasks",
    "eval_task_problems",
    "verifier",
    "num_generations",
    "max_completion_length",
}


@dataclass
class Prepared:
    """What the loop trains on and with. `groups` are the episodes that stay together, as the objective chose them."""

    processes: Processes
    tokenizer: PreTrainedTokenizerBase
    learner: Learner
    batching: Batching  # of the policy
    groups: Sequence[Group]  # each is made when it is read
    held_out: list[Group]
    identity: dict  # hashes and options that a continued run must share
    order: Order  # of the groups
    resumed: Path | None  # the checkpoint to go on from
    tokenized: Callable[[Sequence[Row]], list[Episode]]  # as the options say
    reference: PreTrainedModel | None  # where it is not the initial policy
    save_dtype: torch.dtype | None  # of the final models; None: as they are trained
    weighting: Weighting
    refreshed: Path | None = None  # the reference that a phase has put into the place of the first one
    implied: ImpliedValues | None = None  # where the policy of another run implies the values
    module: nn.Module | None = None  # what wraps `learner` over the processes, where that was done to load it
    of_reference: nn.Module | None = None  # the same of the reference

    @property
    def objective(self) -> Objective:
        """That of the options, with the level of its importance weights chosen."""
        return self.weighting.objective

    def episodes(self) -> Sequence[Episode]:
        """The distinct episodes that are trained on."""
        return distinct(self.groups)

    def counts(self, rows: int, eval_fraction: float | None) -> str:
        """How much is trained on and held out, a line each.

        Args:
            rows: to train on, of which the method may have left out some. eval_fraction: the share of the prompts that was asked
                to be held out.
        """
        lines = []
        for name, episodes, of in (("training on", self.episodes(), rows), ("held out", distinct(self.held_out), 0)):
            columns = EpisodeColumns(episodes)
            prompts, tokens = len(np.unique(columns.prompt)), int(columns.tokens.sum())
            count = f"{len(episodes):,}" + (f" of {of:,}" if of > len(episodes) else "")
            lines.append(f"{name}: {count} responses to {prompts:,} prompts, {tokens:,} tokens")
        if option := self.objective.reads_steps:
            columns = EpisodeColumns(self.episodes())
            right, whole = columns.right_length, columns.length
            lines.insert(
                1,
                f"{option}: {int(right.sum()):,} of their {int(whole.sum()):,} response tokens; {int((right == whole).sum()):,} "
                f"responses whole, {int(((right > 0) & (right < whole)).sum()):,} up to their first wrong step, "
                f"{int((right == 0).sum()):,} not at all",
            )
        lines[:0] = self.order.told(called(self.objective))
        share = "" if eval_fraction is None else f" (eval_fraction {eval_fraction:g} is a share of the prompts)"
        return "\n".join(lines) + share


def prepare(
    options: Options, given: Given, train_rows: Sequence[Row], held_rows: Sequence[Row], processes: Processes
) -> Prepared:
    """Tokenises the rows, loads the models and computes the reference columns."""
    config = options.train
    sampler = reference_name(options, given)
    one_file = config.eval_dataset_name is None and given.eval_dataset is None  # of which the held-out rows are a part
    all_rows = Joined(train_rows, held_rows)
    weighting = chosen(options, all_rows if one_file else train_rows, sampler)  # as `dqo check` says of it
    objective = weighting.objective
    tokenizer = tokenizer_of(config.model_name_or_path, given.tokenizer)
    model_config = load_config(config.model_path) if given.model is None else given.model.config
    check_tokenizer(tokenizer, all_rows, model_config)
    vocab_size = model_config.get_text_config().vocab_size

    ref_config = reference_config(config, given, vocab_size)
    template_time = told_time(config, tokenizer, processes)

    stops = stop_ids(given.model or config.model_path)

    def placed(rows: Sequence[Row], marks: Marks | None = None) -> Episodes:
        made = on_tokens(rows, options, tokenizer, vocab_size, stops, template_time, marks)
        for its_config in filter(None, (model_config, ref_config)):
            check_positions(its_config, made)
        return made

    def tokenized(rows: Sequence[Row], marks: Marks | None = None) -> list[Episode]:
        return list(placed(rows, marks))

    if (config.bf16 or config.dtype == "bfloat16") and (slow := bf16_problem(processes.device)):
        logger.warning(slow)
    marks = Marks.of_rows(all_rows, config.process_reward) if one_file else None
    episodes = placed(train_rows, marks)
    groups = selected(objective, episodes, partial(reference_samples, train_rows, sampler))
    if not groups:
        raise UserError(f"method {config.method}: {nothing_selected(objective, episodes)}")
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes.world
    order = order_of(groups, per_step, config.seed)
    held_out = held_out_groups(objective, tokenized(held_rows, marks), held_rows, sampler) if held_rows else []
    policy = given.model
    if policy is None:
        policy = load_initial(config, processes)
    else:
        ready(policy, processes.device)
    save_dtype = save_dtype_of(options, given)
    adapters = config.use_peft or given.peft_config is not None
    sharded = shards_from_files(config, processes) and not adapters and given.model is None and given.ref_model is None
    if not adapters and not sharded:
        policy.to(getattr(torch, config.dtype))
    reference = explicit_reference(config, given, processes)
    some_ids = (groups[0][0].prompt_ids + groups[0][0].completion_ids)[-64:]
    for model in filter(None, () if sharded else (policy, reference)):
        check_model(model, some_ids, tokenizer.pad_token_id)
    check_router(policy, config.router_aux_loss_coef)
    options_that_bind = {name: value for name, value in options.flat().items() if name not in FREE_OPTIONS}
    identity = {
        "data": data_fingerprint(groups),
        "model": weights_hash(policy),
        "responses or pairs a step": per_step,
        "options": json.loads(json.dumps(options_that_bind)),  # as a checkpoint gives them back
    }
    answers = selection_fingerprint(groups), objective.unit, objective.value_kind
    identity |= dict(zip(OF_OBJECTIVE, answers, strict=True))
    if given.peft_config is not None:
        identity["options"] |= described(given.peft_config)
    its_ends = ends_of(tokenizer, stops, not isinstance(train_rows[0].prompt, str))
    identity |= {TRAINED_END: its_ends.trained, "configuration": architecture(policy.config)}
    if reference is not None:
        identity["reference configuration"] = architecture(reference.config)
    if template_time is not None:
        identity[TEMPLATE_TIME] = template_time.isoformat()
    identity["reference"] = identity["model"] if reference is None else weights_hash(reference)

    for model in filter(None, () if sharded else (policy, reference)):
        with torch.autocast(processes.device.type, torch.bfloat16, enabled=config.bf16):
            attention.choose(model, config.padding_free, some_ids)  # the value model inherits it
    trained, held = distinct(groups), distinct(held_out)
    frozen = frozen_models(options, tokenizer, vocab_size, Joined(trained, held), processes, sharded)
    if frozen:
        identity["frozen models"] = {one.option: one.sha256 for one in frozen}
    for one in frozen:
        one.choose_attention(config.padding_free, some_ids)
    fitted = fitted_value_model(options, policy, reference or policy, tokenizer, some_ids)
    if fitted is not None:
        identity |= {"fitted value model": weights_hash(fitted), FITTED: configuration_of(fitted)}
    implied = implied_values_of(options, reference or policy, tokenizer, trained, some_ids)
    if implied is not None:
        identity["implied values"] = implied.identity
        processes.say(
            f"value model: V is what the policy of {implied.run.path} implies, with its beta {implied.run.beta:g}"
        )
    begin = value_start(options, trained, policy if reference is None else reference)
    if begin.told:
        processes.say(begin.told)
    learner = make_learner(options, given, policy, reference, begin, trained, fitted)
    module = of_reference = None
    if sharded:
        module = of_reference = shard(learner, config, processes)
        if reference is not None and learner.reference is not reference:
            of_reference = shard_reference(reference, config, processes)
        for wrapped, model in ((module, policy), (of_reference, reference)):
            if model is not None:
                try_model(wrapped, model, config, some_ids, tokenizer.pad_token_id)
    elif config.dtype == "bfloat16" and not adapters:
        if processes.fsdp:
            learner.float()  # the shards; layers are cast while they are gathered
        else:
            add_masters(learner)
    for model in filter(None, (policy, backbone(learner.value_model))):
        if has_adapter(model):
            check_adapter(model, some_ids)
    max_tokens = config.batch_tokens(processes.device.type)
    batching = Batching(tokenizer.pad_token_id, max_tokens, processes.device, attention.packs(policy))
    check_same(identity, processes)
    resumed = claim_output(options, identity, processes)
    if processes.main:
        refreshes = sum("reference" in phase.refreshes for phase in objective.phases(config.value_warmup_steps))
        warn_of_little_room(Path(config.output_dir), learner, config.save_total_limit, refreshes)
    if has_adapter(policy) and not policy.name_or_path and processes.main:
        save_base(policy, Path(base_of(policy, config)), again=resumed is None)
    visited = distinct(_visited(groups, options, order, resumed))
    together = Joined(visited, held)
    if objective.needs_reference:
        resuming = resumed is not None
        reference_columns(config, together, policy, reference, batching, identity, processes, resuming, of_reference)
        check_behavior(objective, together, all_rows, sampler)
        if implied is not None:
            implied.add(together, batching, processes)
            implied.release()
        if reference is None:
            weighting = at_start(weighting, options.objective.weight_level, visited)
    add_columns(frozen, options, together, batching, processes)
    if isinstance(groups, Groups):
        groups.episodes.take_said(visited)
    return Prepared(
        processes,
        tokenizer,
        learner,
        batching,
        groups,
        held_out,
        identity,
        order,
        resumed,
        tokenized,
        reference,
        save_dtype,
        weighting,
        module=module,
        of_reference=of_reference,
        implied=implied,
    )


def _visited(groups: Sequence[Group], options: Options, order: Order, resumed: Path | None) -> Sequence[Group]:
    """The groups that the run's steps read, in the order of the data: all, but of a run that ends within its first epoch. The
    values that a policy implies for a response are made of the others to its prompt too."""
    config, objective = options.train, options.objective
    in_parts = any(tuple(phase.part) != (0.0, 1.0) for phase in objective.phases(config.value_warmup_steps))
    steps = config.max_steps if config.max_steps > 0 else steps_of(config.num_train_epochs, order.per_epoch)
    if resumed is not None:  # checkpoints that do not tell were made when steps were counted otherwise
        steps = max(steps, read_state(resumed).get("steps", order.per_epoch))
    if in_parts or objective.implied_from is not None or not isinstance(groups, Groups):
        return groups
    visited = order.visited(steps)
    return groups if len(visited) == len(groups) else groups.take(visited)


def on_tokens(
    rows: Sequence[Row],
    options: Options,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    stops: list[int],
    template_time: datetime.datetime | None,
    marks: Marks | None = None,
) -> Episodes:
    """Rows as the options say. `stops`: end tokens of the model's generation_config. `template_time`: what chat templates take
    for now; None: the clock. `marks`: of wrong steps; None: what these rows tell."""
    config = options.train
    return open_episodes(
        rows,
        tokenizer,
        vocab_size=vocab_size,
        max_length=config.max_length,
        stop_ids=stops,
        template_time=template_time,
        skip_bad_rows=config.skip_bad_rows,
        process_reward=config.process_reward or "none",
        process_coef=config.process_coef,
        gamma=options.objective.discount_factor,
        discount=options.objective.discount_at,
        truncation=config.truncation,
        allow_truncation=config.allow_truncation,
        reward_scale=config.reward_scale,
        reward_shift=config.reward_shift,
        marks=marks,
    )


def held_out_groups(
    objective: Objective, episodes: list[Episode], rows: Sequence[Row], sampler: ReferenceName
) -> list[Group]:
    """The objective's groups; none, with a warning, where the episodes are too few for it."""
    try:
        found = list(selected(objective, episodes, partial(reference_samples, rows, sampler)))
    except UserError as error:
        found, reason = [], str(error)
    else:
        reason = "the method finds nothing to compare in them"
    if not found:
        logger.warning("the %d held-out responses are not evaluated: %s", len(episodes), reason)
    return found
