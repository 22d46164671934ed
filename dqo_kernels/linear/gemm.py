"""The matrix products of the linear forms, in the dtypes that keep their accuracy:

    z = x @ w^T                       float32 (float64 from float64), whatever x and w are: logits rounded to bfloat16 put
                                      log-probabilities off by hundredths
    out = dz @ w,  sum += dz^T @ x    in the dtype of dz

dz has the dtype that `gradient_dtype` names. bfloat16, when x and w are and the device multiplies bfloat16 fast: sums run in
float32 inside the product, and what is rounded is dz, as in eager bfloat16; a float32 bias or lora_b gets no more digits than
that. Else float32, and a factor of another dtype is cast a block of rows of w at a time, so that no second w exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 4 * 2**20  # of a weight cast at a time, into memory that is used again: fresh memory costs page faults


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products have instructions of their own; emulated ones are slower than float32."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return True


def gradient_dtype(x: Tensor, w: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Of dz, where logits are computed in `dtype`."""
    halves = x.dtype == w.dtype == torch.bfloat16 and dtype == torch.float32
    return torch.bfloat16 if halves and fast_bfloat16(x.device) else dtype


class Products:
    """The products of one call; holds the blocks that it casts into."""

    def __init__(self):
        self.blocks: dict[torch.dtype, Tensor] = {}

    def _room(self, rows: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """(rows, D) of scratch memory, D that of `like`."""
        count = rows * like.shape[1]
        if dtype not in self.blocks or len(self.blocks[dtype]) < count:
            self.blocks[dtype] = torch.empty(count, dtype=dtype, device=like.device)
        return self.blocks[dtype][:count].view(rows, like.shape[1])

    def _cast(self, w: Tensor, dtype: torch.dtype):
        """(first, last, w[first:last] in dtype) for all of w: at once where nothing needs a cast."""
        if w.dtype == dtype:
            yield 0, len(w), w
            return
        rows = _block_rows(w, dtype)
        for first in range(0, len(w), rows):
            last = min(first + rows, len(w))
            yield first, last, self._room(last - first, w, dtype).copy_(w[first:last])

    def project(self, x: Tensor, w: Tensor, out: Tensor) -> Tensor:
        """out (n, V) = x (n, D) @ w (V, D)^T."""
        if (
            x.is_cuda
            and x.dtype == w.dtype
            and x.dtype in (torch.bfloat16, torch.float16)
            and out.dtype == torch.float32
        ):
            return torch.mm(x, w.t(), out_dtype=torch.float32, out=out)
        x = x.to(out.dtype)
        for first, last, block in self._cast(w, out.dtype):
            torch.mm(x, block.t(), out=out[:, first:last])
        return out

    def add_projection(self, x: Tensor, w: Tensor, out: Tensor) -> Tensor:
        """out (n, V) += x (n, R) @ w (V, R)^T, of a small R."""
        return out.addmm_(x.to(out.dtype), w.to(out.dtype).t())

    def back(self, dz: Tensor, w: Tensor, out: Tensor) -> None:
        """out (n, D) = dz (n, V) @ w (V, D), in the dtype of dz."""
        for first, last, block in self._cast(w, dz.dtype):
            if first == 0:
                torch.mm(dz[:, first:last], block, out=out)
            else:
                out.addmm_(dz[:, first:last], block)

    def accumulate(self, dz: Tensor, x: Tensor, out: Tensor, first: bool) -> None:
        """out (V, D) = dz (n, V)^T @ x (n, D), or += after the first time; `out` in the dtype of dz, or float32."""
        x = x.to(dz.dtype)
        if out.dtype == dz.dtype:
            torch.mm(dz.t(), x, out=out) if first else out.addmm_(dz.t(), x)
        elif dz.is_cuda:
            torch.addmm(out, dz.t(), x, out_dtype=out.dtype, beta=0 if first else 1, out=out)
        else:  # the CPU's products have the dtype of their factors: a block of V at a time is added up in float32
            rows = _block_rows(out, out.dtype)
            for begin in range(0, len(out), rows):
                total = out[begin : begin + rows]
                part = torch.mm(dz[:, begin : begin + rows].t(), x, out=self._room(len(total), out, dz.dtype))
                # add_ of another dtype would cast into fresh memory
                total.copy_(part) if first else total.add_(self._room(len(total), out, out.dtype).copy_(part))


def _block_rows(matrix: Tensor, dtype: torch.dtype) -> int:
    return max(64, BLOCK_BYTES // (dtype.itemsize * max(matrix.shape[1], 1)))
