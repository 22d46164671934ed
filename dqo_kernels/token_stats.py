"""token_stats: log-probability, logsumexp, entropy and exact KL of every row of logits, from one read.

Same as, without the (N, V) copies:
    logp = (softcap * tanh(logits / softcap) / temperature).log_softmax(-1)
    logprobs, entropy = logp.gather(-1, actions[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    kl = (logp.exp() * (logp - ref_logp)).sum(-1)

Backward with c_x the gradient that arrives at field x, p = softmax(z), u = z - lse:
    dz = p * (A + B*u + C*u_ref) + D*onehot(action)
    A = c_lse - c_logprob - c_kl*KL - c_H*H,   B = c_kl - c_H,   C = -c_kl,   D = c_logprob

Backends: reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dqo_kernels import checks, dispatch
from dqo_kernels.packed import compute_dtype

# The reference makes full-precision copies of at most this many bytes of logits at a time.
CHUNK_BYTES = 64 * 2**20


class TokenStats(NamedTuple):
    """Statistics of each row, (N,) float32 (float64 from float64 logits). The last three are None without a reference."""

    logprobs: Tensor  # log pi(action), never above 0
    lse: Tensor  # logsumexp over V
    entropy: Tensor  # nats
    ref_logprobs: Tensor | None = None
    ref_lse: Tensor | None = None
    kl: Tensor | None = None  # KL(pi || ref), exactly 0 for identical rows


class _Row(NamedTuple):
    centred: Tensor  # (n, V) z - max
    weights: Tensor  # (n, V) exp(z - max)
    total: Tensor  # (n,) their sum, at least 1
    log_total: Tensor  # (n,)
    lse: Tensor  # (n,)


def _row(logits: Tensor, temperature: float | Tensor, softcap: float | None, dtype: torch.dtype) -> _Row:
    z = logits.to(dtype)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.to(dtype).reshape(-1, 1)
    peak = z.detach().amax(-1, keepdim=True)  # a constant: every statistic is invariant to it
    centred = (
        z - peak
    ) / temperature  # the difference first: at large offsets z / temperature has already been rounded
    weights = centred.exp()
    total = weights.sum(-1)
    log_total = total.log()
    return _Row(centred, weights, total, log_total, log_total + (peak / temperature)[:, 0])


def _expectation(row: _Row, x: Tensor) -> Tensor:
    """(n,) sum_v p_v x_v, where p_v = 0 contributes 0 even if x_v is infinite."""
    impossible = row.weights == 0
    return (row.weights * x.masked_fill(impossible, 0.0)).sum(-1) / row.total


def _taken(row: _Row, actions: Tensor) -> Tensor:
    """(n,) log-probability of the actions; NaN where an action is out of range (the CPU has refused those before)."""
    vocab = row.centred.shape[-1]
    valid = (actions >= 0) & (actions < vocab)
    taken = row.centred.gather(-1, actions.clamp(0, vocab - 1)[:, None])[:, 0] - row.log_total
    return torch.where(valid, taken, torch.nan)


def row_stats(
    logits: Tensor,  # (n, V)
    actions: Tensor,  # (n,)
    ref_logits: Tensor | None,  # (n, V)
    temperature: float | Tensor,
    softcap: float | None,
    dtype: torch.dtype,
) -> TokenStats:
    """The definition, in differentiable torch, of as many rows as it is given at once."""
    row = _row(logits, temperature, softcap, dtype)
    stats = TokenStats(_taken(row, actions), row.lse, row.log_total - _expectation(row, row.centred))
    if ref_logits is None:
        return stats
    with torch.no_grad():  # the reference policy is a constant
        ref = _row(ref_logits, temperature, softcap, dtype)
        ref_logprobs = _taken(ref, actions)
    kl = _expectation(row, row.centred - ref.centred) - (row.log_total - ref.log_total)
    return stats._replace(ref_logprobs=ref_logprobs, ref_lse=ref.lse, kl=kl)


def in_chunks(rows: int, n: int, per_row: list[Tensor | float | None], function) -> TokenStats:
    """`function` of every `rows` rows of `per_row` (tensors with N rows are split, the rest passed on), joined.

    With more than one chunk each is recomputed in the backward, so that no chunk's (rows, V) tensors outlive it.
    """
    if n <= rows:
        return function(*per_row)

    def pieces(x):
        is_rows = isinstance(x, Tensor) and x.dim() > 0
        return x.split(rows) if is_rows else [x] * len(range(0, n, rows))

    parts = [
        checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(*map(pieces, per_row))
    ]
    return TokenStats(*(None if field[0] is None else torch.cat(field) for field in zip(*parts)))


def token_stats_reference(logits, actions, ref_logits, temperature, softcap) -> TokenStats:
    n, vocab = logits.shape
    dtype = compute_dtype(logits, ref_logits)
    rows = max(1, CHUNK_BYTES // (vocab * dtype.itemsize))

    def chunk(logits, actions, ref_logits, temperature):
        return row_stats(logits, actions, ref_logits, temperature, softcap, dtype)

    return in_chunks(rows, n, [logits, actions, ref_logits, temperature], chunk)


def token_stats(
    logits: Tensor,
    actions: Tensor,
    ref_logits: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> TokenStats:
    """Statistics of softcap(logits) / temperature for each row; the same transformation is applied to `ref_logits`.

    Args:
        logits: (N, V) floating, any row stride. -inf entries have probability 0.
        actions: (N,) integer token ids in [0, V); checked on the CPU, elsewhere an id out of range gives NaN in its row
            (set DQO_KERNELS_CHECK=1 to check there too).
        ref_logits: (N, V) floating, the reference policy's; a constant.
        temperature: a positive number, or (N,) of them; a constant.
        softcap: z becomes softcap * tanh(z / softcap) before the temperature (Gemma 2); None leaves z alone.
        backend: "reference", or None for the best that can run.

    Returns:
        TokenStats; `logprobs`, `lse`, `entropy` and `kl` are differentiable in `logits`.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit, each named.
        RuntimeError: the requested backend cannot run.
    """
    checks.floating("logits", logits)
    if logits.dim() != 2 or logits.shape[1] < 1:
        checks.fail("logits", "shape (N, V)", f"shape {tuple(logits.shape)}")
    n, vocab = logits.shape
    checks.actions(actions, (n,), vocab, logits)
    if ref_logits is not None:
        checks.tensor("ref_logits", ref_logits, (n, vocab), logits, "(that of logits)")
    checks.temperature(temperature, n, logits)
    checks.softcap(softcap)
    dispatch.choose("token_stats", logits.device.type, backend)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach()
    return token_stats_reference(logits, actions.long(), ref_logits, temperature, softcap)
