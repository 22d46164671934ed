"""token_stats: log-probability, logsumexp, entropy and exact KL of every row of logits, from one read.

Same as, without the (N, V) copies:
    logp = (softcap * tanh(logits / softcap) / temperature).log_softmax(-1)
    logprobs, entropy = logp.gather(-1, actions[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    kl = (logp.exp() * (logp - ref_logp)).sum(-1)

Backward with c_x the gradient that arrives at field x, p = softmax(z), u = z - lse:
    dz = p * (A + B*u + C*u_ref) + D*onehot(action)
    A = c_lse - c_logprob - c_kl*KL - c_H*H,   B = c_kl - c_H,   C = -c_kl,   D = c_logprob

Backends: reference, cpp, triton, cuda. The native ones keep the largest entry and ln(sum) of each row for the backward.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dqo_kernels.core import checks, dispatch, library
from dqo_kernels.core.packed import compute_dtype
from dqo_kernels.core.row_stats import Coefficients, RowStats, joined, mapped
from dqo_kernels.core.vocab_parallel import VocabSlices, sliced_rows

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


def seen(shown: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], with_reference: bool) -> TokenStats:
    """TokenStats of `RowStats.shown()`."""
    return TokenStats(*shown) if with_reference else TokenStats(*shown[:3])


class _Row(NamedTuple):
    """A row of logits, or this process's columns of it: what is (n,) is of the whole row."""

    centred: Tensor  # (n, V) z - max
    weights: Tensor  # (n, V) exp(z - max)
    total: Tensor  # (n,) their sum, at least 1
    log_total: Tensor  # (n,)
    lse: Tensor  # (n,)


def _over_vocab(x: Tensor, slices: VocabSlices | None) -> Tensor:
    """(n,) sum of x (n, V)."""
    return x.sum(-1) if slices is None else slices.total(x.sum(-1))


def _row(logits: Tensor, temperature: float | Tensor, softcap: float | None, dtype: torch.dtype, slices) -> _Row:
    z = logits.to(dtype)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.to(dtype).reshape(-1, 1)
    peak = z.detach().amax(-1, keepdim=True)  # a constant: every statistic is invariant to it
    peak = peak if slices is None else slices.peak(peak)
    # The difference first: at large offsets z / temperature has already been rounded.
    centred = (z - peak) / temperature
    weights = centred.exp()
    total = _over_vocab(weights, slices)
    log_total = total.log()
    return _Row(centred, weights, total, log_total, log_total + (peak / temperature)[:, 0])


def _expectation(row: _Row, x: Tensor, slices: VocabSlices | None) -> Tensor:
    """(n,) sum_v p_v x_v, where p_v = 0 contributes 0 even if x_v is infinite."""
    impossible = row.weights == 0
    return _over_vocab(row.weights * x.masked_fill(impossible, 0.0), slices) / row.total


def _taken(row: _Row, actions: Tensor, slices: VocabSlices | None) -> Tensor:
    """(n,) log-probability of the actions; NaN where an action is out of range (the CPU has refused those before)."""
    width = row.centred.shape[-1]
    if slices is None:
        here, column = (actions >= 0) & (actions < width), actions
    else:
        here, column = slices.local(actions)
    taken = row.centred.gather(-1, column.clamp(0, width - 1)[:, None])[:, 0]
    if slices is not None:
        taken = slices.total(torch.where(here, taken, 0))
        here = (actions >= 0) & (actions < slices.vocab)
    return torch.where(here, taken - row.log_total, torch.nan)


def row_stats(
    logits: Tensor,  # (n, V)
    actions: Tensor,  # (n,)
    ref_logits: Tensor | None,  # (n, V)
    temperature: float | Tensor,
    softcap: float | None,
    dtype: torch.dtype,
    slices: VocabSlices | None = None,
) -> TokenStats:
    """The definition, in differentiable torch, of as many rows as it is given at once."""
    row = _row(logits, temperature, softcap, dtype, slices)
    entropy = row.log_total - _expectation(row, row.centred, slices)
    stats = TokenStats(_taken(row, actions, slices), row.lse, entropy)
    if ref_logits is None:
        return stats
    with torch.no_grad():  # the reference policy is a constant
        ref = _row(ref_logits, temperature, softcap, dtype, slices)
        ref_logprobs = _taken(ref, actions, slices)
    kl = _expectation(row, row.centred - ref.centred, slices) - (row.log_total - ref.log_total)
    return stats._replace(ref_logprobs=ref_logprobs, ref_lse=ref.lse, kl=kl)


