"""Triton kernels of token_stats; their launchers are in token_stats_triton.py.

Forward. A row is cut into splits of SPLIT columns, a split into tiles; an online softmax runs over the tiles. With x = z' - m,
z' the logits after the softcap, m the running maximum, e = exp(x/T), and m_r, x_r, e_r the same of the reference:
    s = sum e,  u = sum e*x,  d = sum e*(x - x_r),  s_r = sum e_r
A maximum that moves from m to n (a = m - n, and a_r) rescales by r = exp(a/T), r_r = exp(a_r/T):
    s <- r*s,  u <- r*(u + a*s),  d <- r*(d + (a - a_r)*s),  s_r <- r_r*s_r
Splits merge by the same rule, in order.
    lse = m/T + ln s,  logprob = (z'_a - m)/T - ln s,  entropy = ln s - u/(T*s),  kl = d/(T*s) - (ln s - ln s_r)

Identical rows give kl = 0 exactly: x - x_r is formed before any product, both sums run the same instructions, and every launch
forbids the compiler to contract multiplications into additions (which could round one of the two rows differently).
max() drops NaN on GPUs, but e is NaN at a NaN, so s is and every field with it: s is never passed through a select.

Backward. Elementwise, one program per tile; the equations are in token_stats.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x):
    """tanh(x) and 1 - tanh(x)^2, each within about 2 ulp."""
    size = tl.abs(x)
    w = 1.0 / (tl.exp2(size * (2.0 * _LOG2E)) + 1.0)
    square = x * x
    small = 0.0015930430 * square - 0.0074252253  # minimax on [0, 0.8], 3e-9
    small = small * square + 0.021314016
    small = small * square - 0.053855855
    small = small * square + 0.13332270
    small = small * square - 0.33333299
    small = x + x * square * small
    large = 1.0 - 2.0 * w  # cancels where tanh is small, as 1 - tanh^2 does where it is large
    large = tl.where(x < 0, -large, large)
    is_small = size < 0.8
    return tl.where(is_small, small, large), tl.where(is_small, 1.0 - small * small, 4.0 * w * (1.0 - w))


@triton.jit
def _capped(z, softcap, CAP: tl.constexpr):
    """z' = softcap*tanh(z/softcap) and its derivative in z."""
    if CAP:
        t, slope = _tanh(z * tl.div_rn(1.0, softcap))
        return softcap * t, slope
    else:
        return z, 1.0


@triton.jit
def _row_offset(row, inner, outer_stride, inner_stride):
    """int64 offset of row i (int32) of (B, T, V), T = inner."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def _finite(peak):
    """0 for the maximum of nothing but -inf, which must not be subtracted from -inf."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _moved(old, new):
    """old - new of a running maximum; -inf when there was nothing before, 0 when there still is nothing."""
    return tl.where(new == float("-inf"), 0.0, old - new)


@triton.jit
def _rescaled(moments, shift, s, r):
    """r*(moments + shift*s); where r = 0 what was summed so far has no weight, and may be infinite."""
    return tl.where(r == 0.0, 0.0, r * (moments + shift * s))


@triton.jit
def _log_total(m, s):
    """ln s >= 0. A row of nothing but -inf has no distribution: NaN."""
    log_total = tl.log(tl.where(m == float("-inf"), float("nan"), s))
    return tl.where(log_total < 0.0, 0.0, log_total)


@triton.jit
def _taken(z_ptr, offset, action, valid, m, log_total, inverse, softcap, CAP: tl.constexpr):
    """log-probability of the action, at most 0; NaN for an id out of range."""
    z, _ = _capped(tl.load(z_ptr + offset + action, mask=valid, other=float("nan")).to(tl.float32), softcap, CAP)
    return (z - m) * inverse - log_total


