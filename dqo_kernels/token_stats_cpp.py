"""token_stats in C++ on the CPU: lays the tensors out for `_cpu.token_stats_*`; csrc/cpu/token_stats.h."""

from __future__ import annotations

import torch
from torch import Tensor

import dqo_kernels._cpu as _cpu
import dqo_kernels.core.cpu_threads  # noqa: F401  (hands torch's threads to the kernels)
from dqo_kernels.core.addresses import DTYPES, address, rows


def _arguments(logits, actions, ref_logits, mask, temperatures, temperature, softcap):
    """The arguments that both directions share, and what must outlive the call."""
    temperatures = None if temperatures is None else temperatures.double().contiguous()
    shared = (rows(logits), rows(ref_logits), actions.data_ptr(), address(mask), address(temperatures))
    shared += (temperature, softcap, actions.numel(), logits.shape[-1], DTYPES[logits.dtype], torch.get_num_threads())
    return shared, temperatures


def fwd(logits, actions, ref_logits, mask, temperatures, temperature, softcap) -> tuple[Tensor, ...]:
    """(logprobs, lse, entropy, peak, log_total, ref_logprobs, ref_lse, kl, ref_peak, ref_log_total), (N,) each."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    n = actions.numel()
    stats = [torch.empty(n, dtype=dtype, device=logits.device) for _ in range(5)]
    stats += [stats[0].new_empty(0 if ref_logits is None else n) for _ in range(5)]
    shared, _alive = _arguments(logits, actions, ref_logits, mask, temperatures, temperature, softcap)
    _cpu.token_stats_fwd(*shared, [x.data_ptr() for x in stats])
    return tuple(stats)


def bwd(
    logits, actions, ref_logits, mask, temperatures, temperature, softcap,
    peak, log_total, ref_peak, ref_log_total, entropy, kl, c_logprobs, c_lse, c_entropy, c_kl,
    *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of logits, in their shape and dtype; into `out` if given: contiguous, the logits themselves will do, and it
    may be bfloat16 where they are float32."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    shared, _alive = _arguments(logits, actions, ref_logits, mask, temperatures, temperature, softcap)
    stats = [0, 0, address(entropy), peak.data_ptr(), log_total.data_ptr(), 0, 0]
    stats += [address(kl), address(ref_peak), address(ref_log_total)]
    upstream = [address(c) for c in (c_logprobs, c_lse, c_entropy, c_kl)]
    _cpu.token_stats_bwd(*shared, stats, upstream, grad.data_ptr(), grad.dtype != logits.dtype)
    return grad
