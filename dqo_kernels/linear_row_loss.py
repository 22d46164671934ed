"""linear_row_loss: any loss of token statistics, from hidden states and the head, without the logits.

    stats = linear_token_stats(hidden, weight, actions, ...)
    loss_sum, metric_sums = row_loss(stats, rows, cu_seqlens)          summed over runs of whole groups

Backends: reference (statistics in recomputed chunks, then one call for each run of groups that fits the workspace); cpp and
triton (linear_engine.py: a run's gradient is made while its logits are still in the workspace).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dqo_kernels import checks, dispatch
from dqo_kernels.linear_engine import Engine, Gradients, workspace_rows
from dqo_kernels.linear_token_stats import check_linear, linear_token_stats_reference
from dqo_kernels.packed import compute_dtype
from dqo_kernels.token_stats import TokenStats

RowLoss = Callable[[TokenStats, dict[str, Tensor], Tensor], tuple[Tensor, dict[str, Tensor]]]
COUPLINGS = ("group", "batch")


def group_runs(cu_seqlens: list[int], cu_groups: list[int], max_rows: int) -> list[tuple[int, int]]:
    """Runs [first, last) of sequences: as many whole groups as fit `max_rows`, and at least one."""
    runs, first = [], 0
    for group_end, next_end in zip(cu_groups[1:], [*cu_groups[2:], None]):
        full = next_end is None or cu_seqlens[next_end] - cu_seqlens[first] > max_rows
        if full and group_end > first:
            runs.append((first, group_end))
            first = group_end
    return runs


Pieces = list[tuple[slice, Tensor]]  # the rows of each run of groups, and their boundaries


def _add(metrics: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, value in more.items():
        metrics[name] = metrics.get(name, 0) + value.detach()


def _of_statistics(stats: TokenStats, row_loss: RowLoss, rows: dict[str, Tensor], pieces: Pieces):
    total, metrics = stats.logprobs[:0].sum(), {}  # a zero that can be differentiated, also without any sequence
    for run, cu_seqlens in pieces:
        run_stats = TokenStats(*(None if field is None else field[run] for field in stats))
        loss_sum, metric_sums = row_loss(run_stats, {name: value[run] for name, value in rows.items()}, cu_seqlens)
        total = total + loss_sum
        _add(metrics, metric_sums)
    return total, metrics


class _Carried(torch.autograd.Function):
    """A loss whose gradients are there already; the backward scales them, on their device, by what arrives."""

    @staticmethod
    def forward(ctx, total, gradients, *inputs):
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        if ctx.gradients is None:
            raise RuntimeError("linear_row_loss: its gradients were handed over by the first backward; call it again")
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(None if g is None else g.mul_(scale) for g in gradients)


def _late_bound(engine: Engine, row_loss: RowLoss, rows: dict[str, Tensor], pieces: Pieces, tensors: tuple):
    """Each run's coefficients are known before its logits leave the workspace: its gradient is made at once, without a second
    projection. A run that does not fit the workspace is projected twice."""
    live = torch.is_grad_enabled()
    wants = [live and x is not None and x.requires_grad for x in tensors]
    gradients = Gradients(engine.head, *wants)
    row_gradients = {name: torch.zeros_like(x) for name, x in rows.items() if live and x.requires_grad}
    total, metrics = engine.head.weight.new_zeros((), dtype=compute_dtype(engine.head.weight)), {}
    for run, cu_seqlens in pieces:
        fields, kept = engine.statistics(run.start, run.stop)
        leaves = [fields[i].requires_grad_(any(wants)) for i in ((0, 1, 2) if engine.ref is None else (0, 1, 2, 7))]
        own = {name: x[run].detach().requires_grad_(name in row_gradients) for name, x in rows.items()}
        stats = TokenStats(*fields[:3]) if engine.ref is None else TokenStats(*fields[:3], *fields[5:8])
        loss_sum, metric_sums = row_loss(stats, own, cu_seqlens)
        total = total + loss_sum.detach()
        _add(metrics, metric_sums)
        if not loss_sum.requires_grad:
            continue
        inputs = [x for x in (*leaves, *own.values()) if x.requires_grad]
        arrived = dict(zip(map(id, inputs), torch.autograd.grad(loss_sum, inputs, allow_unused=True)))
        for name, gradient in row_gradients.items():
            if (found := arrived.get(id(own[name]))) is not None:
                gradient[run] = found
        coefficients = [arrived.get(id(leaf)) for leaf in leaves] + [None] * (4 - len(leaves))
        if any(wants):
            engine.differentiate(run.start, run.stop, [x.detach() for x in fields], kept, coefficients, gradients)
    if not any(wants) and not row_gradients:
        return total, metrics
    owners = [*tensors, *rows.values()]
    made = [*gradients.of(*tensors), *(row_gradients.get(name) for name in rows)]
    return _Carried.apply(total, made, *owners), metrics


def linear_row_loss(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    row_loss: RowLoss,
    cu_seqlens: Tensor,
    *,
    rows: dict[str, Tensor],
    cu_groups: Tensor | None = None,
    coupling: str = "group",
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of `row_loss` over packed responses.

    Args:
        hidden, weight, actions, bias, ref_*, temperature, softcap, workspace_bytes: as `linear_token_stats`.
        row_loss: plain torch `(stats, rows, cu_seqlens) -> (loss_sum, metric_sums)`. It sees whole groups, must be a sum over
            them, and may read only tensors in `rows` (those receive gradients; closures do not, whichever backend runs).
        cu_seqlens: (B+1,) integer boundaries of the rows.
        rows: tensors (N, ...), sliced along with the statistics; one value a sequence goes on its rows.
        cu_groups: (M+1,) integer boundaries over the sequences: pairs or lists that a loss couples; None is one sequence each.
        coupling: "group", or "batch" for a loss that couples everything: it is then called once.
        backend: "reference", "cpp", "triton", or None for the best that can run.

    Returns:
        (loss_sum, metric_sums): a scalar, differentiable in hidden, weight, bias and `rows`, and detached scalars.
        Reading the boundaries costs one synchronisation with a GPU.

    Raises:
        ValueError, RuntimeError: as `linear_token_stats`, and for boundaries, `rows` or `coupling` that do not fit.
    """
    arguments = (hidden, weight, actions, bias, ref_hidden, ref_weight, ref_bias, temperature, softcap, workspace_bytes)
    check_linear(*arguments)
    n = hidden.shape[0]
    checks.cu_seqlens(cu_seqlens, n, hidden)
    checks.one_of("coupling", coupling, COUPLINGS)
    for name, value in rows.items():
        if not isinstance(value, Tensor) or value.dim() < 1 or value.shape[0] != n:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            checks.fail(f"rows[{name!r}]", f"a tensor of shape ({n}, ...)", got)
    sequences = cu_seqlens.numel() - 1
    if cu_groups is None:
        groups = list(range(sequences + 1))
    else:
        checks.boundaries("cu_groups", cu_groups, "(M+1,)", sequences, "B")
        groups = cu_groups.tolist()
    dtype = compute_dtype(hidden, weight)
    chosen = dispatch.choose("linear_row_loss", hidden.device.type, backend, dtype)
    offsets = cu_seqlens.tolist()
    rest = (bias, ref_hidden, ref_weight, ref_bias, temperature, softcap, workspace_bytes)
    if chosen == "reference":
        stats = linear_token_stats_reference(hidden, weight, actions.long(), *rest)
        max_rows = workspace_rows(workspace_bytes, weight.shape[0], hidden.device, dtype.itemsize)
    else:
        engine = Engine(chosen, hidden, weight, actions.long(), *rest)
        max_rows = engine.rows
    runs = [(0, sequences)] if coupling == "batch" else group_runs(offsets, groups, max_rows)
    pieces = [(slice(offsets[a], offsets[b]), cu_seqlens[a : b + 1] - offsets[a]) for a, b in runs]
    if chosen == "reference":
        return _of_statistics(stats, row_loss, rows, pieces)
    return _late_bound(engine, row_loss, rows, pieces, (hidden, weight, bias))
