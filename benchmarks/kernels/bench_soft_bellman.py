"""soft_bellman (weights, lambda-returns, both losses) beside the same in torch, with three ways to the returns.

    pytest benchmarks/kernels/bench_soft_bellman.py --benchmark-only

lambda = 0.95; the rest is the paper's: weights of whole trajectories, capped; targets without a gradient.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch

from benchmarks.harness import peers
from benchmarks.harness.records import parametrize
from benchmarks.harness.timing import Candidate, Case, Operation, Phases, differentiated
from benchmarks.kernels import sequences
from dqo_kernels import soft_bellman

BETA, CAP, OPTIONS = 0.1, 1.0, {"gamma": 1.0, "lam": 0.95}


def inputs(case: Case, device: torch.device) -> SimpleNamespace:
    n = case.dims[0] * case.dims[1]
    logprobs = -torch.rand(n, device=device)
    return SimpleNamespace(
        shape=case.dims,
        ref_logprobs=logprobs + 0.01 * torch.randn(n, device=device),
        logprobs=logprobs.requires_grad_(),
        rewards=torch.randn(n, device=device),
        values=torch.randn(n, device=device, requires_grad=True),
        cu_seqlens=sequences.boundaries(case, device),
        cotangents={name: torch.ones((), device=device) for name in ("policy_loss", "value_loss")},
    )


def _phases(forward, x: SimpleNamespace) -> Phases:
    return differentiated(forward, {"logprobs": x.logprobs, "values": x.values}, x.cotangents)


def _ours(x: SimpleNamespace, backend: str) -> Phases:
    tensors = (x.logprobs, x.ref_logprobs, x.rewards, x.values, x.cu_seqlens)
    return _phases(lambda: soft_bellman(*tensors, beta=BETA, is_cap=CAP, backend=backend, **OPTIONS)._asdict(), x)


def eager(logprobs, ref_logprobs, rewards, values, *, returns_of=sequences.returns_by_doubling):
    """All (B, T)."""
    ratio, baseline = BETA * (logprobs - ref_logprobs), values.detach()
    returns = returns_of(rewards - ratio.detach(), baseline, **OPTIONS)
    advantages = rewards + OPTIONS["gamma"] * sequences.following(returns) - baseline
    weights = ((logprobs.detach() - ref_logprobs).sum(1, keepdim=True).clamp(max=CAP)).exp().expand_as(returns)
    policy_loss = (0.5 * weights * (ratio - advantages).square()).sum()
    value_loss = (0.5 * weights * (returns - values).square()).sum()
    return policy_loss, value_loss, returns, advantages, weights


FIELDS = ("policy_loss", "value_loss", "returns", "advantages", "weights")


def _torch(function):
    def build(x: SimpleNamespace) -> Phases:
        tensors = [t.view(x.shape) for t in (x.ref_logprobs, x.rewards)]

        def forward():
            results = function(x.logprobs.view(x.shape), *tensors, x.values.view(x.shape))
            return {name: t.reshape(-1) if t.dim() else t for name, t in zip(FIELDS, results)}

        return _phases(forward, x)

    return build


def _with(returns_of):
    return _torch(functools.partial(eager, returns_of=returns_of))


CANDIDATES = [
    *peers.ours(_ours, ("soft_bellman",)),
    Candidate("python loop", "everything", _with(sequences.returns_by_loop), profiled=False),
    Candidate("eager", "everything, returns by doubling", _torch(eager)),
    Candidate(
        "torch.compile",
        "everything, returns by doubling",
        lambda x: _torch(peers.compiled(eager))(x),
        peers.compile_reason(),
    ),
    Candidate(
        "torchrl",
        "everything: its vectorised returns, losses in eager torch",
        _with(functools.partial(peers.torchrl_returns, vectorised=True)),
        peers.needs("torchrl"),
        captured=False,  # it makes tensors on the host
    ),
]

OPERATION = Operation(
    "soft_bellman",
    sequences.cases,
    inputs,
    CANDIDATES,
    {
        "forward": ("28*N: read logp, ref, r, V, write G, advantage, w", sequences.floats(7)),
        "backward": ("16*N: read and write the gradients of logp, V", sequences.floats(4)),
        "both": ("36*N: read logp, ref, r, V, write G, advantage, w, two gradients", sequences.floats(9)),
    },
)


@parametrize(OPERATION)
def bench_soft_bellman(run, case, mode, implementation):
    run(OPERATION, case, mode, implementation)
