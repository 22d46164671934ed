"""linear_row_loss: any loss of token statistics, from hidden states and the head, without the logits.

    stats = linear_token_stats(hidden, weight, actions, ...)
    loss_sum, metric_sums = row_loss(stats, rows, cu_seqlens)          summed over runs of whole groups

Backends: reference (statistics in recomputed chunks, then one call for each run of groups that fits the workspace); cpp,
triton and cuda (linear/engine.py: a run's gradient is made while its logits are still in the workspace).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dqo_kernels.core import checks, dispatch, library
from dqo_kernels.core.row_stats import Coefficients, mapped
from dqo_kernels.linear.engine import Engine
from dqo_kernels.linear.inputs import Differentiable, Linear
from dqo_kernels.linear_token_stats import linear_token_stats_reference
from dqo_kernels.token_stats import TokenStats, seen

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


def _pieces(
    n: int, max_rows: int, cu_seqlens: Tensor, cu_groups: Tensor | None, seqlens: Sequence[int] | None, whole: bool
) -> Pieces:
    """Runs of at most `max_rows` rows (a group is never cut), or one run of all N."""
    sequences = cu_seqlens.numel() - 1
    if sequences == 0:
        return []
    if whole or n <= max_rows:
        return [(slice(0, n), cu_seqlens)]
    offsets = cu_seqlens.tolist() if seqlens is None else [0, *itertools.accumulate(seqlens)]
    groups = list(range(sequences + 1)) if cu_groups is None else cu_groups.tolist()
    runs = group_runs(offsets, groups, max_rows)
    return [(slice(offsets[a], offsets[b]), cu_seqlens[a : b + 1] - offsets[a]) for a, b in runs]


def _add(metrics: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, value in more.items():
        metrics[name] = metrics.get(name, 0) + value.detach()


def _called(row_loss: RowLoss, stats: TokenStats, rows: dict[str, Tensor], cu_seqlens: Tensor) -> tuple[Tensor, dict]:
    """What the caller's function returns, if it is what we can use."""
    returned = row_loss(stats, rows, cu_seqlens)
    expected = "to return (loss_sum, metric_sums), a scalar tensor and a dict of tensors ({} for no metrics)"
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        several = isinstance(returned, tuple | list)
        checks.fail("row_loss", expected, f"{len(returned)} values" if several else type(returned).__name__)
    loss_sum, metric_sums = returned
    if not isinstance(metric_sums, dict):
        checks.fail("row_loss", expected, f"metric_sums of type {type(metric_sums).__name__}")
    for name, value in (("loss_sum", loss_sum), *((f"metric_sums[{k!r}]", v) for k, v in metric_sums.items())):
        if not isinstance(value, Tensor) or (value is loss_sum and value.dim()):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            checks.fail("row_loss", expected, f"{name} of {got}")
    return loss_sum, metric_sums


def _check_dependence(depends: bool, wanted: bool, total: Tensor) -> None:
    """A loss of which no run has a gradient trains nothing. That is meant where it is 0; another number has been detached."""
    if depends or not wanted or not torch.is_grad_enabled() or torch.compiler.is_compiling() or not bool(total):
        return
    cure = "compute it from them with gradients on, or call linear_row_loss under torch.no_grad()"
    checks.fail("row_loss", "a loss_sum that depends on stats or rows", f"one without a gradient; {cure}")


def _of_statistics(stats: TokenStats, row_loss: RowLoss, rows: dict[str, Tensor], pieces: Pieces, loss_scale):
    total = stats.logprobs[:0].sum()  # a zero that can be differentiated, also without any sequence
    metrics: dict[str, Tensor] = {}
    depends, wanted = False, any(x is not None and x.requires_grad for x in (*stats, *rows.values()))
    for run, cu_seqlens in pieces:
        run_stats = mapped(operator.itemgetter(run), stats)
        own = {name: value[run] for name, value in rows.items()}
        loss_sum, metric_sums = _called(row_loss, run_stats, own, cu_seqlens)
        total, depends = total + loss_sum, depends or loss_sum.requires_grad
        _add(metrics, metric_sums)
    _check_dependence(depends, wanted, total)
    return total * loss_scale, metrics


class _Carried(torch.autograd.Function):
    """A loss whose gradients are there already; the backward scales them, on their device, by what arrives. Autograd casts those
    that do not have the dtype of their tensor."""

    @staticmethod
    def forward(ctx, total, gradients, *inputs):
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    @library.once_differentiable("linear_row_loss")
    def backward(ctx, scale):
        if ctx.gradients is None:
            raise RuntimeError("linear_row_loss: its gradients were handed over by the first backward; call it again")
        gradients, ctx.gradients = ctx.gradients, None
        if scale.device.type == "cpu" and scale == 1:  # saves a pass over dW; elsewhere it would cost a wait
            return None, None, *gradients
        return None, None, *(None if g is None else g.mul_(scale) for g in gradients)


