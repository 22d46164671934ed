"""token_stats in CUDA C++: lays the tensors out for `_cuda.token_stats_*`; csrc/cuda/token_stats.h."""

from __future__ import annotations

import torch
from torch import Tensor

import dqo_kernels._cuda as _cuda
from dqo_kernels.core.addresses import DTYPES, address, addresses, rows, where
from dqo_kernels.core.row_stats import RowStats, SavedStats


def arguments(logits, actions, ref_logits, mask, temperatures, temperature, softcap):
    """What every kernel of logits is told about them."""
    row = (rows(logits), rows(ref_logits), actions.data_ptr(), address(mask), address(temperatures))
    return *row, temperature, softcap, actions.numel(), logits.shape[-1]


def fwd(logits, actions, ref_logits, mask, temperatures, temperature, softcap) -> RowStats:
    """The statistics of every row."""
    n, splits = actions.numel(), _cuda.splits(logits.shape[-1])
    stats = RowStats.empty(logits, n, ref_logits is not None)
    partial = None
    if splits > 1:
        partial = torch.empty(_cuda.PARTIALS * n * splits, dtype=torch.float32, device=logits.device)
    given = arguments(logits, actions, ref_logits, mask, temperatures, temperature, softcap)
    _cuda.token_stats_fwd(where(logits), given, DTYPES[logits.dtype], addresses(*stats), address(partial))
    return stats


def bwd(
    logits, actions, ref_logits, mask, temperatures, temperature, softcap,
    entropy, peak, log_total, kl, ref_peak, ref_log_total, c_logprobs, c_lse, c_entropy, c_kl,
    *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of logits, in their shape and dtype; into `out` if given: contiguous, the logits themselves will do, and it
    may be bfloat16 where they are float32."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    given = arguments(logits, actions, ref_logits, mask, temperatures, temperature, softcap)
    stats = addresses(*SavedStats(entropy, peak, log_total, kl, ref_peak, ref_log_total).in_place())
    upstream = addresses(c_logprobs, c_lse, c_entropy, c_kl)
    rounded = grad.dtype != logits.dtype
    _cuda.token_stats_bwd(where(logits), given, DTYPES[logits.dtype], stats, upstream, grad.data_ptr(), rounded)
    return grad
