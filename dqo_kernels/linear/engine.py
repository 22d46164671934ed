"""What the linear operations are made of in the native backends: GEMMs into a workspace, and row kernels that work there.

    z = hidden @ weight^T + ...         GEMM 1 into the workspace (GEMM 1' of the reference policy into a second one)
    statistics of the rows of z         one read
    the caller's coefficients of them   (n,) tensors
    dz = d loss / d z                   one read and one write, in place; beside z where bfloat16 is multiplied (gemm.py)
    dX = dz @ weight,  dW += dz^T @ hidden      GEMMs 2 and 3, each only where somebody wants its result

As many rows as fit the workspace go through these steps at once: three GEMMs, four with the exact KL. What does not fit is
projected a second time for its gradient, all but the last workspace of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqo_kernels.core import checks, library
from dqo_kernels.linear.gemm import Products, gradient_dtype
from dqo_kernels.linear.inputs import Differentiable, Linear, no_autocast


class Head:
    """Projects hidden states to logits."""

    def __init__(self, products: Products, hidden: Tensor, weight: Tensor, bias: Tensor | None, low=None, lora_b=None):
        self.products = products
        parts = (hidden, weight, bias, low, lora_b)
        self.hidden, self.weight, self.bias, self.low, self.lora_b = (None if x is None else x.detach() for x in parts)

    def logits(self, first: int, last: int, out: Tensor) -> Tensor:
        """(last - first, V) written into the workspace `out`."""
        out = out[: last - first]
        with no_autocast(out.device):
            self.products.project(self.hidden[first:last], self.weight, out)
            if self.low is not None:
                self.products.add_projection(self.low[first:last], self.lora_b, out)
            return out if self.bias is None else out.add_(self.bias)


class Gradients:
    """Those of a Differentiable, each only if wanted. Sums over several workspaces are kept in the dtype of the logits."""

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
            if self.low is not None:
                products.back(dz, head.lora_b, self.low[first:last])
            if self.weight is not None:
                products.accumulate(dz, head.hidden[first:last], self.weight, untouched)
            if self.lora_b is not None:
                products.accumulate(dz, head.low[first:last], self.lora_b, untouched)
            if self.bias is not None:
                self.bias += dz.sum(0, dtype=self.bias.dtype)

    def of(self, inputs: Differentiable, scaled_later: bool = False) -> list[Tensor | None]:
        """In the dtypes of the tensors they belong to; not yet in float16, whose range is small, if they are `scaled_later`."""
        if self.untouched:
            for x in (self.weight, self.lora_b):
                if x is not None:
                    x.zero_()
        made = (self.hidden, self.weight, self.bias, self.low, self.lora_b)
        pairs = zip(made, inputs.tensors())
        return [x if x is None or (scaled_later and of.dtype == torch.float16) else x.to(of.dtype) for x, of in pairs]


Kept = tuple[int, int, tuple]  # rows [begin, end) and their row kernel's inputs, which the workspace still holds


class Engine:
    """Statistics and gradients of rows of one call, a workspace at a time."""

    def __init__(self, backend: str, call: Linear, inputs: Differentiable):
        self.backend, self.slices = backend, call.slices
        self.wanted, dtype = inputs.wanted(), call.dtype
        products = Products()
        self.head, self.ref = Head(products, *inputs.tensors()), None
        if call.ref_hidden is not None:
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
        """What fits the workspace at once; the last is full, because it is the one that is kept."""
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

    def statistics(self, first: int, last: int) -> tuple[list[Tensor], Kept]:
        """The row kernel's fields of rows [first, last), and what of them is still in the workspace."""
        parts = []
        for begin, end in self.chunks(first, last):
            inputs = self._inputs(begin, end)
            fields = library.run("token_stats", "fwd", self.backend, *inputs)
            if self.slices is not None:
                temperature = self.temperature if self.temperatures is None else self.temperatures[begin:end]
                fields = self.slices.merged(fields, self.here[begin:end], temperature)
            parts.append(fields)
        fields = parts[0] if len(parts) == 1 else [torch.cat(field) for field in zip(*parts)]
        return list(fields), (begin, end, inputs)

    def differentiate(
        self,
        first: int,
        last: int,
        fields: list[Tensor],
        kept: Kept | None,  # overwritten; None projects everything again
        coefficients: list[Tensor | None],  # of logprobs, lse, entropy, kl: (last - first,) or None
        gradients: Gradients,
    ) -> None:
        """Adds the gradient of sum(coefficient * statistic) over rows [first, last)."""
        if all(c is None for c in coefficients):
            return
        if self.slices is not None:
            own = slice(first, last)
            coefficients = self.slices.coefficients(self.here[own], self.actions[own], coefficients)
        _, _, entropy, peak, log_total, _, _, kl, ref_peak, ref_log_total = fields
        for begin, end in reversed(self.chunks(first, last)):
            held = kept is not None and kept[:2] == (begin, end)
            z, actions, z_ref, *rest = kept[2] if held else self._inputs(begin, end)
            own = slice(begin - first, end - first)
            c = [None if x is None else x[own].contiguous() for x in coefficients]
            saved = [x[own] for x in (peak, log_total, ref_peak, ref_log_total, entropy, kl)]
            z_ref = None if c[3] is None else z_ref
            out = self.workspaces[-1][: end - begin] if self.beside else z
            dz = library.run("token_stats", "bwd", self.backend, z, actions, z_ref, *rest, *saved, *c, out=out)
            gradients.add(begin, end, dz)
