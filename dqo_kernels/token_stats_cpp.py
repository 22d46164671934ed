"""token_stats in C++ on the CPU: lays the tensors out for `_cpu.token_stats_*`; csrc/cpu/token_stats.h."""

from __future__ import annotations

import torch
from torch import Tensor

import dqo_kernels._cpu as _cpu
import dqo_kernels.cpu_threads  # noqa: F401  (hands torch's threads to the kernels)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
ABSENT = (0, 1, 0, 0)


def _rows(x: Tensor | None) -> tuple[int, int, int, int]:
    """Address, and where row i starts: (i // inner) * outer_stride + (i % inner) * inner_stride."""
    if x is None:
        return ABSENT
    inner, outer_stride = (x.shape[1], x.stride(0)) if x.dim() == 3 else (max(x.shape[0], 1), 0)
    return x.data_ptr(), max(inner, 1), outer_stride, x.stride(-2)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _arguments(logits, actions, ref_logits, mask, temperatures, temperature, softcap):
    """The arguments that both directions share, and what must outlive the call."""
    temperatures = None if temperatures is None else temperatures.double().contiguous()
    rows = actions.numel()
    shared = (_rows(logits), _rows(ref_logits), actions.data_ptr(), _address(mask), _address(temperatures))
    shared += (temperature, softcap, rows, logits.shape[-1], _DTYPES[logits.dtype], torch.get_num_threads())
    return shared, temperatures


def fwd(logits, actions, ref_logits, mask, temperatures, temperature, softcap) -> tuple[Tensor, ...]:
    """(logprobs, lse, entropy, peak, log_total, ref_logprobs, ref_lse, kl, ref_peak, ref_log_total), (N,) each."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    n = actions.numel()
    stats = [torch.empty(n, dtype=dtype) for _ in range(5)]
    stats += [torch.empty(0 if ref_logits is None else n, dtype=dtype) for _ in range(5)]
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
    grad = torch.empty(logits.shape, dtype=logits.dtype) if out is None else out
    shared, _alive = _arguments(logits, actions, ref_logits, mask, temperatures, temperature, softcap)
    stats = [0, 0, _address(entropy), peak.data_ptr(), log_total.data_ptr(), 0, 0]
    stats += [_address(kl), _address(ref_peak), _address(ref_log_total)]
    upstream = [_address(c) for c in (c_logprobs, c_lse, c_entropy, c_kl)]
    _cpu.token_stats_bwd(*shared, stats, upstream, grad.data_ptr(), grad.dtype != logits.dtype)
    return grad
