"""The two layouts of the public losses: packed (N, ...) with cu_seqlens, or padded (B, T, ...) with a bool mask.

Inside there is one: N rows of B sequences with boundaries, and a mask (N,) of the rows that count. A padded call has
N = B*T rows; nothing is compacted, so nothing waits for the host. Rows that do not count are passed over by every operation:
they may hold NaN, and a hole in the mask (a tool's tokens) lets return, value and discount through unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqo_kernels.core import checks


class Layout:
    """Views tensors of the caller's layout as rows, and rows as the caller's layout.

    Attributes: `shape`, that of `actions`; `cu_seqlens` (B+1,) int64; `mask` (N,) bool, or None when every row counts.
    """

    mask: Tensor | None
    cu_seqlens: Tensor

    def __init__(self, features: Tensor, name: str, mask: Tensor | None, cu_seqlens: Tensor | None):
        """`features`, called `name`, is (N, X) with cu_seqlens or (B, T, X) with mask; anything else is refused."""
        checks.logits(name, features)
        shape = tuple(features.shape)
        if features.dim() == 2:
            if mask is not None:
                checks.fail("mask", f"None for packed {name} {shape}; drop the rows instead", "a tensor")
            if cu_seqlens is None:
                checks.fail("cu_seqlens", f"boundaries (B+1,), because {name} is packed {shape}", "None")
            checks.cu_seqlens(cu_seqlens, shape[0], features)
            self.mask, self.cu_seqlens = None, checks.owned_index(cu_seqlens)
        elif features.dim() == 3:
            if cu_seqlens is not None:
                checks.fail("cu_seqlens", f"None for padded {name} {shape}", "a tensor")
            if mask is None:
                checks.fail("mask", f"a bool tensor {shape[:2]}, because {name} is padded {shape}", "None")
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape[:2]:
                got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                checks.fail("mask", f"torch.bool {shape[:2]}", got)
            checks.whole("mask", mask)
            checks.same_device("mask", mask, features)
            self.mask = checks.owned(mask.reshape(-1), torch.bool)  # a reshaped slice of one row may keep its stride
            self.cu_seqlens = torch.arange(shape[0] + 1, device=mask.device) * shape[1]
        else:
            checks.fail(name, "2 dimensions with cu_seqlens or 3 with mask", f"shape {shape}")
        self.shape = shape[:-1]

    def rows(self, x: Tensor) -> Tensor:
        """(N, ...) rows of x, which has the caller's layout."""
        return x if self.mask is None else x.flatten(0, 1)

    def unrows(self, rows: Tensor) -> Tensor:
        """(N,) rows in the caller's layout."""
        return rows if self.mask is None else rows.reshape(self.shape)

    def counted(self, rows: Tensor) -> Tensor:
        """(N,) rows with 0 where they do not count; whatever arrives there in the backward goes no further."""
        return rows if self.mask is None else torch.where(self.mask, rows, 0)

    def count(self) -> Tensor | int:
        """How many rows count, 1 at least; on the device, unless the shapes tell."""
        return max(self.shape[0], 1) if self.mask is None else self.mask.sum().clamp(min=1)

    def selected(self, x: Tensor) -> Tensor:
        """(n, ...): only the rows of x that count; for what must not touch the others. Waits for the device."""
        return x if self.mask is None else self.rows(x)[self.mask]

    def selected_boundaries(self) -> Tensor:
        """(B+1,) boundaries of the selected rows."""
        if self.mask is None:
            return self.cu_seqlens
        return torch.nn.functional.pad(self.mask.view(self.shape).sum(1).cumsum(0), (1, 0))

    def scattered(self, rows: Tensor) -> Tensor:
        """(n,) selected rows back at their places among the N; 0 elsewhere."""
        if self.mask is None:
            return rows
        return rows.new_zeros(self.mask.shape).masked_scatter(self.mask, rows)
