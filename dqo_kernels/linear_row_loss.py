"""linear_row_loss: any loss of token statistics, from hidden states and the head, without the logits.

    stats = linear_token_stats(hidden, weight, actions, ...)
    loss_sum, metric_sums = row_loss(stats, rows, cu_seqlens)          summed over runs of whole groups

Backends: reference (statistics in recomputed chunks, then one call for each run of groups that fits the workspace).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dqo_kernels import checks, dispatch
from dqo_kernels.linear_token_stats import check_linear, linear_token_stats_reference, workspace_rows
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
        backend: "reference", or None for the best that can run.

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
    dispatch.choose("linear_row_loss", hidden.device.type, backend)

    offsets = cu_seqlens.tolist()
    itemsize = compute_dtype(hidden, weight).itemsize
    max_rows = workspace_rows(workspace_bytes, weight.shape[0], hidden, itemsize)
    runs = [(0, sequences)] if coupling == "batch" else group_runs(offsets, groups, max_rows)

    stats = linear_token_stats_reference(
        hidden, weight, actions.long(), bias, ref_hidden, ref_weight, ref_bias, temperature, softcap, workspace_bytes
    )
    total, metrics = stats.logprobs[:0].sum(), {}  # a zero that can be differentiated, also without any sequence
    for first, last in runs:
        run = slice(offsets[first], offsets[last])
        run_stats = TokenStats(*(None if field is None else field[run] for field in stats))
        run_rows = {name: value[run] for name, value in rows.items()}
        loss_sum, metric_sums = row_loss(run_stats, run_rows, cu_seqlens[first : last + 1] - offsets[first])
        total = total + loss_sum
        for name, value in metric_sums.items():
            metrics[name] = metrics.get(name, 0) + value.detach()
    return total, metrics
