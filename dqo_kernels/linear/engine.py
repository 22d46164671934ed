"""What the linear operations are made of in the native backends: GEMMs into a workspace, and row kernels that work there.

    z = hidden @ weight^T + ...         GEMM 1 into the workspace (GEMM 1' of the reference policy into a second one)
    statistics of the rows of z         one read
    the caller's coefficients of them   (n,) tensors
    dz = d loss / d z                   one read and one write, in place; beside z where bfloat16 is multiplied (gemm.py)
    dX = dz @ weight,  dW += dz^T @ hidden      GEMMs 2 and 3, each only where somebody wants its result

As many rows as fit the workspace go through these steps at once: three GEMMs, four with the exact KL. If not all rows fit,
the backward projects rows again, except those that the workspace still holds.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import Tensor

from dqo_kernels.core import checks, library
from dqo_kernels.core.row_stats import Coefficients, RowStats, SavedStats, joined, mapped
from dqo_kernels.linear.gemm import Products, gradient_dtype
from dqo_kernels.linear.inputs import Differentiable, Linear, no_autocast


class Head:
    """Projects hidden states to logits."""

    def __init__(
        self,
        products: Products,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None = None,
        lora_b: Tensor | None = None,
    ):
        self.products, self.hidden, self.weight = products, hidden.detach(), weight.detach()
        self.bias, self.low, self.lora_b = (None if x is None else x.detach() for x in (bias, low, lora_b))

    def logits(self, first: int, last: int, out: Tensor) -> Tensor:
        """(last - first, V) written into the workspace `out`."""
        out = out[: last - first]
        with no_autocast(out.device):
            self.products.project(self.hidden[first:last], self.weight, out)
            if self.low is not None and self.lora_b is not None:
                self.products.add_projection(self.low[first:last], self.lora_b, out)
            return out if self.bias is None else out.add_(self.bias)


class Gradients:
    """The gradients of a Differentiable that are wanted. A sum over several workspaces has the dtype of the logits."""

    def __init__(self, head: Head, wanted: tuple[bool, ...], dz_dtype: torch.dtype, sum_dtype: torch.dtype):
        def zeros(x, want, dtype):
            return torch.zeros(x.shape, dtype=dtype, device=x.device) if want else None

        def room(x, want):  # written by the first rows, added to by the others
            return torch.empty(x.shape, dtype=sum_dtype, device=x.device) if want else None

        hidden, weight, bias, low, lora_b = wanted
        self.head, self.untouched = head, True
        self.hidden = zeros(head.hidden, hidden, dz_dtype)  # zero where a loss does not look
        self.low = zeros(head.low, low, dz_dtype)
        self.weight, self.lora_b = room(head.weight, weight), room(head.lora_b, lora_b)
        self.bias = zeros(head.bias, bias, torch.promote_types(sum_dtype, torch.float32))

    def add(self, first: int, last: int, dz: Tensor) -> None:
        """The rows' share, from the gradient of their logits (last - first, V)."""
        head, products, untouched = self.head, self.head.products, self.untouched
        self.untouched = False
        with no_autocast(dz.device):
            if self.hidden is not None:
                products.back(dz, head.weight, self.hidden[first:last])
            if self.low is not None and head.lora_b is not None:
                products.back(dz, head.lora_b, self.low[first:last])
            if self.weight is not None:
                products.accumulate(dz, head.hidden[first:last], self.weight, untouched)
            if self.lora_b is not None and head.low is not None:
                products.accumulate(dz, head.low[first:last], self.lora_b, untouched)
            if self.bias is not None:
                self.bias += dz.sum(0, dtype=self.bias.dtype)

    def of(self, inputs: Differentiable, scaled_later: bool = False) -> list[Tensor | None]:
        """The gradients, cast to the dtypes of their tensors. What is `scaled_later` is not yet cast to float16, whose range is
        small."""
        if self.untouched:
            for x in (self.weight, self.lora_b):
                if x is not None:
                    x.zero_()
        made = (self.hidden, self.weight, self.bias, self.low, self.lora_b)

        def cast(x: Tensor | None, owner: Tensor | None) -> Tensor | None:
            if x is None or owner is None or (scaled_later and owner.dtype == torch.float16):
                return x
            return x.to(owner.dtype)

        return [cast(x, owner) for x, owner in zip(made, inputs)]


class Kept(NamedTuple):
    """What the workspace still holds."""

    first: int  # of rows [first, last)
    last: int
    inputs: tuple  # of the row kernel


