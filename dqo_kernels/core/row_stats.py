"""The statistics that the row kernels write and read: which there are, and their one order, that of csrc/common/token_stats.h.

A statistic is (n,), one number a row. Without a reference policy those of the reference are empty, (0,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Fields = TypeVar("Fields", bound="tuple[Tensor | None, ...]")  # a NamedTuple of tensors


def mapped(function: Callable[[Tensor], Tensor], fields: Fields) -> Fields:
    """`function` of every field that is there."""
    make: Callable[..., Fields] = type(fields)
    return make(*(None if x is None else function(x) for x in fields))


def joined(parts: Sequence[Fields]) -> Fields:
    """Runs of rows, one after another."""
    if len(parts) == 1:
        return parts[0]
    make: Callable[..., Fields] = type(parts[0])
    return make(*(None if field[0] is None else torch.cat(field) for field in zip(*parts)))


class RowStats(NamedTuple):
    """What the forward writes. float32, or float64 from float64 logits."""

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor
    peak: Tensor  # the largest entry, after the softcap and before the temperature
    log_total: Tensor  # ln sum exp((z - peak) / temperature)
    ref_logprobs: Tensor
    ref_lse: Tensor
    kl: Tensor
    ref_peak: Tensor
    ref_log_total: Tensor

    @classmethod
    def empty(cls, logits: Tensor, n: int, with_reference: bool, dtype: torch.dtype = torch.float32) -> RowStats:
        """Room for the statistics of n rows, on the device of their logits."""
        own = [torch.empty(n, dtype=dtype, device=logits.device) for _ in range(5)]
        return cls(*own, *(x.new_empty(n if with_reference else 0) for x in own))

    def saved(self) -> SavedStats:
        return SavedStats(self.entropy, self.peak, self.log_total, self.kl, self.ref_peak, self.ref_log_total)

    def shown(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Those of a caller: logprobs, lse, entropy, ref_logprobs, ref_lse, kl."""
        return self.logprobs, self.lse, self.entropy, self.ref_logprobs, self.ref_lse, self.kl


class SavedStats(NamedTuple):
    """What the backward reads: those of RowStats that a gradient depends on."""

    entropy: Tensor
    peak: Tensor
    log_total: Tensor
    kl: Tensor
    ref_peak: Tensor
    ref_log_total: Tensor

    def in_place(self) -> tuple[Tensor | None, ...]:
        """Where RowStats has them, None in place of the others."""
        return (
            *(None, None, self.entropy, self.peak, self.log_total),
            *(None, None, self.kl, self.ref_peak, self.ref_log_total),
        )


class Coefficients(NamedTuple):
    """The gradients that arrive at the statistics that have one; None where none arrives."""

    logprobs: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    kl: Tensor | None

    def are_absent(self) -> bool:
        return all(x is None for x in self)