@triton.jit
def _store_fields(
    row, stored, live,
    z_ptr, z_offset, ref_ptr, ref_offset, action_ptr, vocab, temperature, inverse, softcap,
    m, s, u, mr, sr, d,
    logprobs_ptr, lse_ptr, entropy_ptr, peak_ptr, log_total_ptr,
    ref_logprobs_ptr, ref_lse_ptr, kl_ptr, ref_peak_ptr, ref_log_total_ptr,
    REF: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The fields of one row, or of a vector of rows; 0 where not live."""
    action = tl.load(action_ptr + row, mask=stored, other=0)
    valid = live & (action >= 0) & (action < vocab)
    log_total = _log_total(m, s)
    peak = tl.where(s == s, m, s)
    mean = u / s * inverse
    logprob = _taken(z_ptr, z_offset, action, valid, peak, log_total, inverse, softcap, CAP)
    tl.store(logprobs_ptr + row, tl.where(live, logprob, 0.0), mask=stored)
    tl.store(lse_ptr + row, tl.where(live, peak / temperature + log_total, 0.0), mask=stored)
    tl.store(entropy_ptr + row, tl.where(live, log_total - mean, 0.0), mask=stored)
    tl.store(peak_ptr + row, tl.where(live, peak, 0.0), mask=stored)
    tl.store(log_total_ptr + row, tl.where(live, log_total, 0.0), mask=stored)
    if REF:
        ref_log_total = _log_total(mr, sr)
        ref_peak = tl.where(sr == sr, mr, sr)
        kl = d / s * inverse - (log_total - ref_log_total)
        ref_logprob = _taken(ref_ptr, ref_offset, action, valid, ref_peak, ref_log_total, inverse, softcap, CAP)
        tl.store(ref_logprobs_ptr + row, tl.where(live, ref_logprob, 0.0), mask=stored)
        tl.store(ref_lse_ptr + row, tl.where(live, ref_peak / temperature + ref_log_total, 0.0), mask=stored)
        tl.store(kl_ptr + row, tl.where(live, kl, 0.0), mask=stored)
        tl.store(ref_peak_ptr + row, tl.where(live, ref_peak, 0.0), mask=stored)
        tl.store(ref_log_total_ptr + row, tl.where(live, ref_log_total, 0.0), mask=stored)


@triton.jit(do_not_specialize=["rows", "splits", "inner"])
def token_stats_forward(
    z_ptr, action_ptr, ref_ptr, mask_ptr, temperature_ptr, temperature, softcap,
    rows, vocab, splits, inner, z_outer, z_inner, ref_outer, ref_inner,
    partial_ptr,
    logprobs_ptr, lse_ptr, entropy_ptr, peak_ptr, log_total_ptr,
    ref_logprobs_ptr, ref_lse_ptr, kl_ptr, ref_peak_ptr, ref_log_total_ptr,
    CAP: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One split of one row. With partial_ptr it leaves its sums there, without it the row is finished."""
    REF: tl.constexpr = ref_ptr is not None
    row = tl.program_id(0) // splits  # divided in 32 bits (grids are smaller than 2^31), multiplied in 64
    split = tl.program_id(0) % splits
    live = row >= 0
    if mask_ptr is not None:
        live = tl.load(mask_ptr + row) != 0
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
    inverse = tl.div_rn(1.0, temperature)
    scale = inverse * _LOG2E
    z_offset = _row_offset(row, inner, z_outer, z_inner)
    ref_offset = z_offset
    if REF:
        ref_offset = _row_offset(row, inner, ref_outer, ref_inner)

    m = tl.full((), float("-inf"), tl.float32)
    mr = tl.full((), float("-inf"), tl.float32)
    s = tl.full((), 0.0, tl.float32)
    u = tl.full((), 0.0, tl.float32)
    sr = tl.full((), 0.0, tl.float32)
    d = tl.full((), 0.0, tl.float32)
    first = split * SPLIT
    last = tl.minimum(first + SPLIT, vocab)
    last = tl.where(live, last, first)  # a masked row is not read
    for start in range(first, last, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < last
        z = tl.load(z_ptr + z_offset + columns, mask=inside, other=float("-inf")).to(tl.float32)
        z, _ = _capped(z, softcap, CAP)
        if CAP:  # the softcap of the filling is finite
            z = tl.where(inside, z, float("-inf"))
        top = tl.maximum(m, tl.max(z, 0))
        x = z - _finite(top)
        e = tl.exp2(x * scale)
        impossible = e == 0.0
        shift = _moved(m, top)
        r = tl.exp2(shift * scale)
        if REF:
            zr = tl.load(ref_ptr + ref_offset + columns, mask=inside, other=float("-inf")).to(tl.float32)
            zr, _ = _capped(zr, softcap, CAP)
            if CAP:
                zr = tl.where(inside, zr, float("-inf"))
            ref_top = tl.maximum(mr, tl.max(zr, 0))
            xr = zr - _finite(ref_top)
            ref_shift = _moved(mr, ref_top)
            d = _rescaled(d, shift - ref_shift, s, r) + tl.sum(e * tl.where(impossible, 0.0, x - xr), 0)
            sr = sr * tl.exp2(ref_shift * scale) + tl.sum(tl.exp2(xr * scale), 0)
            mr = ref_top
        u = _rescaled(u, shift, s, r) + tl.sum(e * tl.where(impossible, 0.0, x), 0)
        s = s * r + tl.sum(e, 0)
        m = top

    if partial_ptr is not None:
        place = partial_ptr + tl.program_id(0).to(
            tl.int64
        )  # field-major: field k of this program is k * rows * splits further
        stride = rows.to(tl.int64) * splits
        tl.store(place, m, mask=live)
        tl.store(place + stride, s, mask=live)
        tl.store(place + 2 * stride, u, mask=live)
        if REF:
            tl.store(place + 3 * stride, mr, mask=live)
            tl.store(place + 4 * stride, sr, mask=live)
            tl.store(place + 5 * stride, d, mask=live)
    else:
        _store_fields(
            row, row >= 0, live,
            z_ptr, z_offset, ref_ptr, ref_offset, action_ptr, vocab, temperature, inverse, softcap,
            m, s, u, mr, sr, d,
            logprobs_ptr, lse_ptr, entropy_ptr, peak_ptr, log_total_ptr,
            ref_logprobs_ptr, ref_lse_ptr, kl_ptr, ref_peak_ptr, ref_log_total_ptr,
            REF, CAP,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "splits", "inner"])
def token_stats_merge(
    z_ptr, action_ptr, ref_ptr, mask_ptr, temperature_ptr, temperature, softcap,
    rows, vocab, splits, inner, z_outer, z_inner, ref_outer, ref_inner,
    partial_ptr,
    logprobs_ptr, lse_ptr, entropy_ptr, peak_ptr, log_total_ptr,
    ref_logprobs_ptr, ref_lse_ptr, kl_ptr, ref_peak_ptr, ref_log_total_ptr,
    CAP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Finishes ROWS rows from the sums of their splits, merged in order."""
    REF: tl.constexpr = ref_ptr is not None
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    stored = row < rows
    live = stored
    if mask_ptr is not None:
        live = tl.load(mask_ptr + row, mask=stored, other=0) != 0
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row, mask=stored, other=1.0)
    inverse = tl.div_rn(1.0, temperature)
    scale = inverse * _LOG2E

    m = tl.full((ROWS,), float("-inf"), tl.float32)
    mr = tl.full((ROWS,), float("-inf"), tl.float32)
    s = tl.full((ROWS,), 0.0, tl.float32)
    u = tl.full((ROWS,), 0.0, tl.float32)
    sr = tl.full((ROWS,), 0.0, tl.float32)
    d = tl.full((ROWS,), 0.0, tl.float32)
    stride = rows.to(tl.int64) * splits
    for split in range(splits):
        place = partial_ptr + row.to(tl.int64) * splits + split
        m_k = tl.load(place, mask=live, other=float("-inf"))
        s_k = tl.load(place + stride, mask=live, other=0.0)
        u_k = tl.load(place + 2 * stride, mask=live, other=0.0)
        top = tl.maximum(m, m_k)
        shift, shift_k = _moved(m, top), _moved(m_k, top)
        r, r_k = tl.exp2(shift * scale), tl.exp2(shift_k * scale)
        if REF:
            mr_k = tl.load(place + 3 * stride, mask=live, other=float("-inf"))
            sr_k = tl.load(place + 4 * stride, mask=live, other=0.0)
            d_k = tl.load(place + 5 * stride, mask=live, other=0.0)
            ref_top = tl.maximum(mr, mr_k)
            ref_shift, ref_shift_k = _moved(mr, ref_top), _moved(mr_k, ref_top)
            d = _rescaled(d, shift - ref_shift, s, r) + _rescaled(d_k, shift_k - ref_shift_k, s_k, r_k)
            sr = sr * tl.exp2(ref_shift * scale) + sr_k * tl.exp2(ref_shift_k * scale)
            mr = ref_top
        u = _rescaled(u, shift, s, r) + _rescaled(u_k, shift_k, s_k, r_k)
        s = s * r + s_k * r_k
        m = top

    z_offset = _row_offset(row, inner, z_outer, z_inner)
    ref_offset = z_offset
    if REF:
        ref_offset = _row_offset(row, inner, ref_outer, ref_inner)
    _store_fields(
        row, stored, live,
        z_ptr, z_offset, ref_ptr, ref_offset, action_ptr, vocab, temperature, inverse, softcap,
        m, s, u, mr, sr, d,
        logprobs_ptr, lse_ptr, entropy_ptr, peak_ptr, log_total_ptr,
        ref_logprobs_ptr, ref_lse_ptr, kl_ptr, ref_peak_ptr, ref_log_total_ptr,
        REF, CAP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles", "inner"])
def token_stats_backward(
    z_ptr, action_ptr, ref_ptr, mask_ptr, temperature_ptr, temperature, softcap,
    vocab, tiles, inner, z_outer, z_inner, ref_outer, ref_inner,
    peak_ptr, log_total_ptr, ref_peak_ptr, ref_log_total_ptr, entropy_ptr, kl_ptr,
    c_logprobs_ptr, c_lse_ptr, c_entropy_ptr, c_kl_ptr, grad_ptr,
    CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of one row. A coefficient that is None is 0 and costs nothing; ref_ptr is given with c_kl_ptr only."""
    row = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK
    columns = first + tl.arange(0, BLOCK)
    inside = columns < vocab
    read = inside
    if mask_ptr is not None:
        read = columns < tl.where(tl.load(mask_ptr + row) != 0, vocab, 0)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
    inverse = tl.div_rn(1.0, temperature)

    z_offset = _row_offset(row, inner, z_outer, z_inner)
    z, slope = _capped(tl.load(z_ptr + z_offset + columns, mask=read, other=0.0).to(tl.float32), softcap, CAP)
    log_total = tl.load(log_total_ptr + row)
    x = z - tl.load(peak_ptr + row)
    e = tl.exp2(x * (inverse * _LOG2E))
    # p/T = e * total: every coefficient is multiplied by it, no entry is.
    total = tl.exp2(-log_total * _LOG2E) * inverse
    constant = tl.full((), 0.0, tl.float32)  # A
    if c_lse_ptr is not None:
        constant += tl.load(c_lse_ptr + row)
    if c_logprobs_ptr is not None:
        c_logprobs = tl.load(c_logprobs_ptr + row)
        constant -= c_logprobs
    if c_entropy_ptr is not None:
        c_entropy = tl.load(c_entropy_ptr + row)
        constant -= c_entropy * tl.load(entropy_ptr + row)
    factor = constant * total
    # Where p is 0 its logarithms are no matter, however infinite.
    if c_kl_ptr is not None:
        c_kl = tl.load(c_kl_ptr + row)
        ref_offset = _row_offset(row, inner, ref_outer, ref_inner)
        zr, _ = _capped(tl.load(ref_ptr + ref_offset + columns, mask=read, other=0.0).to(tl.float32), softcap, CAP)
        gap = log_total - tl.load(ref_log_total_ptr + row)
        # Rounded as in the forward, so that log(p/p_ref) - KL is exactly 0 where one entry has all of p.
        log_ratio = (x - (zr - tl.load(ref_peak_ptr + row))) * inverse - gap
        # Entries of at most this have no part: an infinite KL that nobody differentiates is no reason for a NaN.
        most = tl.where(c_kl == 0.0, float("inf"), 0.0)
        factor = tl.fma(c_kl * total, tl.where(e <= most, 0.0, log_ratio - tl.load(kl_ptr + row)), factor)
    if c_entropy_ptr is not None:
        factor = tl.fma(-c_entropy * total, tl.where(e == 0.0, 0.0, tl.fma(x, inverse, -log_total)), factor)
    grad = e * factor
    if c_logprobs_ptr is not None:
        action = tl.load(action_ptr + row)
        valid = (action >= 0) & (action < vocab)
        if (valid & (action // BLOCK != first // BLOCK)) == 0:  # one tile in a row looks at every column
            grad += tl.where(columns == tl.where(valid, action, -1).to(tl.int32), c_logprobs * inverse, 0.0)
            grad += tl.where(valid, 0.0, float("nan"))
    if CAP:
        grad = grad * slope
    if mask_ptr is not None:
        grad = tl.where(read, grad, 0.0)
    tl.store(grad_ptr + row.to(tl.int64) * vocab + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)