def _differentiated_at_once(
    engine: Engine, inputs: Differentiable, row_loss: RowLoss, rows: dict[str, Tensor], pieces: Pieces, loss_scale
):
    """Calls `row_loss` while the run's logits are in the workspace, and makes their gradient there, without a second projection.
    A run that does not fit the workspace is projected twice, but for its last workspace."""
    wanted, gradients = any(engine.wanted), engine.gradients()
    live = torch.is_grad_enabled()
    row_gradients = {name: torch.zeros_like(x) for name, x in rows.items() if live and x.requires_grad}
    metrics: dict[str, Tensor] = {}

    def of_run(run: slice, cu_seqlens: Tensor) -> Tensor:
        """The run's loss. What else is made here is given back at the end, logits among it."""
        row_stats, kept = engine.statistics(run.start, run.stop)
        saved = mapped(Tensor.detach, row_stats.saved())
        stats = seen(row_stats.shown(), engine.ref is not None)
        leaves = Coefficients(stats.logprobs, stats.lse, stats.entropy, stats.kl)
        for leaf in leaves:
            if leaf is not None:
                leaf.requires_grad_(wanted)
        own = {name: x[run].detach().requires_grad_(name in row_gradients) for name, x in rows.items()}
        loss_sum, metric_sums = _called(row_loss, stats, own, cu_seqlens)
        loss_sum = loss_sum * loss_scale
        _add(metrics, metric_sums)
        differentiated = [x for x in (*leaves, *own.values()) if x is not None and x.requires_grad]
        if not loss_sum.requires_grad or not differentiated:
            return loss_sum
        arriving = torch.autograd.grad(loss_sum, differentiated, allow_unused=True)
        arrived = dict(zip(map(id, differentiated), arriving))
        for name, gradient in row_gradients.items():
            if (found := arrived.get(id(own[name]))) is not None:
                gradient[run] = found
        if wanted:
            coefficients = Coefficients(*(arrived.get(id(leaf)) for leaf in leaves))
            engine.differentiate(run.start, run.stop, saved, kept, coefficients, gradients)
        return loss_sum

    total, depends = torch.zeros((), dtype=engine.dtype, device=engine.actions.device), False
    for run, cu_seqlens in pieces:
        loss_sum = of_run(run, cu_seqlens)
        total, depends = total + loss_sum.detach(), depends or loss_sum.requires_grad
    _check_dependence(depends, wanted or bool(row_gradients), total)
    engine.release()  # makes room for casts of the gradients
    if not wanted and not row_gradients:
        return total, metrics
    owners = [*inputs, *rows.values()]
    made = [*gradients.of(inputs, scaled_later=True), *(row_gradients.get(name) for name in rows)]
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
    seqlens: Sequence[int] | None = None,
    loss_scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of `row_loss` over packed responses.

    Compilation: the native backends break a compiled graph, so `torch.compile(..., fullgraph=True)` refuses this call. Leave
    fullgraph out, or take backend="reference" or the form with logits, which compile whole.

    Args:
        hidden, weight, actions, bias, lora_*, ref_*, temperature, softcap, workspace_bytes, group: as `linear_token_stats`.
        row_loss: a function in plain torch, `(stats, rows, cu_seqlens) -> (loss_sum, metric_sums)`. It is called for runs of
            whole groups, and what it returns is added up. It reads its tensors from `rows`, which receive gradients. A tensor
            that it takes from outside receives none in the native backends.
        cu_seqlens: (B+1,) integer boundaries of the rows.
        rows: tensors (N, ...), cut into runs as the statistics are. Repeat a value of a sequence on each of its rows.
        cu_groups: (M+1,) integer boundaries over the sequences. A group is what the loss couples: a pair, or a list. None makes
            every sequence a group.
        coupling: "group", or "batch" for a loss that couples all sequences; `row_loss` is then called once.
        seqlens: the B lengths as host integers. Without them a call on a GPU whose rows do not fit the workspace waits for the
            device once, to read cu_seqlens.
        loss_scale: multiplies the loss, not the metrics. Give 1 / (number of tokens of the step) here, where it costs nothing. A
            factor that arrives in the backward must be multiplied into the gradient of the weight, which is read and written.
        backend: "reference", "cpp", "triton", "cuda", or None for the best that can run.

    Returns:
        (loss_sum, metric_sums): a scalar and detached sums. The scalar is differentiable once, in hidden, weight, bias, lora_a,
        lora_b and `rows`. The native backends compute its gradients in this call, and the backward hands them over.

    Raises:
        ValueError, RuntimeError: as `linear_token_stats`, and for boundaries, `rows` or `coupling` that do not fit.
    """
    call = Linear(
        hidden=hidden,
        weight=weight,
        actions=actions,
        bias=bias,
        lora_a=lora_a,
        lora_b=lora_b,
        lora_scale=lora_scale,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        temperature=temperature,
        softcap=softcap,
        workspace_bytes=workspace_bytes,
    ).checked(group)
    n = hidden.shape[0]
    checks.cu_seqlens(cu_seqlens, n, hidden)
    checks.one_of("coupling", coupling, COUPLINGS)
    for name, value in rows.items():
        checks.whole(f"rows[{name!r}]", value)
        if value.dim() < 1 or value.shape[0] != n:
            checks.fail(f"rows[{name!r}]", f"a tensor of shape ({n}, ...)", f"shape {tuple(value.shape)}")
    sequences = cu_seqlens.numel() - 1
    if cu_groups is not None:
        checks.boundaries("cu_groups", cu_groups, "(M+1,)", sequences, "B")
    if seqlens is not None:
        checks.seqlens(seqlens, cu_seqlens, n)
    if isinstance(loss_scale, Tensor):
        checks.tensor("loss_scale", loss_scale, (), hidden)
        loss_scale = loss_scale.detach().to(call.dtype)
    else:
        checks.factor("loss_scale", loss_scale)
    chosen = dispatch.choose("linear_row_loss", hidden.device.type, backend, call.dtype)
    inputs, cu_seqlens = call.differentiable(), checks.owned_index(cu_seqlens)
    together = (cu_seqlens, cu_groups, seqlens, coupling == "batch")
    if chosen == "reference":
        stats = linear_token_stats_reference(call, inputs)
        pieces = _pieces(n, call.rows_in_workspace(call.dtype.itemsize), *together)
        return _of_statistics(stats, row_loss, rows, pieces, loss_scale)
    library.outside_graphs("linear_row_loss")
    engine = Engine(chosen, call, inputs)
    return _differentiated_at_once(engine, inputs, row_loss, rows, _pieces(n, engine.rows, *together), loss_scale)
