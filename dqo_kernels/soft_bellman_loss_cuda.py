"""soft_bellman_loss in one pass, in CUDA C++ (csrc/cuda/soft_bellman_loss.h): loss and gradient from one read of the logits.

The gradient is made in the forward, for the loss as it is returned. A factor that arrives in the backward is multiplied in on the
device, which reads and writes the gradient once more unless it is 1 (`loss.backward()`).

A row's coefficients may depend on its own and on later rows only, so: is_level none, token or suffix, target="detach", reduction
mean or sum, no group.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dqo_kernels._cuda as _cuda
from dqo_kernels.core import checks, dispatch, library
from dqo_kernels.core.addresses import DTYPES, address, addresses, encoded, where
from dqo_kernels.core.bellman_options import SCHEMA, BellmanOptions
from dqo_kernels.core.dispatch import ONE_PASS
from dqo_kernels.core.packed import compute_dtype
from dqo_kernels.core.row_stats import RowStats, mapped
from dqo_kernels.token_stats import readable
from dqo_kernels.token_stats_cuda import arguments

LEVELS = ("none", "token", "suffix")


def _forward(
    logits, actions, ref_logits, mask, temperatures, temperature, softcap, cu_seqlens, count, ref_logprobs, ref_lse, rewards,
    values, behavior_logprobs, bootstrap, target_values, beta, gamma, lam, policy_target, target, is_level, is_cap, is_floor,
    policy_scale, value_coef, kl_coef,
) -> tuple[Tensor, ...]:  # fmt: skip
    options = BellmanOptions(beta, gamma, lam, policy_target, target, is_level, is_cap, is_floor)
    n, vocab, place = actions.numel(), logits.shape[-1], where(logits)
    if not _cuda.one_pass_shape(vocab, DTYPES[logits.dtype], ref_logits is not None)[0]:
        reason = f"a row of {vocab} columns in {logits.dtype} does not fit the shared memory of a cluster; use backend='cuda'"
        raise RuntimeError(f"backend {ONE_PASS!r} cannot run soft_bellman_loss: {reason}")
    stats = RowStats.empty(logits, n, ref_logits is not None)
    terms = [stats.logprobs.new_empty(n) for _ in range(7)]
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    slots = [logits.new_empty(n * _cuda.SLOT_BYTES, dtype=torch.uint8) for _ in range(2)]
    sequence, tickets = (logits.new_empty(size, dtype=torch.int32) for size in (n, 1))
    scale = count.float().reciprocal()
    if n:
        _cuda.soft_bellman_loss_one_pass(
            place,
            arguments(logits, actions, ref_logits, mask, temperatures, temperature, softcap),
            DTYPES[logits.dtype],
            addresses(*stats),
            addresses(None, ref_logprobs, rewards, values, mask, behavior_logprobs, bootstrap, target_values),
            (cu_seqlens.data_ptr(), n, cu_seqlens.numel() - 1),
            encoded(options),
            addresses(*terms),
            (address(ref_lse), scale.data_ptr(), policy_scale, value_coef, kl_coef),
            addresses(*slots, sequence, tickets),
            grad.data_ptr(),
        )
    policy_loss, value_loss, returns, advantages, weights, _, value_grad = terms
    losses = [x.sum() * scale for x in (policy_loss, value_loss, stats.kl)]
    loss = policy_scale * losses[0] + value_coef * losses[1]
    if kl_coef != 0.0:
        loss = loss + kl_coef * losses[2]
    given = stats.ref_logprobs
    if ref_logits is None:
        given = torch.where(mask, ref_logprobs, 0) if mask is not None else ref_logprobs.clone()
    per_row = (stats.logprobs, given, stats.lse, stats.entropy, stats.kl, returns, advantages, weights)
    return loss, *losses, *per_row, grad, value_grad * (value_coef * scale)


def _fake_forward(logits, actions, ref_logits, *_):
    row = logits.new_empty(actions.shape[0], dtype=torch.float32)
    scalars = [row.new_empty(()) for _ in range(4)]
    rows = [torch.empty_like(row) for _ in range(8)]
    if ref_logits is None:
        rows[4] = row.new_empty(0)
    return *scalars, *rows, logits.new_empty(logits.shape), torch.empty_like(row)


_FORWARD = library.Operation(
    "soft_bellman_loss_one_pass(Tensor logits, Tensor actions, Tensor? ref_logits, Tensor? mask, Tensor? temperatures, "
    "float temperature, float softcap, Tensor cu_seqlens, Tensor count, Tensor? ref_logprobs, Tensor? ref_lse, Tensor rewards, "
    "Tensor? values, Tensor? behavior_logprobs, Tensor? bootstrap, Tensor? target_values, "
    f"{SCHEMA}, float policy_scale, float value_coef, float kl_coef) -> "
    "(Tensor loss, Tensor policy_loss, Tensor value_loss, Tensor kl_loss, Tensor logprobs, Tensor ref_logprobs, Tensor lse, "
    "Tensor entropy, Tensor kl, Tensor returns, Tensor advantages, Tensor weights, Tensor grad_logits, Tensor grad_values)",
    lambda *arguments: _forward(*library.in_memory("soft_bellman_loss", arguments)),
    _fake_forward,
)


def _save(ctx, inputs, output):
    ctx.soft_values = _FORWARD.named(inputs)["values"] is None
    ctx.save_for_backward(*output[-2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.spent = False


def _gradient(ctx, factor, *_):
    if factor is None:
        return _FORWARD.gradients()
    grad, grad_values = ctx.saved_tensors
    if library.traced((grad, factor)):
        grad = grad * factor
    else:
        if ctx.spent:
            raise RuntimeError(
                "the one-pass gradient was handed out by an earlier backward; backend='cuda' keeps the logits"
            )
        ctx.spent = True
        factor = factor.float()
        _cuda.rescale(where(grad), grad.data_ptr(), grad.numel(), DTYPES[grad.dtype], factor.data_ptr())
    return _FORWARD.gradients(logits=grad, values=None if ctx.soft_values else grad_values * factor)


_FORWARD.differentiable(_save, _gradient)


def check(call) -> None:
    """Refuses a `soft_bellman_loss.Call` that cannot be done in one pass, with the cure."""
    checks.one_of(f"is_level with backend={ONE_PASS!r}", call.options.is_level, LEVELS)
    checks.one_of(f"target with backend={ONE_PASS!r}", call.options.target, ("detach",))
    checks.one_of(f"reduction with backend={ONE_PASS!r}", call.reduction, ("mean", "sum"))
    if call.group is not None:
        checks.fail(f"group with backend={ONE_PASS!r}", "None, because each process has a part of a row", "a group")
    dispatch.insist("soft_bellman_loss", ONE_PASS, call.features.device.type, logits_dtype(call))


def logits_dtype(call) -> torch.dtype:
    other = call.ref_features
    return call.features.dtype if other is None else torch.promote_types(call.features.dtype, other.dtype)


def one_pass(call, layout) -> tuple[Tensor | None, ...]:
    """The fields of SoftBellmanOutput, from a call and its layout that have been checked."""
    dtype = logits_dtype(call)
    logits, ref_logits = call.features.to(dtype), call.ref_features
    ref_logits = None if ref_logits is None else ref_logits.detach().to(dtype)

    rows = mapped(lambda x: layout.rows(x).to(compute_dtype(logits)).contiguous(), call.per_token)
    given = mapped(Tensor.detach, rows)
    temperature, temperatures = call.temperatures(layout.rows), None
    if isinstance(temperature, Tensor):
        temperatures = temperature.detach().to(compute_dtype(logits)).expand(call.actions.numel()).contiguous()
        temperature = 1.0
    count = layout.count() if call.reduction == "mean" else 1
    if not isinstance(count, Tensor):  # not copied from the host: a graph may be captured
        count = torch.full((), count, device=logits.device)
    loss, policy_loss, value_loss, kl_loss, *per_row = _FORWARD(
        readable("logits", logits), layout.rows(call.actions).long().contiguous(),
        None if ref_logits is None else readable("ref_logits", ref_logits), layout.mask, temperatures, float(temperature),
        float(call.softcap or 0.0), layout.cu_seqlens, count,
        given.ref_logprobs, given.ref_lse, given.rewards, rows.values, given.behavior_logprobs,
        None if call.bootstrap is None else call.bootstrap.detach().float().contiguous(), given.target_values,
        *call.options, call.policy_scale, call.value_coef, call.kl_coef,
    )[:-2]  # fmt: skip
    if ref_logits is None:
        kl_loss = per_row[4] = None
    return loss, policy_loss, value_loss, kl_loss, *(None if x is None else layout.unrows(x) for x in per_row)
