"""token_stats in C++ on the CPU: lays the tensors out for `_cpu.token_stats_*`; csrc/cpu/token_stats.h."""

from __future__ import annotations

import torch
from torch import Tensor

import dqo_kernels._cpu as _cpu
import dqo_kernels.core.cpu_threads  # noqa: F401  (hands torch's threads to the kernels)
from dqo_kernels.core.addresses import DTYPES, address, addresses, rows
from dqo_kernels.core.row_stats import RowStats, SavedStats


def _arguments(logits, actions, ref_logits, mask, temperatures, temperature, softcap):
    """The arguments that both directions share, and what must outlive the call."""
    temperatures = None if temperatures is None else temperatures.double().contiguous()
    tensors = (rows(logits), rows(ref_logits), actions.data_ptr(), address(mask), address(temperatures))
    sizes = (actions.numel(), logits.shape[-1], DTYPES[logits.dtype], torch.get_num_threads())
    return (*tensors, temperature, softcap, *sizes), temperatures


def fwd(logits, actions, ref_logits, mask, temperatures, temperature, softcap) -> RowStats:
    """The statistics of every row."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    stats = RowStats.empty(logits, actions.numel(), ref_logits is not None, dtype)
    shared, _alive = _arguments(logits, actions, ref_logits, mask, temperatures, temperature, softcap)
    _cpu.token_stats_fwd(*shared, addresses(*stats))
    return stats


def bwd(
    logits, actions, ref_logits, mask, temperatures, temperature, softcap,
    entropy, peak, log_total, kl, ref_peak, ref_log_total, c_logprobs, c_lse, c_entropy, c_kl,
    *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of logits, in their shape and dtype; into `out` if given: contiguous, the logits themselves will do, and it
    may be bfloat16 where they are float32."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    shared, _alive = _arguments(logits, actions, ref_logits, mask, temperatures, temperature, softcap)
    stats = addresses(*SavedStats(entropy, peak, log_total, kl, ref_peak, ref_log_total).in_place())
    upstream = addresses(c_logprobs, c_lse, c_entropy, c_kl)
    _cpu.token_stats_bwd(*shared, stats, upstream, grad.data_ptr(), grad.dtype != logits.dtype)
    return grad