class Engine:
    """Statistics and gradients of rows of one call, a workspace at a time."""

    def __init__(self, backend: str, call: Linear, inputs: Differentiable):
        self.backend, self.slices = backend, call.slices
        self.wanted, dtype = inputs.wanted(), call.dtype
        products = Products()
        self.head, self.ref = Head(products, *inputs), None
        if call.ref_hidden is not None and call.ref_weight is not None:
            self.ref = Head(products, call.ref_hidden, call.ref_weight, call.ref_bias)
        self.actions, self.here = checks.owned_index(call.actions), None
        if self.slices is not None:
            self.here, self.actions = self.slices.local(self.actions)
        self.temperatures, self.temperature = None, call.temperature
        if isinstance(call.temperature, Tensor):
            self.temperatures = call.temperature.detach().to(dtype, copy=True).expand(self.actions.shape).contiguous()
            self.temperature = 1.0
        self.softcap = float(call.softcap or 0.0)
        self.models = 1 if self.ref is None else 2
        self.dtype, self.dz_dtype = dtype, gradient_dtype(call.hidden, call.weight, dtype)
        beside = self.dz_dtype.itemsize if any(self.wanted) and self.dz_dtype != dtype else 0
        rows = call.rows_in_workspace(self.models * dtype.itemsize + beside)
        self.rows = min(rows, max(len(self.actions), 1))
        vocab, device = len(call.weight), call.hidden.device

        self.shape, self.device, self.beside = (self.rows, vocab), device, beside > 0
        self.workspaces: list[Tensor] = []  # of each model, and of dz if it is beside them

    def constants(self) -> list[Tensor]:
        """The caller's tensors that are read again in the backward and get no gradient."""
        ref = () if self.ref is None else (self.ref.hidden, self.ref.weight, self.ref.bias)
        return [x for x in ref if x is not None]

    def release(self) -> None:
        """Gives the workspaces back; whatever comes next allocates others."""
        self.workspaces = []

    def gradients(self) -> Gradients:
        once = self.rows >= len(self.actions)  # a sum of one term is rounded once
        return Gradients(self.head, self.wanted, self.dz_dtype, self.dz_dtype if once else self.dtype)

    def chunks(self, first: int, last: int) -> list[tuple[int, int]]:
        """Ranges of rows that fit the workspace at once. The first may be shorter. The last is full: the workspace keeps it, and
        what is kept need not be projected again."""
        ends = list(range(last, first, -self.rows))[::-1] or [last]
        return list(zip([first, *ends], ends))

    def _inputs(self, first: int, last: int) -> tuple:
        if not self.workspaces:
            dtypes = [self.dtype] * self.models + [self.dz_dtype] * self.beside
            self.workspaces = [torch.empty(self.shape, dtype=dtype, device=self.device) for dtype in dtypes]
        z = self.head.logits(first, last, self.workspaces[0])
        z_ref = None if self.ref is None else self.ref.logits(first, last, self.workspaces[1])
        temperatures = None if self.temperatures is None else self.temperatures[first:last]
        return z, self.actions[first:last], z_ref, None, temperatures, float(self.temperature), self.softcap

    def statistics(self, first: int, last: int) -> tuple[RowStats, Kept]:
        """The statistics of rows [first, last), and what the workspace holds of these rows."""
        parts = []
        for begin, end in self.chunks(first, last):
            inputs = self._inputs(begin, end)
            stats = library.run("token_stats", "fwd", self.backend, *inputs)
            if self.slices is not None and self.here is not None:
                temperature = self.temperature if self.temperatures is None else self.temperatures[begin:end]
                stats = self.slices.merged(stats, self.here[begin:end], temperature)
            parts.append(stats)
        return joined(parts), Kept(begin, end, inputs)

    def differentiate(
        self,
        first: int,
        last: int,
        saved: SavedStats,
        kept: Kept | None,  # overwritten; None projects everything again
        coefficients: Coefficients,  # (last - first,) each
        gradients: Gradients,
    ) -> None:
        """Adds the gradient of sum(coefficient * statistic) over rows [first, last)."""
        if coefficients.are_absent():
            return
        if self.slices is not None and self.here is not None:
            held = slice(first, last)
            coefficients = self.slices.coefficients(self.here[held], self.actions[held], coefficients)
        for begin, end in reversed(self.chunks(first, last)):
            if kept is not None and (kept.first, kept.last) == (begin, end):
                z, actions, z_ref, *rest = kept.inputs
            else:
                z, actions, z_ref, *rest = self._inputs(begin, end)
            z_ref = None if coefficients.kl is None else z_ref
            out = self.workspaces[-1][: end - begin] if self.beside else z
            rows = slice(begin - first, end - first)
            stats = mapped(operator.itemgetter(rows), saved)
            arriving = mapped(Tensor.contiguous, mapped(operator.itemgetter(rows), coefficients))
            dz = library.run("token_stats", "bwd", self.backend, z, actions, z_ref, *rest, *stats, *arriving, out=out)
            gradients.add(begin, end, dz)
