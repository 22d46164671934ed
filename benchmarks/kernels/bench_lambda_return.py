"""lambda_return beside a loop over time, vectorised torch, torch.compile and torchrl.

    pytest benchmarks/kernels/bench_lambda_return.py --benchmark-only

Sequences are of one length, which suits the padded peers; ours takes any lengths. At these sizes calls cost more than bytes:
"launcher" is the kernel's call alone, "registered op" the same through torch.library without the checks of the public function.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from benchmarks.harness import peers
from benchmarks.harness.records import parametrize
from benchmarks.harness.timing import Candidate, Case, Operation, Phases, differentiated
from benchmarks.kernels import sequences
from dqo_kernels import lambda_return

OPTIONS = {"gamma": 0.99, "lam": 0.95}


def inputs(case: Case, device: torch.device) -> SimpleNamespace:
    n = case.dims[0] * case.dims[1]
    return SimpleNamespace(
        shape=case.dims,
        rewards=torch.randn(n, device=device, requires_grad=True),
        values=torch.randn(n, device=device, requires_grad=True),
        cu_seqlens=sequences.boundaries(case, device),
        cotangents={"returns": torch.randn(n, device=device)},
    )


def _differentiated(function, x: SimpleNamespace) -> Phases:
    return differentiated(lambda: {"returns": function()}, {"rewards": x.rewards, "values": x.values}, x.cotangents)


def _ours(x: SimpleNamespace, backend: str) -> Phases:
    return _differentiated(lambda: lambda_return(x.rewards, x.values, x.cu_seqlens, backend=backend, **OPTIONS), x)


def _launcher(x: SimpleNamespace) -> Phases:
    from dqo_kernels import lambda_return_cpp

    inputs = (x.rewards.detach(), x.values.detach(), torch.zeros(x.shape[0]), x.cu_seqlens)
    return Phases(lambda: {"returns": lambda_return_cpp.fwd(*inputs, *OPTIONS.values())})


def _registered(x: SimpleNamespace) -> Phases:
    operation = torch.ops.dqo_kernels.lambda_return.default
    inputs = (x.rewards, x.values, torch.zeros(x.shape[0]), x.cu_seqlens)
    return _differentiated(lambda: operation(*inputs, *OPTIONS.values(), "cpp"), x)


def _padded(function, x: SimpleNamespace, **options):
    """`function` of (B, T) as a function of nothing that gives (N,)."""
    return lambda: function(x.rewards.view(x.shape), x.values.view(x.shape), **OPTIONS, **options).reshape(-1)


def _forward_only(function, **options):
    def build(x: SimpleNamespace) -> Phases:
        run = _padded(function, x, **options)
        return Phases(lambda: {"returns": run()})

    return build


CANDIDATES = [
    *peers.ours(_ours, ("lambda_return",)),
    Candidate("cpp launcher", "returns; no gradient", _launcher, peers.needs_cpp, devices=("cpu",)),
    Candidate("cpp registered op", "everything", _registered, peers.needs_cpp, devices=("cpu",)),
    Candidate("python loop", "returns; no gradient", _forward_only(sequences.returns_by_loop), profiled=False),
    Candidate(
        "eager", "everything, by doubling", lambda x: _differentiated(_padded(sequences.returns_by_doubling, x), x)
    ),
    Candidate(
        "torch.compile",
        "everything, by doubling",
        lambda x: _differentiated(_padded(peers.compiled(sequences.returns_by_doubling), x), x),
        peers.compile_reason(),
    ),
    Candidate(
        "torchrl loop",
        "returns; no gradient",
        _forward_only(peers.torchrl_returns, vectorised=False),
        peers.needs("torchrl"),
        profiled=False,
    ),
    Candidate(
        "torchrl vectorised",
        "returns; no gradient",
        _forward_only(peers.torchrl_returns, vectorised=True),
        peers.needs("torchrl"),
        captured=False,  # it makes tensors on the host
    ),
]

OPERATION = Operation(
    "lambda_return",
    sequences.cases,
    inputs,
    CANDIDATES,
    {
        "forward": ("12*N: read r, V, write G", sequences.floats(3)),
        "backward": ("12*N: read dG, write dr, dV", sequences.floats(3)),
        "both": ("24*N: forward and backward", sequences.floats(6)),
    },
)


@parametrize(OPERATION)
def bench_lambda_return(run, case, mode, implementation):
    run(OPERATION, case, mode, implementation)
