"""What the linear_* functions share: their tensors, checked, and the five that receive gradients.

logits = hidden @ weight^T + lora_scale * (hidden @ lora_a^T) @ lora_b^T + bias
reference logits = ref_hidden @ ref_weight^T + ref_bias, constants
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dqo_kernels.core import checks
from dqo_kernels.core.packed import compute_dtype
from dqo_kernels.core.vocab_parallel import VocabSlices

WORKSPACE_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}


def no_autocast(device: torch.device):
    """A caller's autocast would round the logits to bfloat16."""
    return torch.autocast(device.type, enabled=False)


@dataclass(frozen=True, eq=False, kw_only=True)
class Linear:
    """The arguments of one call; what each means is said in `linear_token_stats`. `slices` comes from the argument `group`."""

    hidden: Tensor
    weight: Tensor
    actions: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    lora_scale: float
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    temperature: float | Tensor
    softcap: float | None
    workspace_bytes: int | None
    slices: VocabSlices | None = None

    def checked(self, group: object) -> Linear:
        """The same call, with its slice of the vocabulary; ValueError names the argument that does not fit."""
        hidden, weight = self.hidden, self.weight
        checks.floating("hidden", hidden)
        checks.rows_only("hidden", hidden, "(N, D)", 2)
        checks.floating("weight", weight)
        if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] < 1:
            checks.fail("weight", f"shape (V, {hidden.shape[1]}) to fit hidden", f"shape {tuple(weight.shape)}")
        slices = VocabSlices.of(group, len(weight), len(hidden), hidden)
        self._check(slices)
        return replace(self, slices=slices)

    def _check(self, slices: VocabSlices | None) -> None:
        hidden, (n, width), columns = self.hidden, self.hidden.shape, len(self.weight)
        checks.tensor("weight", self.weight, (columns, width), hidden)
        checks.actions(self.actions, (n,), columns if slices is None else slices.vocab, hidden)
        if self.bias is not None:
            checks.tensor("bias", self.bias, (columns,), hidden)
        _check_both("lora_a", self.lora_a, "lora_b", self.lora_b)
        if self.lora_a is not None:
            checks.floating("lora_a", self.lora_a)
            rank = len(self.lora_a) if self.lora_a.dim() else 0
            checks.tensor("lora_a", self.lora_a, (rank, width), hidden, "(rank, D)")
            checks.tensor("lora_b", self.lora_b, (columns, rank), hidden, "(V, rank of lora_a)")
        _check_both("ref_hidden", self.ref_hidden, "ref_weight", self.ref_weight)
        if self.ref_hidden is not None:
            checks.floating("ref_hidden", self.ref_hidden)
            ref_width = self.ref_hidden.shape[-1] if self.ref_hidden.dim() else 0
            checks.tensor("ref_hidden", self.ref_hidden, (n, ref_width), hidden)
            meaning = "(V of weight, width of ref_hidden)"
            checks.tensor("ref_weight", self.ref_weight, (columns, ref_width), hidden, meaning)
        if self.ref_bias is not None:
            _check_both("ref_bias", self.ref_bias, "ref_hidden", self.ref_hidden)
            checks.tensor("ref_bias", self.ref_bias, (columns,), hidden)
        checks.temperature(self.temperature, (n,), hidden)
        checks.softcap(self.softcap)
        checks.factor("lora_scale", self.lora_scale)
        if self.workspace_bytes is not None:
            checks.in_range("workspace_bytes", self.workspace_bytes, 1, 2**62, "a positive number of bytes or None")

    @property
    def dtype(self) -> torch.dtype:
        """Of logits and statistics."""
        return compute_dtype(self.hidden, self.weight, self.ref_hidden, self.ref_weight)

    def differentiable(self) -> Differentiable:
        hidden, low = self.hidden, None
        if self.lora_a is not None:
            with no_autocast(hidden.device):
                low = self.lora_scale * F.linear(hidden.to(self.dtype), self.lora_a.to(self.dtype))
        if self.slices is not None:
            hidden, low = self.slices.shared(hidden), None if low is None else self.slices.shared(low)
        return Differentiable(hidden, self.weight, self.bias, low, self.lora_b)

    def rows_in_workspace(self, bytes_per_logit: int) -> int:
        """How many rows of V logits (of both models) fit; one at the least, and as many in every process of a group."""
        budget = self.workspace_bytes or WORKSPACE_BYTES.get(self.hidden.device.type, WORKSPACE_BYTES["cpu"])
        widest = len(self.weight) if self.slices is None else self.slices.widest
        return max(1, budget // (widest * bytes_per_logit))


class Differentiable(NamedTuple):
    """The tensors that receive gradients. `low` is (N, rank): the hidden states after the low-rank update's first matrix."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    low: Tensor | None
    lora_b: Tensor | None

    def wanted(self) -> tuple[bool, bool, bool, bool, bool]:
        """Of each, whether its gradient is."""

        def live(x: Tensor | None) -> bool:
            return x is not None and x.requires_grad and torch.is_grad_enabled()

        return live(self.hidden), live(self.weight), live(self.bias), live(self.low), live(self.lora_b)


def _check_both(name: str, value: Tensor | None, other: str, other_value: Tensor | None) -> None:
    if (value is None) != (other_value is None):
        given, missing = (name, other) if other_value is None else (other, name)
        checks.fail(missing, f"a tensor, because {given} is given", "None")
