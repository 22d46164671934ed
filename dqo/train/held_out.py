"""Evaluation on held-out responses: the objective's loss, what the value model knows about responses it has not seen, and what
policy and value model say of each response."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dqo.data.batches import Batch, Group, distinct, unit_count
from dqo.data.episodes import Episode
from dqo.models.policy import policy_stats
from dqo.objectives.base import Objective
from dqo.objectives.sums import sequence_sums
from dqo.processes import Processes, gather_objects
from dqo.stats import auc
from dqo.train import metrics
from dqo.train.engine import Engine, Planned
from dqo.train.learner import Learner, objective_sums, values_of
from dqo.train.step import companions_of, mean_over_companions

BAR_DELAY = 2.0  # seconds: a shorter evaluation shows no bar


def shown(batches: Planned, processes: Processes, description: str):
    """`batches` under a progress bar of the first process."""
    return tqdm(batches, desc=description, unit="batch", delay=BAR_DELAY, leave=False, disable=not processes.main)


@torch.no_grad()
def held_out_metrics(
    engine: Engine,
    objective: Objective,
    groups: list[Group],
    prediction_step: Callable[[Planned], None] = lambda batches: None,
) -> dict[str, float]:
    """eval_loss and the other metrics, each a mean over the held-out units; with a value model its AUC too. `groups` are those
    that the objective chose; every process gets the same numbers. `prediction_step` is called after every micro-batch."""
    if not groups:
        return {}

    def sums_of_all() -> dict[str, Tensor]:
        companion_mean = mean_over_companions(engine, objective, groups)
        sums: dict[str, Tensor] = {}
        batches = Planned(groups, engine)
        for batch, counts, _ in shown(batches, engine.processes, "held-out loss"):
            loss, more = engine.module(objective_sums, objective, batch, companion_mean=companion_mean, evaluating=True)
            units = float(unit_count(batch.groups, objective.unit))
            more |= {"loss": torch.stack([loss, loss.new_tensor(units)])} | metrics.of_batch(batch)
            sums = metrics.add(sums, more if counts else metrics.none_of(more))
            prediction_step(batches)
        return sums

    sums = engine.in_memory(sums_of_all, "held-out loss", groups, companions_of(groups))
    found = metrics.finish(metrics.over_processes(sums, engine.processes))
    result = {f"eval_{name}": value for name, value in found.items()}
    if engine.learner.value_model is not None:
        once = distinct(groups)
        at_end, at_half = value_auc(value_traces(engine, once), once)
        if at_end is not None and at_half is not None:
            result |= {"eval_value/auc_end": at_end, "eval_value/auc_half": at_half}
    return result


@torch.no_grad()
def of_each(engine: Engine, work: Callable[[Learner, Batch], list], episodes: list[Episode], description: str) -> list:
    """What `work` says of each episode, in their order, on every process."""
    index = {id(e): i for i, e in enumerate(episodes)}
    groups = [[e] for e in episodes]

    def items_of_all() -> list[tuple[int, Any]]:
        found: list[tuple[int, Any]] = []
        for batch, counts, _ in shown(Planned(groups, engine), engine.processes, description):
            items = engine.module(work, batch)
            if counts:
                found += [(index[id(e)], item) for e, item in zip(batch.episodes, items)]
        return found

    items_of = dict(gather_objects(engine.in_memory(items_of_all, description, groups), engine.processes))
    return [items_of[i] for i in range(len(episodes))]


def value_traces(engine: Engine, episodes: list[Episode]) -> list[list[float]]:
    """V(s_1), ..., V(s_T) of each episode, on every process."""
    return of_each(engine, traces_of, episodes, "held-out values")


def traces_of(learner: Learner, batch: Batch) -> list[list[float]]:
    """V(s_1), ..., V(s_T) of each episode."""
    pieces = values_of(learner, batch).cpu().split([e.action_count for e in batch.episodes])
    return [piece.tolist() for piece in pieces]


def sums_of(learner: Learner, batch: Batch) -> list[dict[str, float]]:
    """Of each episode: logps, and value_start and value_end where there is a value model."""
    found = {"logps": sequence_sums(policy_stats(learner.policy, batch, learner.bf16).logprobs, batch.cu_seqlens)}
    if learner.value_model is not None:
        values = values_of(learner, batch)
        found |= {"value_start": values[batch.cu_seqlens[:-1]], "value_end": values[batch.cu_seqlens[1:] - 1]}
    columns = {name: value.float().tolist() for name, value in found.items()}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def predictions(engine: Engine, episodes: list[Episode]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What policy and value model say of N responses, and what they were paid.

    Returns:
        ({"logps", "ref_logps", "value_start", "value_end", "length", "label"}, rewards): arrays (N,). logps and ref_logps are
        sums over the response's tokens; value_start and value_end are V of its first and of its last state; ref_logps and the
        values are there where the method has them; label: whether the response is correct; rewards: those of the outcome.
    """
    rows = of_each(engine, sums_of, episodes, "predictions")
    found = {name: np.array([row[name] for row in rows], np.float32) for name in rows[0]} if rows else {}
    references = [e.ref_logprobs for e in episodes if e.ref_logprobs is not None]
    if len(references) == len(episodes):
        found["ref_logps"] = np.array([logprobs.sum() for logprobs in references], np.float32)
    found["length"] = np.array([e.action_count for e in episodes])
    found["label"] = np.array([e.label for e in episodes])
    return found, np.array([e.reward for e in episodes], np.float32)


def value_auc(traces: list[list[float]], episodes: list[Episode]) -> tuple[float | None, float | None]:
    """AUC of V for correct against wrong responses, before their last token and before the middle one."""
    labels = [e.label for e in episodes]
    at_end = auc([trace[-1] for trace in traces], labels)
    at_half = auc([trace[math.ceil(len(trace) / 2) - 1] for trace in traces], labels)
    return at_end, at_half
