"""token_stats in CUDA C++: lays the tensors out for `_cuda.token_stats_*`; csrc/cuda/token_stats.h."""

from __future__ import annotations

import torch
from torch import Tensor

import dqo_kernels._cuda as _cuda
from dqo_kernels.core.addresses import DTYPES, address, addresses, rows, where


def arguments(logits, actions, ref_logits, mask, temperatures, temperature, softcap):
    """What every kernel of logits is told about them."""
    row = (rows(logits), rows(ref_logits), actions.data_ptr(), address(mask), address(temperatures))
    return *row, temperature, softcap, actions.numel(), logits.shape[-1]


def new_fields(logits: Tensor, n: int, with_reference: bool) -> list[Tensor]:
    """logprobs, lse, entropy, peak, log_total, ref_logprobs, ref_lse, kl, ref_peak, ref_log_total; all (n,) float32, and the
    last five empty without a reference."""
    sizes = [n] * 5 + [n if with_reference else 0] * 5
    return [torch.empty(size, dtype=torch.float32, device=logits.device) for size in sizes]


def fwd(logits, actions, ref_logits, mask, temperatures, temperature, softcap) -> tuple[Tensor, ...]:
    """The ten fields of `new_fields`."""
    n, splits = actions.numel(), _cuda.splits(logits.shape[-1])
    fields = new_fields(logits, n, ref_logits is not None)
    partial = None
    if splits > 1:
        partial = torch.empty(_cuda.PARTIALS * n * splits, dtype=torch.float32, device=logits.device)
    given = arguments(logits, actions, ref_logits, mask, temperatures, temperature, softcap)
    _cuda.token_stats_fwd(where(logits), given, DTYPES[logits.dtype], addresses(*fields), address(partial))
    return tuple(fields)


def bwd(
    logits, actions, ref_logits, mask, temperatures, temperature, softcap,
    peak, log_total, ref_peak, ref_log_total, entropy, kl, c_logprobs, c_lse, c_entropy, c_kl,
    *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of logits, in their shape and dtype; into `out` if given: contiguous, the logits themselves will do, and it
    may be bfloat16 where they are float32."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    given = arguments(logits, actions, ref_logits, mask, temperatures, temperature, softcap)
    fields = [0, 0, *addresses(entropy, peak, log_total), 0, 0, *addresses(kl, ref_peak, ref_log_total)]
    upstream = addresses(c_logprobs, c_lse, c_entropy, c_kl)
    rounded = grad.dtype != logits.dtype
    _cuda.token_stats_bwd(where(logits), given, DTYPES[logits.dtype], fields, upstream, grad.data_ptr(), rounded)
    return grad
