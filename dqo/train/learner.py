"""All models of a run as one module, so that DDP and FSDP2 wrap them at once, and what is computed inside that module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dqo.data.batches import Batch
from dqo.models.critic import ValueHead, value_rows, valued
from dqo.models.lora import adapter_off
from dqo.models.policy import (
    head_inputs,
    head_of,
    head_stats,
    hidden_and_router,
    hidden_positions,
    policy_stats,
    reference_head,
    with_heads,
)
from dqo.models.q_model import QModel
from dqo.models.router import router_loss
from dqo.models.value_form import form_of
from dqo.objectives.base import MODELS, Objective
from dqo.train import metrics
from dqo.train.masters import master_of, round_to_weights
from dqo_kernels import linear_row_loss

ASKED = "asked"  # among the sums of a micro-batch in training: no sum, but the groups whose labels are asked
NOTHING: Mapping[str, float] = MappingProxyType({})


class Learner(nn.Module):
    """`reference` is there when the loss needs its logits and the policy has no adapter that could be switched off; `target` is
    the moving average of the value model. Neither is trained."""

    def __init__(
        self,
        policy: PreTrainedModel,
        value_model: nn.Module | None = None,
        reference: PreTrainedModel | None = None,
        target: nn.Module | None = None,
        bf16: bool = False,
        router_aux_loss_coef: float | None = None,
    ):
        super().__init__()
        for model in (policy, value_model, reference, target):
            if model is not None:
                model.eval()  # adapters that came later too
        self.policy, self.value_model, self.reference, self.target = policy, value_model, reference, target
        self.bf16, self.router_aux_loss_coef = bf16, router_aux_loss_coef
        for frozen in (reference, target):
            if frozen is not None:
                frozen.requires_grad_(False)

    def forward(self, work: Callable, *arguments: Any, **options: Any) -> Any:
        """`work(self, ...)`. Whatever reads parameters goes through here, where the wrappers gather and watch them."""
        return work(self, *arguments, **options)

    @property
    def device(self) -> torch.device:
        return self.policy.device


def objective_sums(
    learner: Learner,
    objective: Objective,
    batch: Batch,
    trains: Collection[str] = MODELS,
    loss_scale: float = 1.0,
    means: Mapping[str, float] = NOTHING,
    token_share: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective's loss summed over a micro-batch, times `loss_scale`, and its [sum, count] metrics; of an objective that
    `asks` one entry more, ASKED: (groups,) bool.

    Args:
        trains: the models that get a gradient, of "policy" and "critic".
        means: columns that have one number on every row, see `means_of_step`.
        token_share: factor of the router's auxiliary loss, where it is applied: the batch's share of the step's tokens.
    """
    return _objective(learner, objective, batch, None, trains, loss_scale, means, token_share)


