"""The two layouts of the public losses: packed (N, ...) with cu_seqlens, or padded (B, T, ...) with a bool mask.

A padded call is an adapter: rows where the mask is False are selected away (so they may hold NaN), the others are packed.
A hole in the mask (a tool's tokens) thus passes return, value and discount through unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqo_kernels import checks


class Layout:
    """Moves tensors of the caller's layout to packed rows and back.

    Attributes: `shape`, that of `actions`; `cu_seqlens` (B+1,); `rows`, N.
    """

    def __init__(self, features: Tensor, name: str, mask: Tensor | None, cu_seqlens: Tensor | None):
        """`features`, called `name`, is (N, X) with cu_seqlens or (B, T, X) with mask; anything else is refused."""
        checks.floating(name, features)
        shape = tuple(features.shape)
        if features.dim() == 2:
            if mask is not None:
                checks.fail("mask", f"None for packed {name} {shape}; drop the rows instead", "a tensor")
            if cu_seqlens is None:
                checks.fail("cu_seqlens", f"boundaries (B+1,), because {name} is packed {shape}", "None")
            checks.cu_seqlens(cu_seqlens, shape[0], features)
            self.mask, self.cu_seqlens = None, cu_seqlens.long()
        elif features.dim() == 3:
            if cu_seqlens is not None:
                checks.fail("cu_seqlens", f"None for padded {name} {shape}", "a tensor")
            if mask is None:
                checks.fail("mask", f"a bool tensor {shape[:2]}, because {name} is padded {shape}", "None")
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape[:2]:
                got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                checks.fail("mask", f"torch.bool {shape[:2]}", got)
            if mask.device != features.device:
                checks.fail("mask", f"device {features.device}", f"device {mask.device}")
            self.mask = mask
            self.cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        else:
            checks.fail(name, "2 dimensions with cu_seqlens or 3 with mask", f"shape {shape}")
        self.shape = shape[:-1]
        self._everything = self.mask is None or bool(self.mask.all())

    @property
    def sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    def pack(self, x: Tensor | None) -> Tensor | None:
        """(N, ...) rows of x, which has the caller's layout."""
        if x is None or self.mask is None:
            return x
        return x.flatten(0, 1) if self._everything else x[self.mask]

    def unpack(self, rows: Tensor | None) -> Tensor | None:
        """Back to the caller's layout; 0 where the mask is False."""
        if rows is None or self.mask is None:
            return rows
        if self._everything:
            return rows.reshape(self.shape)
        return rows.new_zeros(self.shape).masked_scatter(self.mask, rows)
