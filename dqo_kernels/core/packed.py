"""Packed rows: N rows of B sequences with boundaries cu_seqlens (B+1,), and the operations along a sequence.

Values are never multiplied across a boundary, they are selected: a NaN in one sequence cannot reach another.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any input is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def times(gain: float | Tensor, x: Tensor) -> Tensor:
    """gain * x, and 0 for a gain of exactly 0, whatever x is: what has no part in a sum makes it neither infinite nor NaN."""
    if isinstance(gain, Tensor):
        return gain * torch.where(gain == 0.0, torch.zeros((), dtype=x.dtype, device=x.device), x)
    return gain * x if gain != 0.0 else torch.where(torch.zeros_like(x, dtype=torch.bool), x, 0)


def sequence_index(cu_seqlens: Tensor, n: int) -> Tensor:
    """(N,): the sequence that each row belongs to."""
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    return torch.repeat_interleave(torch.arange(len(lengths), device=cu_seqlens.device), lengths, output_size=n)


def is_last_row(sequence: Tensor) -> Tensor:
    """(N,) bool: True on the last row of each sequence."""
    last = torch.ones_like(sequence, dtype=torch.bool)
    last[:-1] = sequence[1:] != sequence[:-1]
    return last


def next_row(x: Tensor, sequence: Tensor, end: Tensor) -> Tensor:
    """(N,): x_{t+1} inside the sequence, end[b] (B,) after the last row of sequence b."""
    following = torch.cat([x[1:], x[-1:]])
    return torch.where(is_last_row(sequence), end[sequence], following)


def reverse_scan(x: Tensor, decay: float | Tensor, sequence: Tensor) -> Tensor:
    """(N,): y_t = x_t + decay * y_{t+1} inside each sequence; `decay` is one number, or (N,) one of each row t.

    By doubling: after round k, y_t holds the first 2^k terms of its sum; log2(longest sequence) rounds of torch operations.
    """
    n, stride = x.shape[0], 1
    if isinstance(decay, Tensor):
        return _reverse_scan_of_rows(x, decay, sequence)
    while stride < n and decay != 0.0:
        together = sequence[stride:] == sequence[:-stride]
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(together.any()):
            break
        reached = torch.where(together, decay * x[stride:], torch.zeros((), dtype=x.dtype, device=x.device))
        x = torch.cat([x[:-stride] + reached, x[-stride:]])
        stride, decay = 2 * stride, decay * decay
    return x


def _reverse_scan_of_rows(x: Tensor, decay: Tensor, sequence: Tensor) -> Tensor:
    """As `reverse_scan`; the decays of 2^k rows are multiplied up as the sums are added up."""
    n, stride = x.shape[0], 1
    while stride < n:
        together = sequence[stride:] == sequence[:-stride]
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(together.any()):
            break
        gain = torch.where(together, decay[:-stride], torch.zeros((), dtype=decay.dtype, device=decay.device))
        x = torch.cat([x[:-stride] + times(gain, x[stride:]), x[-stride:]])
        decay = torch.cat([times(gain, decay[stride:]), decay[-stride:]])
        stride = 2 * stride
    return x


def suffix_sum(x: Tensor, sequence: Tensor) -> Tensor:
    """(N,): sum of x_i over i >= t inside the sequence."""
    return reverse_scan(x, 1.0, sequence)


def prefix_sum(x: Tensor, sequence: Tensor) -> Tensor:
    """(N,): sum of x_i over i < t inside the sequence; 0 on its first row."""
    inclusive = reverse_scan(x.flip(0), 1.0, sequence.flip(0)).flip(0)
    shifted = torch.cat([inclusive[:1], inclusive[:-1]])
    first = is_last_row(sequence.flip(0)).flip(0)
    return shifted.masked_fill(first, 0.0)


def sequence_total(x: Tensor, sequence: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(N,): sum of x over the whole sequence, on each of its rows."""
    return suffix_sum(x, sequence)[cu_seqlens[:-1][sequence]]


class RowsThatCount:
    """Moves the rows of a mask to the front of their sequence and the others into one sequence after the last: what runs along
    a sequence then passes over them. The shapes stay, so nothing waits for the device."""

    def __init__(self, mask: Tensor, cu_seqlens: Tensor):
        sequences = cu_seqlens.numel() - 1
        destination = torch.where(mask, sequence_index(cu_seqlens, mask.shape[0]), sequences)
        self.mask = mask
        self.order = destination.argsort(stable=True)
        lengths = cu_seqlens.new_zeros(sequences + 1).index_add(0, destination, torch.ones_like(destination))
        self.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))  # (B+2,)

    def first(self, x: Tensor) -> Tensor:
        """(N,) rows of x in that order; 0 in place of those that do not count."""
        return torch.where(self.mask, x, 0)[self.order]

    def back(self, x: Tensor) -> Tensor:
        """(N,) rows in their old order; 0 for those that do not count."""
        return torch.where(self.mask, x[self.order.argsort()], 0)
