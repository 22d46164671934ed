"""How a value model is read: what its outputs mean, and what it takes in beside the tokens."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from dqo.data.batches import Batch
from dqo.errors import UserError
from dqo.objectives.value_outputs import output_count, values_of
from dqo_kernels.core.packed import sequence_index


@dataclass(frozen=True)
class ValueForm:
    """loss and input are the options value_loss and value_input; low and high the least and the greatest return of the training
    data, which a cross-entropy needs; reference the hash in float32 of the reference whose log-probabilities it takes in."""

    loss: str = "squared"
    low: float = 0.0
    high: float = 0.0
    input: str = "states"
    reference: str | None = None

    @property
    def outputs(self) -> int:
        """K, how many outputs a state has."""
        return output_count(self.loss)

    @property
    def reads_reference(self) -> bool:
        """It takes in the reference's log-probabilities of the tokens before the state."""
        return self.input == "ref_logprob"

    def values(self, outputs: Tensor) -> Tensor:
        """(..., K) outputs -> (...) V."""
        return outputs[..., 0] if self.loss == "squared" else values_of(outputs, self.low, self.high)

    def dumped(self) -> str:
        return json.dumps(asdict(self))


def form_of(value_model: nn.Module) -> ValueForm:
    """Of value models of this package; of others the plain one."""
    return getattr(value_model, "value_form", ValueForm())


def form_from(text: str | None) -> ValueForm:
    """What `dumped` gave; the plain form for files without it."""
    return ValueForm() if text is None else ValueForm(**json.loads(text))


def _surprisals(batch: Batch) -> Tensor:
    """(N,): log(1 - log ref) of each action, at least 0: few actions are as unlikely as e^-20, and their size should not rule."""
    if "ref_logprobs" not in batch.columns:
        raise UserError(
            "this value model reads the reference's log-probabilities (value_input ref_logprob), and these responses have none"
        )
    return torch.log1p((-batch.columns["ref_logprobs"].detach()).clamp_min(0.0))


def surprisal_at_positions(batch: Batch) -> Tensor:
    """Shaped as input_ids: that of each action at the position of its token; 0 at tokens of prompts and environments."""
    found = torch.zeros(batch.positions, device=batch.input_ids.device)
    return found.index_put((batch.states + 1,), _surprisals(batch)).view(batch.input_ids.shape)


def surprisal_of_states(batch: Batch) -> Tensor:
    """(N + B, 2) of all states, those after the last actions behind the others: the surprisal of the last action before the
    state, and the greatest before it; 0 where there is none."""
    cu_seqlens, (n, count) = batch.cu_seqlens, (len(batch.states), len(batch.end_states))
    sequence = sequence_index(cu_seqlens, n)
    place = torch.arange(n, device=cu_seqlens.device) - cu_seqlens[sequence]
    table = torch.zeros(count, 1 + max(e.action_count for e in batch.episodes), device=cu_seqlens.device)
    table[sequence, place + 1] = _surprisals(batch)  # column t: what was taken before state t
    rows = torch.cat([sequence, torch.arange(count, device=cu_seqlens.device)])
    columns = torch.cat([place, cu_seqlens.diff()])
    return torch.stack([table[rows, columns], table.cummax(1).values[rows, columns]], dim=1)
