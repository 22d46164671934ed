"""One small call of every public function in float32, for tests of what all of them must stand."""

import pytest
import torch

import dqo_kernels
from dqo_kernels.core import dispatch
from tests.kernels.oracle import random_batch

N, V, D = 9, 6, 3
BATCH = random_batch(0, (3, 1, 0, 5), V)


def _floats(**tensors):
    return {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}


def _row_loss(stats, rows, cu_seqlens):
    return (stats.logprobs * rows["rewards"] + 0.3 * stats.entropy + 0.1 * stats.kl).sum(), {}


SCAN = _floats(rewards=BATCH.rewards, values=BATCH.values, cu_seqlens=BATCH.cu_seqlens)
STATS = _floats(logits=BATCH.logits, actions=BATCH.actions, ref_logits=BATCH.ref_logits)
HEADS = torch.linspace(-1, 1, 2 * (N + V) * D).sin()
LINEAR = {
    "hidden": HEADS[: N * D].view(N, D),
    "weight": HEADS[N * D : (N + V) * D].view(V, D),
    "actions": BATCH.actions,
    "ref_hidden": HEADS[(N + V) * D : (2 * N + V) * D].view(N, D),
    "ref_weight": HEADS[(2 * N + V) * D :].view(V, D),
}
ROWS = SCAN | _floats(logprobs=BATCH.logprobs, ref_logprobs=BATCH.ref_logprobs)
ARGUMENTS = {
    "lambda_return": SCAN,
    "token_stats": STATS,
    "soft_bellman": ROWS,
    "soft_bellman_loss": SCAN | STATS,
    "linear_token_stats": LINEAR,
    "linear_soft_bellman_loss": SCAN | LINEAR,
    "linear_row_loss": LINEAR | {"cu_seqlens": SCAN["cu_seqlens"]},
}
OPTIONS = {
    "lambda_return": {"lam": 0.9},
    "soft_bellman": {"lam": 0.9, "reduction": "sum"},
    "soft_bellman_loss": {"lam": 0.9, "kl_coef": 0.1},
    "linear_soft_bellman_loss": {"lam": 0.9, "kl_coef": 0.1, "workspace_bytes": 150},
    "linear_token_stats": {"workspace_bytes": 150},  # several pieces
}
LIVE = {"rewards", "values", "logprobs", "logits", "hidden", "weight"}  # what some function gives a gradient
BACKENDS = ["reference", "cpp", "triton", "cuda"]
NATIVE = BACKENDS[1:]


def arguments(name: str) -> dict[str, torch.Tensor]:
    """Tensors of one's own."""
    return {key: x.clone() for key, x in ARGUMENTS[name].items()}


def call(name: str, tensors: dict, backend: str | None = None) -> torch.Tensor:
    """A scalar that depends on everything that can be differentiated."""
    options = OPTIONS.get(name, {}) | {"backend": backend}
    if name == "linear_row_loss":
        return dqo_kernels.linear_row_loss(**tensors, row_loss=_row_loss, rows={"rewards": SCAN["rewards"]}, **options)[
            0
        ]
    out = getattr(dqo_kernels, name)(**tensors, **options)
    if name == "lambda_return":
        return (out * torch.arange(1.0, N + 1, device="cpu", dtype=out.dtype)).sin().sum()
    if name.endswith("token_stats"):
        return (out.logprobs + 0.5 * out.lse - 0.2 * out.entropy + 0.1 * out.kl).sum()
    return out.loss if name.endswith("loss") else out.policy_loss + out.value_loss


def differentiated(name: str, tensors: dict, backend: str | None = None, between=lambda: None) -> list[torch.Tensor]:
    """The value and the gradients; `between` happens after the forward."""
    live = live_of(name, tensors)
    value = call(name, tensors, backend)
    between()
    return [value.detach(), *torch.autograd.grad(value, live)]


def live_of(name: str, tensors: dict) -> list[torch.Tensor]:
    constants = {"rewards"} if name != "lambda_return" else set()
    return [x.requires_grad_() for key, x in tensors.items() if key in LIVE - constants]


def run_here(backend: str) -> None:
    if backend not in dispatch.TABLE["token_stats"]["cpu"] or dispatch.unavailable(backend):
        pytest.skip(f"{backend}: {dispatch.unavailable(backend)}")


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)
