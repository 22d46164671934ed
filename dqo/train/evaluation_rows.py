"""Rows for evaluation that are given when training has begun: on tokens, with all columns that those of the beginning have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from dqo.config.options import Options
from dqo.data.batches import Group, distinct
from dqo.data.episode import Episode
from dqo.data.rows import Row
from dqo.data.together import check_process_reward
from dqo.errors import UserError
from dqo.models.lora import adapter_off, has_adapter
from dqo.train.frozen_models import add_columns, frozen_models
from dqo.train.inputs import Given, read_held_out
from dqo.train.prepare import Prepared, held_out_groups
from dqo.train.run_models import load_initial, reference_columns
from dqo.train.sharded import load_frozen, shard_reference
from dqo.train.weighting import reference_name


class Evaluated(NamedTuple):
    """Rows for evaluation on tokens."""

    all: list[Episode]
    objective: list[Group]  # as the objective chose them


def evaluation_episodes(
    options: Options, given: Given, prepared: Prepared, source: Any
) -> tuple[Evaluated, Sequence[Row]]:
    """Further rows, with their reference columns, when training has begun.

    Args:
        source: anything that read_rows takes.

    Raises:
        UserError: when the reference policy was a model object that has been trained in place.
    """
    config, objective, sharded = options.train, options.objective, prepared.module is not None
    rows = read_held_out(config, source)
    check_process_reward(rows, "the rows for evaluation", config.process_reward)
    episodes = prepared.tokenized(rows)
    prepared_ones = held_out_groups(objective, episodes, rows, reference_name(options, given))
    if objective.needs_reference:
        learner, identity, of_reference = prepared.learner, prepared.identity, prepared.of_reference
        reference = prepared.reference or learner.reference
        if prepared.refreshed is not None:
            reference, of_reference, sha256 = load_frozen(prepared.refreshed, config, prepared.processes, sharded)
            identity, config = identity | {"reference": sha256}, replace(config, dtype="float32")
        elif reference is None and not has_adapter(learner.policy):
            if given.model is not None:
                raise UserError(
                    "the reference policy of these rows was the given model, which is trained in place: give ref_model, or give "
                    "the rows to the constructor as eval_dataset"
                )
            reference = load_initial(config, prepared.processes)
            if sharded:
                of_reference = shard_reference(reference, config, prepared.processes)
        together = distinct([*([e] for e in episodes), *prepared_ones])
        with adapter_off(learner.policy):
            reference_columns(
                config,
                together,
                learner.policy,
                reference,
                prepared.batching,
                identity,
                prepared.processes,
                resuming=True,
                sharded=of_reference,
            )
        if prepared.implied is not None:
            prepared.implied.add(together, prepared.batching, prepared.processes)
            prepared.implied.release()
    if objective.reads_models:
        size, together = prepared.learner.policy.config.get_text_config().vocab_size, distinct(prepared_ones)
        frozen = frozen_models(options, prepared.tokenizer, size, together, prepared.processes, sharded)
        add_columns(frozen, options, together, prepared.batching, prepared.processes)
    return Evaluated(episodes, prepared_ones), rows
