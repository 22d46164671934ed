"""linear_token_stats: the statistics of `F.linear(hidden, weight, bias)` without ever holding (N, V) whole.

Backends: reference (chunks of rows, each recomputed in the backward), and cpp and triton (linear_engine.py). Logits and gradients
are made in float32 in all of them, whatever the dtype of the hidden states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dqo_kernels import checks, dispatch
from dqo_kernels.linear_engine import Engine, Gradients, workspace_rows
from dqo_kernels.packed import compute_dtype
from dqo_kernels.token_stats import TokenStats, in_chunks, row_stats


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    workspace_bytes: int | None,
) -> None:
    """The checks that every linear_* function shares."""
    checks.floating("hidden", hidden)
    if hidden.dim() != 2:
        checks.fail("hidden", "shape (N, D)", f"shape {tuple(hidden.shape)}")
    n, width = hidden.shape
    checks.floating("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] < 1:
        checks.fail("weight", f"shape (V, {width}) to fit hidden", f"shape {tuple(weight.shape)}")
    vocab = weight.shape[0]
    checks.tensor("weight", weight, (vocab, width), hidden)
    checks.actions(actions, (n,), vocab, hidden)
    if bias is not None:
        checks.tensor("bias", bias, (vocab,), hidden)
    if (ref_hidden is None) != (ref_weight is None):
        given, missing = ("ref_hidden", "ref_weight") if ref_weight is None else ("ref_weight", "ref_hidden")
        checks.fail(missing, f"a tensor, because {given} is given", "None")
    if ref_hidden is not None:
        checks.floating("ref_hidden", ref_hidden)
        ref_width = ref_hidden.shape[-1]
        checks.tensor("ref_hidden", ref_hidden, (n, ref_width), hidden)
        checks.tensor("ref_weight", ref_weight, (vocab, ref_width), hidden, "(V of weight, width of ref_hidden)")
    if ref_bias is not None:
        if ref_hidden is None:
            checks.fail("ref_hidden", "a tensor, because ref_bias is given", "None")
        checks.tensor("ref_bias", ref_bias, (vocab,), hidden)
    checks.temperature(temperature, (n,), hidden)
    checks.softcap(softcap)
    if workspace_bytes is not None and workspace_bytes < 1:
        checks.fail("workspace_bytes", "a positive number of bytes or None", workspace_bytes)


def linear_token_stats_reference(
    hidden, weight, actions, bias, ref_hidden, ref_weight, ref_bias, temperature, softcap, workspace_bytes
) -> TokenStats:
    dtype = compute_dtype(hidden, weight)

    def cast(x):
        return None if x is None else x.to(dtype)

    # Cast once outside the chunks: the gradients of all chunks then meet in this dtype, not in bfloat16.
    weight, bias, ref_weight, ref_bias = map(cast, (weight, bias, ref_weight, ref_bias))

    def chunk(hidden, actions, ref_hidden, temperature):
        with torch.autocast(
            hidden.device.type, enabled=False
        ):  # a caller's autocast would round the logits to bfloat16
            ref_logits = None if ref_hidden is None else F.linear(cast(ref_hidden), ref_weight, ref_bias)
            return row_stats(F.linear(cast(hidden), weight, bias), actions, ref_logits, temperature, softcap, dtype)

    rows = workspace_rows(workspace_bytes, weight.shape[0], hidden.device, dtype.itemsize)
    return in_chunks(rows, hidden.shape[0], [hidden, actions, ref_hidden, temperature], chunk)


class _FromEngine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, engine):
        fields, kept = engine.statistics(0, len(engine.actions))
        ctx.save_for_backward(hidden, weight, bias)  # only so that a change of theirs before the backward is noticed
        ctx.engine, ctx.fields, ctx.kept = engine, fields, kept
        ctx.set_materialize_grads(False)
        logprobs, lse, entropy, _, _, ref_logprobs, ref_lse, kl, _, _ = fields
        ctx.mark_non_differentiable(ref_logprobs, ref_lse)
        return logprobs, lse, entropy, ref_logprobs, ref_lse, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, c_logprobs, c_lse, c_entropy, _ref_logprobs, _ref_lse, c_kl):
        tensors, engine = ctx.saved_tensors, ctx.engine
        gradients = Gradients(engine.head, *ctx.needs_input_grad[:3])
        kept, ctx.kept = ctx.kept, None  # the gradient is written over the logits: a second backward projects again
        coefficients = [c_logprobs, c_lse, c_entropy, None if engine.ref is None else c_kl]
        engine.differentiate(0, len(engine.actions), ctx.fields, kept, coefficients, gradients)
        return *gradients.of(*tensors), None


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> TokenStats:
    """`token_stats(F.linear(hidden, weight, bias), actions, F.linear(ref_hidden, ref_weight, ref_bias))`, in chunks.

    Args:
        hidden: (N, D) floating, the policy's last hidden states.
        weight: (V, D) floating, the policy's head; its dtype may differ from that of `hidden`.
        actions: (N,) integer token ids in [0, V).
        bias: (V,) or None.
        ref_hidden, ref_weight, ref_bias: (N, D'), (V, D'), (V,): the reference policy's; constants.
        temperature, softcap: as in `token_stats`.
        workspace_bytes: bytes of logits held at once; None is 256 MiB on the CPU, 2 GiB on a GPU.
        backend: "reference", "cpp", "triton", or None for the best that can run.

    Returns:
        TokenStats, differentiable in hidden, weight and bias. Results do not depend on `workspace_bytes` beyond rounding.

    Raises:
        ValueError, RuntimeError: as `token_stats`.
    """
    arguments = (hidden, weight, actions, bias, ref_hidden, ref_weight, ref_bias, temperature, softcap, workspace_bytes)
    check_linear(*arguments)
    dtype = compute_dtype(hidden, weight)
    chosen = dispatch.choose("linear_token_stats", hidden.device.type, backend, dtype)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach()
    rest = (bias, ref_hidden, ref_weight, ref_bias, temperature, softcap, workspace_bytes)
    if chosen == "reference":
        return linear_token_stats_reference(hidden, weight, actions.long(), *rest)
    fields = _FromEngine.apply(hidden, weight, bias, Engine(chosen, hidden, weight, actions.long(), *rest))
    return TokenStats(*fields) if ref_hidden is not None else TokenStats(*fields[:3])