def in_chunks(rows: int, n: int, per_row: list[Tensor | float | None], function) -> TokenStats:
    """Calls `function` for every `rows` rows and joins what it returns. Tensors with N rows are split; the rest is passed on.

    If there are several chunks, the backward computes each again, so that no (rows, V) tensor outlives its chunk.
    """
    if n <= rows:
        return function(*per_row)

    def pieces(x):
        is_rows = isinstance(x, Tensor) and x.dim() > 0
        return x.split(rows) if is_rows else [x] * len(range(0, n, rows))

    chunks = zip(*map(pieces, per_row))
    if dispatch.transformed():  # torch.func knows no recomputation: everything is held
        parts = [function(*chunk) for chunk in chunks]
    else:
        parts = [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return joined(parts)


def token_stats_reference(logits, actions, ref_logits, mask, temperature, softcap, slices=None) -> TokenStats:
    n, vocab = logits.shape
    dtype = compute_dtype(logits, ref_logits)
    rows = max(1, CHUNK_BYTES // ((vocab if slices is None else slices.widest) * dtype.itemsize))

    def chunk(logits, actions, ref_logits, mask, temperature):
        if mask is None:
            return row_stats(logits, actions, ref_logits, temperature, softcap, dtype, slices)
        # Selected away on both sides, so that neither a NaN under the mask nor its gradient passes.
        logits = torch.where(mask[:, None], logits, 0)
        ref_logits = None if ref_logits is None else torch.where(mask[:, None], ref_logits, 0)
        if isinstance(temperature, Tensor) and temperature.dim():
            temperature = torch.where(mask, temperature, 1)
        stats = row_stats(logits, torch.where(mask, actions, 0), ref_logits, temperature, softcap, dtype, slices)
        return mapped(lambda x: torch.where(mask, x, 0), stats)

    return in_chunks(rows, n, [logits, actions, ref_logits, mask, temperature], chunk)


def _forward(logits, actions, ref_logits, mask, temperatures, temperature, softcap, backend):
    inputs = (logits, actions, ref_logits, mask, temperatures, temperature, softcap)
    return library.run("token_stats", "fwd", backend, *inputs)


def _fake_forward(logits, actions, ref_logits, mask, temperatures, temperature, softcap, backend):
    def rows(present):
        return logits.new_empty(actions.shape[0] if present else 0, dtype=compute_dtype(logits))

    return tuple(rows(True) for _ in range(5)) + tuple(rows(ref_logits is not None) for _ in range(5))


def _backward(*arguments):
    *inputs, backend = arguments
    return library.run("token_stats", "bwd", backend, *inputs)


_INPUTS = (
    "Tensor logits, Tensor actions, Tensor? ref_logits, Tensor? mask, "
    "Tensor? temperatures, float temperature, float softcap"
)
_FORWARD = library.Operation(
    f"token_stats({_INPUTS}, str backend) -> "
    "(Tensor logprobs, Tensor lse, Tensor entropy, Tensor peak, Tensor log_total, "
    "Tensor ref_logprobs, Tensor ref_lse, Tensor kl, Tensor ref_peak, Tensor ref_log_total)",
    _forward,
    _fake_forward,
)
_BACKWARD = library.Operation(
    f"token_stats_backward({_INPUTS}, Tensor entropy, Tensor peak, Tensor log_total, Tensor kl, Tensor ref_peak, "
    "Tensor ref_log_total, Tensor? c_logprobs, Tensor? c_lse, Tensor? c_entropy, Tensor? c_kl, str backend) -> Tensor",
    _backward,
    lambda logits, *_: logits.new_empty(logits.shape),
)


def _save(ctx, inputs, output):
    logits, actions, ref_logits, mask, temperatures, ctx.temperature, ctx.softcap, ctx.backend = inputs
    stats = RowStats(*output)
    ctx.save_for_backward(logits, actions, ref_logits, mask, temperatures, *stats.saved())
    constants = (stats.peak, stats.log_total, stats.ref_logprobs, stats.ref_lse, stats.ref_peak, stats.ref_log_total)
    ctx.mark_non_differentiable(*constants)


def _gradient(ctx, *arriving):
    at = RowStats(*arriving)
    logits, actions, ref_logits, mask, temperatures, *saved = ctx.saved_tensors
    kl = None if ref_logits is None else at.kl
    coefficients = mapped(Tensor.contiguous, Coefficients(at.logprobs, at.lse, at.entropy, kl))
    if coefficients.are_absent():
        return _FORWARD.gradients()
    ref_logits = None if kl is None else ref_logits  # the reference is needed for the gradient of the KL alone
    inputs = (logits, actions, ref_logits, mask, temperatures, ctx.temperature, ctx.softcap)
    return _FORWARD.gradients(logits=_BACKWARD(*inputs, *saved, *coefficients, ctx.backend))


_FORWARD.differentiable(_save, _gradient)
_BACKWARD.differentiable_once()


def readable(name: str, x: Tensor) -> Tensor:
    """x itself, if the entries of a row are neighbours in memory. Else a contiguous copy, with a warning that names x."""
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    if not torch.compiler.is_compiling():
        warnings.warn(f"{name} has stride {x.stride(-1)} along V and is copied; lay it out with V last", stacklevel=4)
    return x.contiguous()


def statistics(
    logits: Tensor,  # (N, V), or (B, T, V) with N = B*T
    actions: Tensor,  # (N,)
    ref_logits: Tensor | None,  # shape of logits
    mask: Tensor | None,  # (N,) bool: rows that do not count are not read, and all their statistics are 0
    temperature: float | Tensor,  # or (N,)
    softcap: float | None,
    backend: str | None,
    slices: VocabSlices | None = None,
) -> TokenStats:
    """TokenStats of arguments that have been checked."""
    dtype = logits.dtype if ref_logits is None else torch.promote_types(logits.dtype, ref_logits.dtype)
    chosen = dispatch.choose("token_stats", logits.device.type, backend, dtype)
    actions = checks.owned_index(actions)
    if isinstance(temperature, Tensor):
        temperature = checks.owned(temperature.detach(), temperature.dtype)
    if chosen == "reference":
        rows = logits.flatten(0, -2), actions, None if ref_logits is None else ref_logits.flatten(0, -2)
        return token_stats_reference(*rows, mask, temperature, softcap, slices)
    temperatures = None
    if isinstance(temperature, Tensor):
        temperatures, temperature = temperature.to(compute_dtype(logits)).expand(actions.shape).contiguous(), 1.0
    logits = readable("logits", logits.to(dtype))
    if ref_logits is not None:
        ref_logits = readable("ref_logits", ref_logits.detach().to(dtype))
    mask = None if mask is None else mask.contiguous()
    arguments = (logits, actions, ref_logits, mask, temperatures, float(temperature), float(softcap or 0.0), chosen)
    shown = RowStats(*_FORWARD(*arguments)).shown() if slices is None else sliced_rows(*arguments, slices)
    return seen(shown, ref_logits is not None)


def token_stats(
    logits: Tensor,
    actions: Tensor,
    ref_logits: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> TokenStats:
    """Statistics of softcap(logits) / temperature for each row; the same transformation is applied to `ref_logits`.

    Args:
        logits: (N, V) float32, bfloat16, float16 or float64, any row stride. -inf entries have probability 0.
        actions: (N,) integer token ids in [0, V); checked on the CPU, elsewhere an id out of range gives NaN in its row
            (set DQO_KERNELS_CHECK=1 to check there too).
        ref_logits: (N, V) floating, the reference policy's; a constant.
        temperature: a positive number, or (N,) of them; a constant.
        softcap: z becomes softcap * tanh(z / softcap) before the temperature (Gemma 2); None leaves z alone.
        backend: "reference", "cpp", "triton", "cuda", or None for the best that can run.
        group: the processes that hold V together. Each gives its own consecutive columns as `logits` (and `ref_logits`), in the
            order of ranks, and the same `actions`, which are ids of the whole V. Each gets the statistics of whole rows, and the
            gradient of its own columns. The call gathers nine numbers a row at most, and waits for the device once.

    Returns:
        TokenStats; `logprobs`, `lse`, `entropy` and `kl` are differentiable in `logits`.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit, each named.
        RuntimeError: the requested backend cannot run.
    """
    checks.logits("logits", logits)
    checks.rows_only("logits", logits, "(N, V)", 2)
    if logits.shape[1] < 1:
        checks.fail("logits", "shape (N, V)", f"shape {tuple(logits.shape)}")
    n, vocab = logits.shape
    slices = VocabSlices.of(group, vocab, n, logits)
    checks.actions(actions, (n,), vocab if slices is None else slices.vocab, logits)
    if ref_logits is not None:
        checks.logits("ref_logits", ref_logits)
        checks.tensor("ref_logits", ref_logits, (n, vocab), logits, "(that of logits)")
    checks.temperature(temperature, (n,), logits)
    checks.softcap(softcap)
    return statistics(logits, actions, ref_logits, None, temperature, softcap, backend, slices)
