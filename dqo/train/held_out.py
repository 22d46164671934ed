"""Evaluation on held-out responses: the objective's loss, what the value model knows about responses it has not seen, and what
policy and value model say of each response."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dqo.credit.quality import Judged, quality_of
from dqo.data.batches import Batch, Group, distinct, unit_count
from dqo.data.episode import Episode
from dqo.models.policy import policy_stats
from dqo.objectives.base import Objective
from dqo.processes import Processes, gather_objects
from dqo.reference.columns import AGREEMENT_BOUNDS
from dqo.stats import auc
from dqo.train import metrics
from dqo.train.engine import Engine, Planned
from dqo.train.learner import Learner, objective_rows, values_of
from dqo.train.step import companions_of, means_of_step

BAR_DELAY = 2.0  # seconds: a shorter evaluation shows no bar


def shown(batches: Planned, processes: Processes, description: str):
    """`batches` under a progress bar of the first process."""
    return tqdm(batches, desc=description, unit="batch", delay=BAR_DELAY, leave=False, disable=not processes.main)


Tokens = dict[
    str, np.ndarray
]  # of one response: (T,) float32 logprobs, entropy, and values where there is a value model


@torch.no_grad()
def held_out_metrics(
    engine: Engine,
    objective: Objective,
    groups: list[Group],
    prediction_step: Callable[[Planned], None] = lambda batches: None,
) -> tuple[dict[str, float], list[Tokens]]:
    """One forward pass over the held-out responses. `groups` are those that the objective chose; every process gets the same.

    Args:
        prediction_step: called after every micro-batch.

    Returns:
        (metrics, tokens): eval_loss and the other metrics, each a mean over the held-out units, with a value model its AUC, and
        with a reference what log(pi/ref) knows; and what policy and value model say of each distinct response.
    """
    if not groups:
        return {}, []
    once = distinct(groups)
    index = {id(e): i for i, e in enumerate(once)}

    def sums_of_all() -> tuple[dict[str, Tensor], dict[int, Tokens]]:
        means = means_of_step(engine, objective, groups)
        sums: dict[str, Tensor] = {}
        said: dict[int, Tokens] = {}
        batches = Planned(groups, engine)
        for batch, counts, _ in shown(batches, engine.processes, "held-out loss"):
            loss, more, rows = engine.module(objective_rows, objective, batch, means)
            units = float(unit_count(batch.groups, objective.unit))
            more |= {"loss": torch.stack([loss, loss.new_tensor(units)])} | metrics.of_batch(batch)
            sums = metrics.add(sums, more if counts else metrics.none_of(more))
            if counts:
                said |= {index[id(e)]: found for e, found in zip(batch.episodes, of_responses(batch, rows))}
            prediction_step(batches)
        return sums, said

    sums, said = engine.in_memory(sums_of_all, "held-out loss", groups, companions_of(groups))
    found = metrics.finish(metrics.over_processes(sums, engine.processes))
    result = {f"eval_{name}": value for name, value in found.items()}
    of_all = dict(gather_objects(list(said.items()), engine.processes))
    tokens = [of_all[i] for i in range(len(once))]
    if "values" in tokens[0]:
        at_end, at_half = value_auc([said["values"] for said in tokens], once)
        if at_end is not None and at_half is not None:
            result |= {"eval_value/auc_end": at_end, "eval_value/auc_half": at_half}
    return result | credit_metrics(tokens, once), tokens


def of_responses(batch: Batch, rows: dict[str, Tensor]) -> list[Tokens]:
    """Columns (N,) of a batch as those of each response."""
    ends = np.cumsum([e.action_count for e in batch.episodes])[:-1]
    columns = {name: np.split(value.float().cpu().numpy(), ends) for name, value in rows.items()}
    return [dict(zip(columns, pieces)) for pieces in zip(*columns.values())]


def log_ratios(episode: Episode, tokens: Tokens) -> np.ndarray:
    """(T,) float32 log(pi/ref) of a response with reference columns. What is no more than the rounding of two computations of
    one model is 0, so that an untrained policy ranks nothing."""
    assert episode.ref_logprobs is not None
    ratios = tokens["logprobs"] - episode.ref_logprobs
    rounding = AGREEMENT_BOUNDS["float32"] * (1.0 + np.abs(episode.ref_logprobs))
    return np.where(np.abs(ratios) <= rounding, np.float32(0.0), ratios)


def credit_metrics(tokens: list[Tokens], episodes: Sequence[Episode]) -> dict[str, float]:
    """eval_credit/...: what log(pi/ref) knows of right and wrong responses and of the first wrong step (dqo.credit.quality); {}
    without a reference, and for a policy that gives no numbers. A factor such as beta changes none of it."""
    if not all(e.ref_logprobs is not None and np.isfinite(said["logprobs"]).all() for e, said in zip(episodes, tokens)):
        return {}
    judged = [
        Judged(e.prompt_index, e.label, log_ratios(e, said), e.step_ends, e.first_wrong_step)
        for e, said in zip(episodes, tokens)
    ]
    measures = quality_of(judged)._asdict()
    return {f"eval_credit/{name}": found.mean for name, found in measures.items() if found is not None}


@torch.no_grad()
def of_each(
    engine: Engine, work: Callable[[Learner, Batch], list], episodes: Sequence[Episode], description: str
) -> list:
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


@torch.no_grad()
def tokens_of(learner: Learner, batch: Batch) -> list[Tokens]:
    """What policy and value model say of each token of each episode."""
    stats = policy_stats(learner.policy, batch, learner.bf16)
    rows = {"logprobs": stats.logprobs, "entropy": stats.entropy}
    if learner.value_model is not None:
        rows["values"] = values_of(learner, batch)
    elif "values" in batch.columns:  # implied by the policy of another run
        rows["values"] = batch.columns["values"]
    return of_responses(batch, rows)


def predictions(engine: Engine, episodes: Sequence[Episode]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What policy and value model say of N responses, and what they were paid.

    Returns:
        ({"logps", "ref_logps", "value_start", "value_end", "length", "label"}, rewards): arrays (N,). logps and ref_logps are
        sums over the response's tokens; value_start and value_end are V of its first and of its last state; ref_logps and the
        values are there where the method has them; label: whether the response is correct; rewards: those of the outcome.
    """
    tokens = of_each(engine, tokens_of, episodes, "predictions")
    found = {}
    if episodes:
        found["logps"] = np.array([said["logprobs"].sum() for said in tokens], np.float32)
    if tokens and "values" in tokens[0]:
        found["value_start"] = np.array([said["values"][0] for said in tokens], np.float32)
        found["value_end"] = np.array([said["values"][-1] for said in tokens], np.float32)
    references = [e.ref_logprobs for e in episodes if e.ref_logprobs is not None]
    if len(references) == len(episodes):
        found["ref_logps"] = np.array([logprobs.sum() for logprobs in references], np.float32)
    found["length"] = np.array([e.action_count for e in episodes])
    found["label"] = np.array([e.label for e in episodes])
    return found, np.array([e.reward for e in episodes], np.float32)


def value_auc(
    traces: Sequence[Sequence[float] | np.ndarray], episodes: Sequence[Episode]
) -> tuple[float | None, float | None]:
    """AUC of V for correct against wrong responses, before their last token and before the middle one."""
    labels = [e.label for e in episodes]
    at_end = auc([trace[-1] for trace in traces], labels)
    at_half = auc([trace[math.ceil(len(trace) / 2) - 1] for trace in traces], labels)
    return at_end, at_half
