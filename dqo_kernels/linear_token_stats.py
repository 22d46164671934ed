"""linear_token_stats: the statistics of `F.linear(hidden, weight, bias)` without ever holding (N, V) whole.

Backends: reference (chunks of rows, each recomputed in the backward), and cpp, triton and cuda (linear/engine.py). Logits are
made in float32 in all of them, whatever the dtype of the hidden states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dqo_kernels.core import checks, dispatch, library
from dqo_kernels.core.row_stats import Coefficients, SavedStats
from dqo_kernels.linear.engine import Engine
from dqo_kernels.linear.inputs import Differentiable, Linear, no_autocast
from dqo_kernels.token_stats import TokenStats, in_chunks, row_stats, seen


def linear_token_stats_reference(call: Linear, inputs: Differentiable) -> TokenStats:
    dtype = call.dtype

    def cast(x):
        return None if x is None else x.to(dtype)

    # Cast once outside the chunks: the gradients of all chunks then meet in this dtype, not in bfloat16.
    weight, bias, lora_b = cast(inputs.weight), cast(inputs.bias), cast(inputs.lora_b)
    ref_weight, ref_bias = cast(call.ref_weight), cast(call.ref_bias)

    def chunk(hidden, low, actions, ref_hidden, temperature):
        with no_autocast(hidden.device):
            ref_logits = None if ref_hidden is None else F.linear(cast(ref_hidden), ref_weight, ref_bias)
            logits = F.linear(cast(hidden), weight, bias)
            if low is not None:
                logits = logits + F.linear(cast(low), lora_b)
            return row_stats(logits, actions, ref_logits, temperature, call.softcap, dtype, call.slices)

    temperature = call.temperature
    if isinstance(temperature, Tensor):
        temperature = checks.owned(temperature.detach(), temperature.dtype)
    per_row = [inputs.hidden, inputs.low, checks.owned_index(call.actions), call.ref_hidden, temperature]
    return in_chunks(call.rows_in_workspace(dtype.itemsize), len(call.hidden), per_row, chunk)


class _FromEngine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, low, lora_b, engine):
        stats, kept = engine.statistics(0, len(engine.actions))
        if not any(engine.wanted):
            kept = None
            engine.release()
        # Saved, the inputs are watched for changes; the outputs would hold themselves, and the engine, for ever as attributes.
        ctx.save_for_backward(hidden, weight, bias, low, lora_b, *stats.saved(), *engine.constants())
        ctx.engine, ctx.kept = engine, kept
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats.ref_logprobs, stats.ref_lse)
        return stats.shown()

    @staticmethod
    @library.once_differentiable("linear_token_stats")
    def backward(ctx, c_logprobs, c_lse, c_entropy, _ref_logprobs, _ref_lse, c_kl):
        saved, engine = library.in_memory("linear_token_stats", ctx.saved_tensors), ctx.engine
        hidden, weight, bias, low, lora_b, *rest = saved
        inputs, stats = Differentiable(hidden, weight, bias, low, lora_b), SavedStats(*rest[: len(SavedStats._fields)])
        gradients = engine.gradients()
        kept, ctx.kept = ctx.kept, None  # the gradient is written over the logits: a second backward projects again
        coefficients = Coefficients(c_logprobs, c_lse, c_entropy, None if engine.ref is None else c_kl)
        engine.differentiate(0, len(engine.actions), stats, kept, coefficients, gradients)
        del kept
        engine.release()  # whoever holds on to a statistic does not hold on to logits
        return *gradients.of(inputs), None


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    *,
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
) -> TokenStats:
    """`token_stats(F.linear(hidden, weight, bias), actions, F.linear(ref_hidden, ref_weight, ref_bias))`, in chunks of rows.

    Compilation: the native backends break a compiled graph, so `torch.compile(..., fullgraph=True)` refuses this call. Leave
    fullgraph out, or take backend="reference" or the form with logits, which compile whole.

    Args:
        hidden: (N, D) floating, the policy's last hidden states.
        weight: (V, D) floating, the policy's head; its dtype may differ from that of `hidden`.
        actions: (N,) integer token ids in [0, V).
        bias: (V,) or None.
        lora_a, lora_b, lora_scale: (R, D), (V, R) and a number: a low-rank update of the head. The head is then
            weight + lora_scale * lora_b @ lora_a, which is never formed. If `weight` is frozen, its gradient is not computed.
        ref_hidden, ref_weight, ref_bias: (N, D'), (V, D'), (V,) of the reference policy. They get no gradient.
        temperature, softcap: as in `token_stats`.
        workspace_bytes: bytes of logits held at once; None is 256 MiB on the CPU, 2 GiB on a GPU.
        backend: "reference", "cpp", "triton", "cuda", or None for the best that can run.
        group: the processes that hold V together. Each gives its own consecutive rows of weight, bias, lora_b, ref_weight and
            ref_bias, in the order of ranks. Everything else is the same in all processes. See `token_stats`.

    Returns:
        TokenStats, differentiable in hidden, weight, bias, lora_a and lora_b. `workspace_bytes` changes results by rounding only.
        The call holds its workspace until the backward, which reads the last logits there instead of computing them again.

    Raises:
        ValueError, RuntimeError: as `token_stats`.
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
    chosen = dispatch.choose("linear_token_stats", hidden.device.type, backend, call.dtype)
    inputs = call.differentiable()
    if chosen == "reference":
        return linear_token_stats_reference(call, inputs)
    library.outside_graphs("linear_token_stats")
    shown = _FromEngine.apply(*inputs, Engine(chosen, call, inputs))
    return seen(shown, ref_hidden is not None)
