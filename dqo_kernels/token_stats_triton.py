"""Triton backend of token_stats: launchers on plain tensors, no autograd, no checks (token_stats.py has both).

How many splits a row is cut into depends on V alone: one split is finished by its own program, more go through a workspace and
a second kernel, whatever N is. So a row's bits do not depend on its batch. Tile sizes and warps are tables, nothing is tuned
at run time.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dqo_kernels.core.row_stats import RowStats
from dqo_kernels.token_stats_triton_kernels import token_stats_backward, token_stats_forward, token_stats_merge

SPLIT = 32768  # columns of one forward program
# (columns, warps) of a tile. Of ten sizes these were within 4 % of the fastest on an H200 (docs/gpu.md). No target needs many
# registers for them.
TILES = {"one row": (2048, 2), "two rows": (2048, 2), "backward": (2048, 4)}
MERGE_WARPS = 4
MERGE_ROWS = 128
PARTIALS = 6  # m, s, u, m_r, s_r, d


def _tile(vocab: int, kind: str) -> tuple[int, dict]:
    """Columns of a tile and the options of its kernel. A short tile has fewer warps, of 16 elements a thread or more. No
    contraction: see token_stats_triton_kernels.py."""
    columns, warps = TILES[kind]
    block = min(columns, max(128, triton.next_power_of_2(vocab)))
    return block, {"num_warps": max(1, min(warps, block // 512)), "enable_fp_fusion": False}


def _layout(logits: Tensor, ref_logits: Tensor | None) -> tuple[int, dict]:
    """Rows, and the arguments that locate a row."""

    def strides(x):
        return (x.stride(0), x.stride(1)) if x.dim() == 3 else (0, x.stride(0))

    (outer, inner), (ref_outer, ref_inner) = strides(logits), strides(logits if ref_logits is None else ref_logits)
    rows = logits.shape[:-1].numel()
    place = {"inner": logits.shape[-2], "z_outer": outer, "z_inner": inner}
    return rows, place | {"ref_outer": ref_outer, "ref_inner": ref_inner}


def _inputs(logits, actions, ref_logits, mask, temperatures, temperature, softcap) -> dict:
    return {
        "z_ptr": logits, "action_ptr": actions, "ref_ptr": ref_logits, "mask_ptr": mask, "temperature_ptr": temperatures,
        "temperature": float(temperature), "softcap": float(softcap), "vocab": logits.shape[-1], "CAP": softcap != 0.0,
    }  # fmt: skip


def forward_launches(logits, actions, ref_logits, mask, temperatures, temperature, softcap):
    """The statistics, and the launches (kernel, grid, arguments, options) that fill them; also of tensors on "meta"."""
    rows, place = _layout(logits, ref_logits)
    vocab = logits.shape[-1]
    splits = triton.cdiv(vocab, SPLIT)
    stats = RowStats.empty(logits, rows, ref_logits is not None)
    partial = None
    if splits > 1:
        partial = torch.empty(PARTIALS * rows * splits, dtype=torch.float32, device=logits.device)
    common = _inputs(logits, actions, ref_logits, mask, temperatures, temperature, softcap) | place
    common |= {"rows": rows, "splits": splits, "partial_ptr": partial}
    outputs = {f"{name}_ptr": x for name, x in stats._asdict().items()}
    if ref_logits is None:
        outputs |= dict.fromkeys(name for name in outputs if name == "kl_ptr" or name.startswith("ref_"))
    block, options = _tile(vocab, "one row" if ref_logits is None else "two rows")
    tiles = {"SPLIT": SPLIT, "BLOCK": block}
    if splits == 1:
        return stats, [(token_stats_forward, rows, common | outputs | tiles, options)]
    nothing = dict.fromkeys(outputs)
    merge_options = {"num_warps": MERGE_WARPS, "enable_fp_fusion": False}
    return stats, [
        (token_stats_forward, rows * splits, common | nothing | tiles, options),
        (token_stats_merge, triton.cdiv(rows, MERGE_ROWS), common | outputs | {"ROWS": MERGE_ROWS}, merge_options),
    ]


def backward_launches(
    logits, actions, ref_logits, mask, temperatures, temperature, softcap,
    entropy, peak, log_total, kl, ref_peak, ref_log_total, c_logprobs, c_lse, c_entropy, c_kl, *, out=None,
):  # fmt: skip
    """The gradient, and the launches that fill it. `out` may be the logits: an entry is read before it is written. It may also be
    bfloat16 where they are float32."""
    dtype = logits.dtype if out is None else out.dtype
    truncates = triton.knobs.runtime.interpret and dtype == torch.bfloat16  # the interpreter: no rounding
    grad = out
    if out is None or truncates:
        grad = torch.empty(logits.shape, dtype=torch.float32 if truncates else dtype, device=logits.device)
    if c_kl is None:
        ref_logits = ref_peak = ref_log_total = kl = None
    rows, place = _layout(logits, ref_logits)
    vocab = logits.shape[-1]
    block, options = _tile(vocab, "backward")
    tiles = triton.cdiv(vocab, block)
    arguments = _inputs(logits, actions, ref_logits, mask, temperatures, temperature, softcap) | place
    arguments |= {
        "tiles": tiles, "peak_ptr": peak, "log_total_ptr": log_total, "ref_peak_ptr": ref_peak,
        "ref_log_total_ptr": ref_log_total, "entropy_ptr": None if c_entropy is None else entropy, "kl_ptr": kl,
        "c_logprobs_ptr": c_logprobs, "c_lse_ptr": c_lse, "c_entropy_ptr": c_entropy, "c_kl_ptr": c_kl,
        "grad_ptr": grad, "BLOCK": block,
    }  # fmt: skip
    return grad, [(token_stats_backward, rows * tiles, arguments, options)]


def _run(launches, device_of: Tensor) -> None:
    with torch.cuda.device_of(device_of):  # Triton launches on the current device
        for kernel, programs, arguments, options in launches:
            if programs:
                kernel[(programs,)](**arguments, **options)


def fwd(logits, actions, ref_logits, mask, temperatures, temperature, softcap) -> RowStats:
    """The statistics of every row."""
    stats, launches = forward_launches(logits, actions, ref_logits, mask, temperatures, temperature, softcap)
    _run(launches, logits)
    return stats


def bwd(logits, *arguments, out: Tensor | None = None) -> Tensor:
    """The gradient of logits, in their dtype or that of `out`; arguments as in backward_launches."""
    grad, launches = backward_launches(logits, *arguments, out=out)
    _run(launches, logits)
    if out is None:
        return grad.to(logits.dtype)
    return grad if grad is out else out.copy_(grad)


def specialisations(dtypes, vocabs, everything: bool):
    """The launches that calls with these dtypes and vocabularies make, for compiling them ahead of time.

    `everything` adds the rarer arguments: per-row temperatures with a mask, a softcap, and the gradient of one field alone.
    """
    rows = 16

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    coefficients = [(0,), (0, 1, 2, 3)]  # of logprobs, lse, entropy, kl: the policy's loss alone, and all
    variants = [(False, 0.0)]
    if everything:
        coefficients += [(1,), (2,), (0, 3)]
        variants += [(True, 0.0), (False, 30.0), (True, 30.0)]
    for dtype in dtypes:
        for vocab in vocabs:
            logits, row = meta(rows, vocab, dtype=dtype), meta(rows)
            actions, mask = meta(rows, dtype=torch.int64), meta(rows, dtype=torch.bool)
            for per_row, softcap in variants:
                tail = (mask, row, 1.0, softcap) if per_row else (None, None, 1.0, softcap)
                for ref_logits in (None, logits):
                    yield from forward_launches(logits, actions, ref_logits, *tail)[1]
                # The linear forms take a bfloat16 gradient of float32 logits.
                for out in (None, meta(rows, vocab, dtype=torch.bfloat16)) if dtype == torch.float32 else (None,):
                    for given in coefficients:
                        c = [row if i in given else None for i in range(4)]
                        yield from backward_launches(logits, actions, logits, *tail, *[row] * 6, *c, out=out)[1]
