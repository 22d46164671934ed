"""What the linear operations are made of in the native backends: GEMMs into a workspace, and row kernels that work there.

    z = hidden @ weight^T + bias            GEMM 1 into the workspace (GEMM 1' of the reference policy into a second one)
    statistics of the rows of z             one read
    the caller's coefficients of them       (n,) tensors
    z <- d loss / d z                       one read and one write, in place
    dX = dz @ weight,  dW += dz^T @ hidden  GEMMs 2 and 3, each only where somebody wants its result

As many rows as fit the workspace go through these steps at once: three GEMMs, four with the exact KL. What does not fit is
projected a second time for its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqo_kernels import library
from dqo_kernels.packed import compute_dtype

WORKSPACE_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}


def workspace_rows(
    workspace_bytes: int | None, vocab: int, device: torch.device, itemsize: int, models: int = 1
) -> int:
    """How many rows of V logits of so many models fit the workspace; one at the least."""
    budget = workspace_bytes or WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cpu"])
    return max(1, budget // (models * vocab * itemsize))


def _no_autocast(device: torch.device):
    """A caller's autocast would round the logits to bfloat16."""
    return torch.autocast(device.type, enabled=False)


class Head:
    """hidden (N, D), weight (V, D) and bias (V,) or None, in the dtype of their GEMM."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.hidden, self.weight = hidden.detach().to(dtype), weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def logits(self, first: int, last: int, out: Tensor) -> Tensor:
        """(last - first, V) written into the workspace `out`."""
        rows, out = self.hidden[first:last], out[: last - first]
        with _no_autocast(rows.device):
            if self.bias is None:
                return torch.mm(rows, self.weight.t(), out=out)
            return torch.addmm(self.bias, rows, self.weight.t(), out=out)


class Gradients:
    """dX (N, D), dW (V, D) and db (V,), each only if wanted, in the dtype of the GEMMs: sums over workspaces are not rounded."""

    def __init__(self, head: Head, hidden: bool, weight: bool, bias: bool):
        self.head = head
        self.hidden = torch.zeros_like(head.hidden) if hidden else None  # zero where a loss does not look
        self.weight = torch.zeros_like(head.weight) if weight else None
        self.bias = torch.zeros_like(head.bias) if bias else None

    def add(self, first: int, last: int, dz: Tensor) -> None:
        """The rows' share, from the gradient of their logits (last - first, V)."""
        with _no_autocast(dz.device):
            if self.hidden is not None:
                torch.mm(dz, self.head.weight, out=self.hidden[first:last])
            if self.weight is not None:
                self.weight.addmm_(dz.t(), self.head.hidden[first:last])
            if self.bias is not None:
                self.bias += dz.sum(0)

    def of(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
        """In the dtypes of the tensors they belong to."""
        pairs = ((self.hidden, hidden), (self.weight, weight), (self.bias, bias))
        return [None if gradient is None else gradient.to(x.dtype) for gradient, x in pairs]


class Engine:
    """Statistics and gradients of rows of one call, a workspace at a time."""

    def __init__(
        self, backend, hidden, weight, actions, bias, ref_hidden, ref_weight, ref_bias, temperature, softcap, workspace_bytes
    ):  # fmt: skip
        # Half-precision models are projected in float32: logits rounded to bfloat16 put log-probabilities off by hundredths.
        dtype = compute_dtype(hidden, weight, ref_hidden, ref_weight)
        self.backend, self.head = backend, Head(hidden, weight, bias, dtype)
        self.ref = None if ref_hidden is None else Head(ref_hidden, ref_weight, ref_bias, dtype)
        self.actions = actions.contiguous()
        self.temperatures, self.temperature = None, temperature
        if isinstance(temperature, Tensor):
            temperatures = temperature.detach().to(compute_dtype(self.head.weight))
            self.temperatures, self.temperature = temperatures.expand(actions.shape).contiguous(), 1.0
        self.softcap = float(softcap or 0.0)
        vocab, models = weight.shape[0], 1 if ref_hidden is None else 2
        rows = workspace_rows(workspace_bytes, vocab, hidden.device, dtype.itemsize, models)
        self.rows = min(rows, max(len(actions), 1))
        self.workspaces = [self.head.weight.new_empty(self.rows, vocab) for _ in range(models)]

    def chunks(self, first: int, last: int) -> list[tuple[int, int]]:
        return [(at, min(at + self.rows, last)) for at in range(first, max(last, first + 1), self.rows)]

    def _inputs(self, first: int, last: int) -> tuple:
        z = self.head.logits(first, last, self.workspaces[0])
        z_ref = None if self.ref is None else self.ref.logits(first, last, self.workspaces[1])
        temperatures = None if self.temperatures is None else self.temperatures[first:last]
        return z, self.actions[first:last], z_ref, None, temperatures, float(self.temperature), self.softcap

    def statistics(self, first: int, last: int) -> tuple[list[Tensor], tuple | None]:
        """The row kernel's fields of rows [first, last), and its inputs if they are still in the workspace."""
        parts, kept = [], None
        for chunk in self.chunks(first, last):
            kept = self._inputs(*chunk)
            parts.append(library.run("token_stats", "fwd", self.backend, *kept))
        if len(parts) == 1:
            return list(parts[0]), kept
        return [torch.cat(field) for field in zip(*parts)], None

    def differentiate(
        self,
        first: int,
        last: int,
        fields: list[Tensor],
        kept: tuple | None,
        coefficients: list[Tensor | None],  # of logprobs, lse, entropy, kl: (last - first,) or None
        gradients: Gradients,
    ) -> None:
        """Adds the gradient of sum(coefficient * statistic) over rows [first, last)."""
        if all(c is None for c in coefficients):
            return
        _, _, entropy, peak, log_total, _, _, kl, ref_peak, ref_log_total = fields
        for begin, end in [(first, last)] if kept is not None else self.chunks(first, last):
            z, actions, z_ref, *rest = kept if kept is not None else self._inputs(begin, end)
            own = slice(begin - first, end - first)
            c = [None if x is None else x[own].contiguous() for x in coefficients]
            saved = [x[own] for x in (peak, log_total, ref_peak, ref_log_total, entropy, kl)]
            z_ref = None if c[3] is None else z_ref
            dz = library.run("token_stats", "bwd", self.backend, z, actions, z_ref, *rest, *saved, *c, out=z)
            gradients.add(begin, end, dz)
