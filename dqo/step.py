"""One optimizer step: micro-batches -> policy and value forward -> objective -> gradients of both models."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dqo import metrics
from dqo.batches import Batch, collate, groups_of, micro_batches, unit_count
from dqo.episodes import Episode
from dqo.errors import UserError
from dqo.models import final_softcap, hidden_rows, value_rows
from dqo.objectives import UNIT_EPISODES
from dqo_kernels import linear_row_loss


def objective_sums(
    policy: PreTrainedModel,
    value_model: PreTrainedModel | None,
    objective,
    batch: Batch,
    train_policy: bool = True,
    loss_scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective's loss summed over a micro-batch, times `loss_scale`, and its [sum, count] metrics."""
    columns = dict(batch.columns)
    if value_model is not None:
        columns["values"], end_values = value_rows(value_model, batch)
        if not bool(batch.terminated.all()):
            on_last_row = torch.where(batch.terminated, 0.0, end_values)
            columns["bootstrap"] = torch.zeros_like(columns["values"]).index_put(
                (batch.cu_seqlens[1:] - 1,), on_last_row
            )
    with torch.set_grad_enabled(train_policy and torch.is_grad_enabled()):
        hidden = hidden_rows(policy, batch)
    head = policy.get_output_embeddings()
    weight, bias = head.weight, head.bias
    if not train_policy:
        weight, bias = weight.detach(), None if bias is None else bias.detach()

    def row_loss(stats, rows, cu_seqlens):
        loss, sums = objective(stats, rows, cu_seqlens)
        return loss, sums | metrics.common(stats, rows)

    size = UNIT_EPISODES[objective.unit]
    return linear_row_loss(
        hidden,
        weight,
        batch.actions,
        row_loss,
        batch.cu_seqlens,
        rows=columns,
        cu_groups=torch.arange(0, len(batch.episodes) + 1, size),
        seqlens=[len(e.completion_ids) for e in batch.episodes],
        loss_scale=loss_scale,
        bias=bias,
        softcap=final_softcap(policy),
    )


def accumulate(
    policy: PreTrainedModel,
    value_model: PreTrainedModel | None,
    objective,
    groups: list[list[Episode]],
    per_micro_batch: int,
    pad_id: int,
    train_policy: bool = True,
) -> tuple[dict[str, Tensor], int]:
    """Gradients of one optimizer step. Divides by the step's count of units, known before any forward pass, so that any
    split into micro-batches gives one large batch's gradient. Returns metric sums and the number of tokens."""
    units, size = unit_count(groups, objective.unit), UNIT_EPISODES[objective.unit]
    sums: dict[str, Tensor] = {}
    tokens = 0
    for episodes in micro_batches(groups, per_micro_batch):
        batch = collate(episodes, pad_id, policy.device)
        loss, more = objective_sums(policy, value_model, objective, batch, train_policy, 1.0 / units)
        if not torch.isfinite(loss):
            rows = ", ".join(e.source for e in episodes[:5])
            raise UserError(
                f"the loss is {loss.item()} on a batch with rows {rows} ...; lower the learning rate or raise beta"
            )
        if loss.requires_grad:
            loss.backward()
        share = torch.stack(
            [units * loss.detach(), loss.new_tensor(float(unit_count(groups_of(episodes, size), objective.unit)))]
        )
        sums = metrics.add(sums, more | {"loss": share})
        tokens += batch.tokens
    return sums, tokens
