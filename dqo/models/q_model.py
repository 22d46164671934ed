"""A value model that is a language model q, whose logits are a Q-function relative to the reference.

    Q(s, a) = beta * ( logit_a of q - logit_a of ref )       so that softmax(q) = ref * exp(Q/beta) / Z
    V(s) = max over pi of E_pi[Q] - beta * KL(pi || ref) = beta * ( log sum_a exp logit_a of q - the same of ref )
    E_pi[Q] - beta * KL(pi || ref) = V(s) - beta * KL(pi || q)

It begins as a copy of the policy. On disk it is a causal language model, with beta and the reference in q_model.json.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dqo.data.batches import Batch
from dqo.errors import UserError
from dqo.models.policy import (
    head_inputs,
    head_of,
    head_stats,
    hidden_positions,
    load_policy,
    reference_head,
    with_heads,
)
from dqo.models.value_form import ValueForm
from dqo.models.value_source import Q_FILE
from dqo_kernels import TokenStats, linear_token_stats

_MODEL = "model."  # in front of the names of its parameters


class QModel(nn.Module):
    """reference: sha256 of the weights, in float32, of the reference that Q is relative to."""

    def __init__(self, model: PreTrainedModel, beta: float, reference: str):
        super().__init__()
        self.model, self.beta = model, beta
        self.value_form = ValueForm(input="ref_logprob", reference=reference)

    def q_and_values(self, batch: Batch, bf16: bool = False) -> tuple[Tensor, Tensor]:
        """Q of every action and V of every state (N,), float32, differentiable.

        Raises:
            UserError: for a batch without ref_logprobs and ref_lse.
        """
        columns = batch.columns
        if not {"ref_logprobs", "ref_lse"} <= columns.keys():
            raise UserError(
                "a Q-model is relative to the reference, and these responses have no log-probabilities of it"
            )
        hidden = hidden_positions(self.model, batch, bf16)[batch.states]
        stats = head_stats(self.model, hidden, batch.actions)
        values = self.beta * (stats.lse - columns["ref_lse"])
        return self.beta * (stats.logprobs - columns["ref_logprobs"]) + values, values

    @torch.no_grad()
    def values_under(self, policy: PreTrainedModel, hidden: Tensor, batch: Batch, bf16: bool = False) -> Tensor:
        """(N,) E_pi[Q] - beta * KL(pi || ref) of every state, over the vocabulary.

        Args:
            hidden: (N, D) the policy's hidden states of the rows.
        """
        own = hidden_positions(self.model, batch, bf16)[batch.states]

        def work(hidden: Tensor) -> TokenStats:
            head = head_of(policy, hidden.dtype) | reference_head(self.model, own.to(hidden.dtype))
            weight = head.pop("weight")
            return linear_token_stats(head_inputs(policy, hidden), weight, batch.actions, **head)

        both = with_heads([policy, self.model], work, hidden)
        assert both.kl is not None and both.ref_lse is not None
        return self.beta * (both.ref_lse - batch.columns["ref_lse"] - both.kl)


def q_model_from(policy: PreTrainedModel, beta: float, reference: str) -> QModel:
    """Begins as `policy`, which has no adapter yet. `reference`: sha256 of the reference's weights in float32."""
    return QModel(copy.deepcopy(policy).requires_grad_(True), beta, reference)


def save_q_model(value_model: QModel, state: dict[str, Tensor], directory: Path) -> None:
    """`state` is the whole state dict, adapters merged."""
    model = {name.removeprefix(_MODEL): tensor for name, tensor in state.items()}
    with torch.device("meta"):
        plain: Any = type(value_model.model)(value_model.model.config)  # only its names and config are used
        plain.to(next(iter(model.values())).dtype)
    plain.save_pretrained(directory, state_dict=model)
    save_description(value_model, directory)


def save_description(value_model: QModel, directory: Path) -> None:
    """beta and the reference, beside the language model."""
    told = {"beta": value_model.beta, "reference": value_model.value_form.reference}
    (directory / Q_FILE).write_text(json.dumps(told, indent=1) + "\n")


def load_q_model(path: Path, device: torch.device | str = "cpu") -> QModel:
    """Raises: UserError for files that are not those of `save_q_model`."""
    try:
        told = json.loads((path / Q_FILE).read_text())
        return QModel(load_policy(str(path), device), float(told["beta"]), str(told["reference"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} has a damaged {Q_FILE} ({reason}); copy the directory again") from error
