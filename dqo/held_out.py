"""Evaluation on held-out responses: the objective's loss, and what the value model knows about responses it has not seen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dqo import metrics
from dqo.batches import groups_of, unit_count
from dqo.episodes import Episode
from dqo.learner import Learner, objective_sums, values_of
from dqo.objectives import UNIT_EPISODES
from dqo.parallel import Processes, add_over_processes, gather_objects
from dqo.statistics import auc
from dqo.step import mean_over_companions, planned


@torch.no_grad()
def held_out_metrics(
    module: nn.Module,
    learner: Learner,
    objective: Any,
    episodes: list[Episode],
    max_tokens: int,
    pad_id: int,
    processes: Processes,
) -> dict[str, float]:
    """eval_loss and the other metrics, each a mean over the held-out units; with a value model its AUC too. `episodes` are those
    that the objective prepared; every process gets the same numbers."""
    size = UNIT_EPISODES[objective.unit]
    groups = groups_of(episodes, size)
    if not groups:
        return {}
    companion_mean = mean_over_companions(module, learner, objective, groups, processes, max_tokens, pad_id)
    sums: dict[str, Tensor] = {}
    for batch, counts, _ in planned(groups, learner, processes, max_tokens, pad_id):
        loss, more = module(objective_sums, objective, batch, companion_mean=companion_mean)
        units = float(unit_count(groups_of(batch.episodes, size), objective.unit))
        more |= {"loss": torch.stack([loss, loss.new_tensor(units)])} | metrics.of_batch(batch)
        sums = metrics.add(sums, more if counts else metrics.none_of(more))
    found = metrics.finish(add_over_processes(sums, processes))
    result = {f"eval_{name}": value for name, value in found.items()}
    if learner.value_model is not None:
        distinct = list({id(e): e for e in episodes}.values())
        at_end, at_half = value_auc(value_traces(module, learner, distinct, max_tokens, pad_id, processes), distinct)
        if at_end is not None:
            result |= {"eval_value/auc_end": at_end, "eval_value/auc_half": at_half}
    return result


@torch.no_grad()
def value_traces(
    module: nn.Module, learner: Learner, episodes: list[Episode], max_tokens: int, pad_id: int, processes: Processes
) -> list[list[float]]:
    """V(s_1), ..., V(s_T) of each episode, on every process."""
    index = {id(e): i for i, e in enumerate(episodes)}
    found: list[tuple[int, list[float]]] = []
    for batch, counts, _ in planned([[e] for e in episodes], learner, processes, max_tokens, pad_id):
        values = module(values_of, batch)
        if counts:
            pieces = values.cpu().split([len(e.completion_ids) for e in batch.episodes])
            found += [(index[id(e)], piece.tolist()) for e, piece in zip(batch.episodes, pieces)]
    traces = dict(gather_objects(found, processes))
    return [traces[i] for i in range(len(episodes))]


def value_auc(traces: list[list[float]], episodes: list[Episode]) -> tuple[float | None, float | None]:
    """AUC of V for correct against wrong responses, before their last token and before the middle one."""
    labels = [e.label for e in episodes]
    at_end = auc([trace[-1] for trace in traces], labels)
    at_half = auc([trace[math.ceil(len(trace) / 2) - 1] for trace in traces], labels)
    return at_end, at_half
