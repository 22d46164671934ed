"""A value model that is a language model phi: its summed log-ratio to the reference is the logit of success (arXiv 2412.01981).

    z_t    = c(x) + beta * sum_{i<t} ( log phi(y_i|s_i) - log ref(y_i|s_i) )     before token t; c of the prompt's last state
    V(s_t) = low + (high - low) * sigmoid(z_t) - sum_{i<t} r_i                    low, high: least and greatest R in training
    L      = - p * log sigmoid(z_{T+1}) - (1 - p) * log( 1 - sigmoid(z_{T+1}) )   a response; p = (R - low) / (high - low)

phi begins as a copy of the policy and c as the logit of the mean p, so that V begins at the mean R of the data. V is read without
a gradient: phi is fitted to outcomes alone. It is V of the policy that wrote the data, without its KL to the reference.

On disk it is a causal language model, with c in value_start.safetensors and the numbers in implicit_value.json.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dqo.data.batches import Batch
from dqo.errors import UserError
from dqo.models.on_disk import home
from dqo.models.policy import head_stats, hidden_positions, load_policy
from dqo.models.value_form import ValueForm
from dqo.models.value_source import IMPLICIT_FILE
from dqo_kernels.core.packed import prefix_sum, sequence_index

START_FILE = "value_start.safetensors"
_MODEL, START = "model.", "start."  # in front of the names of its parameters


@dataclass(frozen=True)
class Scale:
    """What turns log-ratios into values.

    beta: factor of the log-ratio. low, high: R of certain failure and of certain success. reference: sha256 of the weights, in
    float32, of the reference that the log-ratios are to.
    """

    beta: float
    low: float
    high: float
    reference: str

    def share(self, outcome: Tensor) -> Tensor:
        """R as the probability of success that it stands for; the ends where it is beyond the training data's."""
        return ((outcome - self.low) / (self.high - self.low)).clamp(0.0, 1.0)


class ImplicitValue(nn.Module):
    def __init__(self, model: PreTrainedModel, scale: Scale):
        super().__init__()
        width = model.get_output_embeddings().weight.shape[1]
        self.model, self.scale = model, scale
        self.value_form = ValueForm(input="ref_logprob", reference=scale.reference)
        self.start = nn.Linear(width, 1).to(home(model))
        nn.init.zeros_(self.start.weight)
        nn.init.zeros_(self.start.bias)

    def logits(self, batch: Batch, bf16: bool = False) -> tuple[Tensor, Tensor]:
        """Of success: (N,) before each token, and (B,) after the last one of each response; float32, differentiable.

        Raises:
            UserError: for a batch without ref_logprobs.
        """
        cu_seqlens, columns = batch.cu_seqlens, batch.columns
        if "ref_logprobs" not in columns:
            raise UserError(
                "an implicit value model compares itself with the reference, and these responses have no log-probabilities of it"
            )
        hidden = hidden_positions(self.model, batch, bf16)[batch.states]
        logprobs = head_stats(self.model, hidden, batch.actions).logprobs
        start = self.start(hidden[cu_seqlens[:-1]].to(self.start.weight.dtype))[:, 0].float()
        before, after = running_sums(self.scale.beta * (logprobs - columns["ref_logprobs"]), cu_seqlens)
        return start[sequence_index(cu_seqlens, len(before))] + before, start + after

    @torch.no_grad()
    def values(self, before: Tensor, after: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """V of every row (N,) and of every episode's last state (B,), from the logits."""
        paid_before, paid = running_sums(batch.columns["rewards"], batch.cu_seqlens)
        low, width = self.scale.low, self.scale.high - self.scale.low
        return low + width * before.sigmoid() - paid_before, low + width * after.sigmoid() - paid

    def loss(self, after: Tensor, batch: Batch) -> Tensor:
        """(B,) cross-entropy to the outcome; 0 for a response that was cut and is bootstrapped, whose outcome nobody knows."""
        wanted = self.scale.share(running_sums(batch.columns["rewards"], batch.cu_seqlens)[1])
        found = nn.functional.binary_cross_entropy_with_logits(after, wanted, reduction="none")
        return torch.where(batch.terminated, found, 0.0)


def running_sums(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) the sum of a sequence's rows before each, and (B,) of all of them."""
    before = prefix_sum(x, sequence_index(cu_seqlens, x.shape[0]))
    return before, (before + x)[cu_seqlens[1:] - 1]


def implicit_value_from(
    policy: PreTrainedModel, outcomes: Sequence[float], beta: float, reference: str
) -> ImplicitValue:
    """Begins as `policy`, which has no adapter yet.

    Args:
        outcomes: R of every response that is trained on.
        reference: sha256 of the reference's weights in float32.

    Raises:
        UserError: where all outcomes are equal.
    """
    low, high, mean = min(outcomes), max(outcomes), math.fsum(outcomes) / len(outcomes)
    if not low < high:
        raise UserError(
            f"value_model implicit: every response earns {low:g} in all, so that nothing tells success from failure; choose "
            "another --value_model"
        )
    model = copy.deepcopy(policy)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # weights of 4 bits take adapters alone
    found = ImplicitValue(model, Scale(beta, low, high, reference))
    share = min(max((mean - low) / (high - low), 0.01), 0.99)
    nn.init.constant_(found.start.bias, math.log(share / (1.0 - share)))
    return found


def save_implicit_value(value_model: ImplicitValue, state: dict[str, Tensor], directory: Path) -> None:
    """`state` is the whole state dict, adapters merged."""
    model = {name.removeprefix(_MODEL): tensor for name, tensor in state.items() if name.startswith(_MODEL)}
    with torch.device("meta"):
        plain: Any = type(value_model.model)(value_model.model.config)  # only its names and config are used
        plain.to(next(iter(model.values())).dtype)
    plain.save_pretrained(directory, state_dict=model)
    save_start(value_model, state, directory)


def save_start(value_model: ImplicitValue, state: dict[str, Tensor], directory: Path) -> None:
    """What it has beside its language model. `state` may hold more."""
    start = {name.removeprefix(START): tensor for name, tensor in state.items() if name.startswith(START)}
    save_file({name: tensor.contiguous() for name, tensor in start.items()}, directory / START_FILE)
    (directory / IMPLICIT_FILE).write_text(json.dumps(asdict(value_model.scale), indent=1) + "\n")


def load_implicit_value(path: Path, device: torch.device | str = "cpu") -> ImplicitValue:
    """Raises: UserError for files that are not those of `save_implicit_value`."""
    try:
        told = json.loads((path / IMPLICIT_FILE).read_text())
        scale = Scale(**{name: float(told[name]) for name in ("beta", "low", "high")}, reference=str(told["reference"]))
        start = load_file(path / START_FILE)
        found = ImplicitValue(load_policy(str(path), device), scale)
        found.start.load_state_dict(start)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} has a damaged {IMPLICIT_FILE} or {START_FILE} ({reason}); copy the directory again"
        ) from error
    return found
