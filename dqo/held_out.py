"""Evaluation on held-out responses: the objective's loss, and what the value model knows about responses it has not seen."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel

from dqo import metrics
from dqo.batches import collate, groups_of, micro_batches
from dqo.episodes import Episode
from dqo.models import value_rows
from dqo.objectives import UNIT_EPISODES
from dqo.statistics import auc
from dqo.step import objective_sums


@torch.no_grad()
def held_out_metrics(
    policy: PreTrainedModel,
    value_model: PreTrainedModel | None,
    objective,
    episodes: list[Episode],
    per_micro_batch: int,
    pad_id: int,
) -> dict[str, float]:
    """eval_loss and the other metrics, each a mean over the held-out units; with a value model its AUC too."""
    groups = groups_of(objective.prepare(episodes), UNIT_EPISODES[objective.unit])
    sums: dict = {}
    for members in micro_batches(groups, per_micro_batch):
        batch = collate(members, pad_id, policy.device)
        loss, more = objective_sums(policy, value_model, objective, batch)
        units = float(
            len(batch.actions) if objective.unit == "token" else len(members) // UNIT_EPISODES[objective.unit]
        )
        sums = metrics.add(sums, more | {"loss": torch.stack([loss, loss.new_tensor(units)])})
    result = {f"eval_{name}": value for name, value in metrics.finish(sums).items()}
    if value_model is not None:
        at_end, at_half = value_auc(value_traces(value_model, episodes, per_micro_batch, pad_id), episodes)
        if at_end is not None:
            result |= {"eval_value/auc_end": at_end, "eval_value/auc_half": at_half}
    return result


@torch.no_grad()
def value_traces(
    value_model: PreTrainedModel, episodes: list[Episode], per_micro_batch: int, pad_id: int
) -> list[list[float]]:
    """V(s_1), ..., V(s_T) of each episode."""
    traces: dict[int, list[float]] = {}
    ordered = sorted(range(len(episodes)), key=lambda i: episodes[i].length)
    for start in range(0, len(ordered), per_micro_batch):
        indices = ordered[start : start + per_micro_batch]
        batch = collate([episodes[i] for i in indices], pad_id, value_model.device)
        values, _ = value_rows(value_model, batch)
        sizes = [len(e.completion_ids) for e in batch.episodes]
        traces |= dict(zip(indices, (piece.tolist() for piece in values.cpu().split(sizes))))
    return [traces[i] for i in range(len(episodes))]


def value_auc(traces: list[list[float]], episodes: list[Episode]) -> tuple[float | None, float | None]:
    """AUC of V for correct against wrong responses, before their last token and before the middle one."""
    labels = [e.label for e in episodes]
    at_end = auc([trace[-1] for trace in traces], labels)
    at_half = auc([trace[math.ceil(len(trace) / 2) - 1] for trace in traces], labels)
    return at_end, at_half