@torch.no_grad()
def objective_rows(
    learner: Learner, objective: Objective, batch: Batch, means: Mapping[str, float] = NOTHING
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The sums of the objective's `evaluation`, and what its one forward pass says of every row (N,): logprobs, entropy, and
    values where there is a value model."""
    kept: dict[str, list[Tensor]] = {}
    loss, sums = _objective(learner, objective, batch, kept, means=means)
    return loss, sums, {name: torch.cat(pieces) for name, pieces in kept.items()}


def _objective(
    learner: Learner,
    objective: Objective,
    batch: Batch,
    kept: dict[str, list[Tensor]] | None,
    trains: Collection[str] = MODELS,
    loss_scale: float = 1.0,
    means: Mapping[str, float] = NOTHING,
    token_share: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`kept`: of an evaluation, takes what `objective_rows` says of every row, in pieces; None: of training."""
    policy, train_policy = learner.policy, "policy" in trains
    router_coef = learner.router_aux_loss_coef if train_policy else None
    wanted = {"output_router_logits": True} if router_coef else {}
    with torch.set_grad_enabled(train_policy and torch.is_grad_enabled()):
        hidden, router_logits = hidden_and_router(policy, batch, learner.bf16, wanted)
    with torch.set_grad_enabled("critic" in trains and torch.is_grad_enabled()):
        columns = batch.columns | _value_columns(learner, batch, hidden)
    extremes = {}
    if "values" in columns:
        values = columns["values"].detach()
        extremes = {"value/min": values.amin(), "value/max": values.amax()}
    columns |= {name: torch.full_like(columns["rewards"], mean) for name, mean in means.items()}
    reference = _reference_of(learner, objective) if objective.needs_kl else None
    ref_hidden = None if reference is None else _reference_hidden(reference, batch, learner.bf16)

    loss_of = objective if kept is None else objective.evaluation

    asked: list[Tensor] = []  # of each run of groups

    def row_loss(stats, rows, cu_seqlens):
        rows = rows | {"group": rows["group"] - rows["group"][:1]}  # a call may begin with any group of the micro-batch
        loss, sums = metrics.checked(loss_of(stats, rows, cu_seqlens), type(objective).__name__)
        if objective.asks and kept is None:
            with torch.no_grad():
                asked.append(objective.asked(stats, rows, cu_seqlens))
        if kept is not None:  # the runs of groups come in their order
            for name, value in (
                ("logprobs", stats.logprobs),
                ("entropy", stats.entropy),
                ("values", rows.get("values")),
            ):
                if value is not None:
                    kept.setdefault(name, []).append(value.detach())
        return loss, sums | metrics.common(stats, rows)

    def from_head(rows_of_hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.set_grad_enabled(train_policy and torch.is_grad_enabled()):
            head = head_of(policy, hidden.dtype)
        if not train_policy:  # a parameter that needs no cast is still itself
            head |= {name: None if head[name] is None else head[name].detach() for name in ("weight", "bias")}
        if reference is not None and ref_hidden is not None:
            with torch.no_grad():
                head |= reference_head(reference, ref_hidden)
        return linear_row_loss(
            head_inputs(policy, rows_of_hidden),
            head.pop("weight"),
            batch.actions,
            row_loss,
            batch.cu_seqlens,
            rows=columns,
            cu_groups=torch.tensor([0, *accumulate(batch.sizes)], device="cpu"),
            seqlens=[e.action_count for e in batch.episodes],
            loss_scale=loss_scale,
            **head,
        )

    heads = [policy] if reference in (None, policy) else [policy, reference]
    loss, sums = with_heads(heads, from_head, hidden[batch.states])
    if router_coef:
        assert router_logits is not None  # they were asked for
        auxiliary = router_loss(policy, router_logits, batch)
        loss = loss + router_coef * token_share * auxiliary
        tokens = torch.tensor(float(batch.tokens), device=loss.device)
        sums["router_aux_loss"] = torch.stack([auxiliary.detach() * tokens, tokens])
    return loss, sums | extremes | ({ASKED: torch.cat(asked)} if asked else {})


def _value_columns(learner: Learner, batch: Batch, hidden: Tensor) -> dict[str, Tensor]:
    """values, target_values and bootstrap, where there is a value model; value_outputs and value_range, where a cross-entropy
    fits it, or outcome_loss, on the last row of each response. The bootstrap is a target: from the average, if there is one."""
    if learner.value_model is None:
        return {}
    columns: dict[str, Tensor] = {}
    last = batch.cu_seqlens[1:] - 1
    columns["values"], end_values, outputs, outcome_loss, q = valued(learner.value_model, batch, hidden, learner.bf16)
    if q is not None:
        average = learner.value_model if learner.target is None else learner.target
        assert isinstance(average, QModel)
        under_policy = average.values_under(learner.policy, hidden.detach()[batch.states], batch, learner.bf16)
        return columns | {"q": q, "target_values": under_policy}
    if outputs is not None:
        form = form_of(learner.value_model)
        bounds = outputs.new_tensor([form.low, form.high])
        columns |= {"value_outputs": outputs, "value_range": bounds.expand(len(outputs), 2)}
    if outcome_loss is not None:
        columns["outcome_loss"] = torch.zeros_like(columns["values"]).index_put((last,), outcome_loss)
    if learner.target is not None:
        with torch.no_grad():
            columns["target_values"], end_values = value_rows(learner.target, batch, hidden, learner.bf16)
    if not all(e.terminated for e in batch.episodes):
        on_last_row = torch.where(batch.terminated, 0.0, end_values)
        columns["bootstrap"] = torch.zeros_like(columns["values"]).index_put((last,), on_last_row)
    return columns


def _reference_of(learner: Learner, objective: Objective) -> PreTrainedModel:
    """What the KL is to: the reference, a model of its own or the policy with its adapter off, or the Q-model."""
    if objective.kl_to == "critic":
        assert isinstance(learner.value_model, QModel)
        return learner.value_model.model
    return learner.policy if learner.reference is None else learner.reference


@torch.no_grad()
def _reference_hidden(reference: PreTrainedModel, batch: Batch, bf16: bool) -> Tensor:
    """(N, D): the hidden states of a batch's rows."""
    with adapter_off(reference):
        return hidden_positions(reference, batch, bf16)[batch.states]


@torch.no_grad()
def companion_sums(learner: Learner, objective: Objective, batch: Batch) -> dict[str, Tensor]:
    """Sum and count of what the objective wants to know about a batch of companions."""
    stats = policy_stats(learner.policy, batch, learner.bf16)
    return {"companion_mean": objective.companion_sums(stats, batch.columns, batch.cu_seqlens)}


@torch.no_grad()
def step_sums(learner: Learner, objective: Objective, batch: Batch) -> dict[str, Tensor]:
    """Sums and counts of what the objective wants to know about the responses of a step."""
    hidden = hidden_positions(learner.policy, batch, learner.bf16)
    stats = head_stats(learner.policy, hidden[batch.states], batch.actions)
    columns = batch.columns | _value_columns(learner, batch, hidden)
    return objective.step_sums(stats, columns, batch.cu_seqlens)


@torch.no_grad()
def values_of(learner: Learner, batch: Batch) -> Tensor:
    """(N,): V of every row."""
    assert learner.value_model is not None
    is_head = isinstance(learner.value_model, ValueHead)
    hidden = hidden_positions(learner.policy, batch, learner.bf16) if is_head else None
    return value_rows(learner.value_model, batch, hidden, learner.bf16)[0]


@torch.no_grad()
def update_target(learner: Learner, decay: float) -> None:
    """target <- decay * target + (1 - decay) * value model, shard by shard, in full precision."""
    assert learner.value_model is not None and learner.target is not None
    live = dict(learner.value_model.named_parameters())
    for name, parameter in learner.target.named_parameters():
        average = master_of(parameter)
        average.lerp_(master_of(live[name]).to(average.dtype), 1.0 - decay)
    round_to_weights(learner.target)
