"""Scans along a sequence shared by the Triton backends of lambda_return and soft_bellman.

The state is a pair (y, v) and a row maps it to  (decay*y + b*v + c, o);  a row that is masked out leaves it as it is. Such maps
compose: as the tuple (a, b, c, k, o) they are  y' = a*y + b*v + c,  v' = v if k else o,  and k = 1, o = 0 of the identity alone.

A tile of rows is scanned *exclusively*: element i is given the map of the row before it in scan order (the identity for the very
first), so that it receives the state it needs with no exchange afterwards, also when decay = 0. Scans that go backward in time
flip their indices: associative_scan(reverse=True) has given wrong results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# No contraction of multiplications into additions: Triton's default for it has changed between versions, and with it the bits.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
# Rows of a tile. The interpreter combines element by element, in Python and in order: there a tile is a matter of time only.
BLOCK = 64 if triton.knobs.runtime.interpret else 512


@triton.jit
def times(gain, x):
    """gain*x, and 0 for a gain of exactly 0: neither infinity nor NaN comes through it, however a tile is composed."""
    return tl.where(gain == 0.0, 0.0, gain * x)


@triton.jit
def _chain(a1, c1, a2, c2):
    return a1 * a2, times(a2, c1) + c2


@triton.jit
def linear_scan(gain, c, carry):
    """y_i = gain_i*y_{i-1} + c_i along the tile, y_{-1} = carry."""
    a, c = tl.associative_scan((gain, c), 0, _chain)
    return times(a, carry) + c


@triton.jit
def _compose(a1, b1, c1, k1, o1, a2, b2, c2, k2, o2):
    """First map 1, then map 2. The identity is (1, 0, 0, 1, 0)."""
    c = times(a2, c1) + times(b2, o1) + c2
    return a1 * a2, a2 * b1 + b2 * k1, c, k1 * k2, tl.where(k2 != 0.0, o1, o2)


@triton.jit
def pair_scan(valid, decay, b, c, o, y, v):
    """The states (y, v) after the maps of rows 0..i of the tile, from the state (y, v) before it."""
    nothing = tl.zeros_like(c)
    a = tl.where(valid, nothing + decay, 1.0)
    b = tl.where(valid, nothing + b, 0.0)
    k = tl.where(valid, nothing, 1.0)
    maps = (a, b, tl.where(valid, c, 0.0), k, tl.where(valid, o, 0.0))
    a, b, c, k, o = tl.associative_scan(maps, 0, _compose)
    return times(a, y) + times(b, v) + c, tl.where(k != 0.0, v, o)


@triton.jit
def last_of(x, BLOCK: tl.constexpr):
    """The last element of the tile."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, x, 0.0), 0)


def run(launch) -> None:
    """Runs (kernel, programs, arguments, options), one program per sequence."""
    kernel, programs, arguments, options = launch
    if programs:
        with torch.cuda.device_of(arguments["cu_seqlens_ptr"]):  # Triton launches on the current device
            kernel[(programs,)](**arguments, **options)
