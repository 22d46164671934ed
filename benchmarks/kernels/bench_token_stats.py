"""token_stats beside eager torch, torch.compile, TRL and Liger, and beside bare memory traffic.

    pytest benchmarks/kernels/bench_token_stats.py --benchmark-only

Variants: "policy" gives log-probability, logsumexp and entropy of one model, with a gradient through the log-probability;
"kl" gives them of two models with the exact KL, with a gradient through log-probability and KL.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from benchmarks.harness import peers
from benchmarks.harness.environment import size
from benchmarks.harness.records import parametrize
from benchmarks.harness.timing import Candidate, Case, Operation, Phases, differentiated
from dqo_kernels import token_stats
from dqo_kernels.core import dispatch
from dqo_kernels.core.row_stats import Coefficients, RowStats

DISPATCHED = ("token_stats",)
SMALL = ((256, 4096, torch.float32, ("kl",)),)
DEFAULT = (
    (1024, 32000, torch.float32, ("policy", "kl")),
    (256, 151936, torch.bfloat16, ("policy",)),
)
FULL = ((256, 151936, torch.bfloat16, ("kl",)), (256, 151936, torch.float32, ("policy",)))
GPU = (
    (8192, 151936, torch.bfloat16, ("policy", "kl")),
    (8192, 32000, torch.bfloat16, ("policy", "kl")),
    (1024, 128256, torch.bfloat16, ("kl",)),
    (128, 151936, torch.bfloat16, ("policy", "kl")),
)


def cases(device_type: str, size: str) -> list[Case]:
    by_size = {"smoke": SMALL, "default": SMALL + DEFAULT, "full": SMALL + DEFAULT + FULL}
    shapes = by_size[size] if device_type == "cpu" or size == "smoke" else GPU
    return [
        Case(f"{n}x{vocab}", (n, vocab), dtype, variant, graph=n * vocab < 2**26)
        for n, vocab, dtype, variants in shapes
        for variant in variants
    ]


def inputs(case: Case, device: torch.device) -> SimpleNamespace:
    n, vocab = case.dims
    logits = torch.randn(n, vocab, device=device, dtype=case.dtype)
    two_models = case.variant == "kl"
    return SimpleNamespace(
        logits=logits.requires_grad_(),
        ref_logits=torch.randn(n, vocab, device=device, dtype=case.dtype) if two_models else None,
        actions=torch.randint(0, vocab, (n,), device=device),
        cotangents={
            name: torch.randn(n, device=device) for name in (("logprobs", "kl") if two_models else ("logprobs",))
        },
    )


def _phases(function, x: SimpleNamespace) -> Phases:
    return differentiated(lambda: function(x.logits, x.actions, x.ref_logits), {"logits": x.logits}, x.cotangents)


def _ours(x: SimpleNamespace, backend: str) -> Phases:
    def forward():
        stats = token_stats(x.logits, x.actions, x.ref_logits, backend=backend)
        return {name: field for name, field in stats._asdict().items() if field is not None}

    return differentiated(forward, {"logits": x.logits}, x.cotangents)


def eager(logits, actions, ref_logits, dtype=torch.float32):
    """One log_softmax a model; the logsumexp and the entropy without a pass or a gradient of their own where that is possible."""
    z, picked = logits.to(dtype), actions[:, None]
    logp = z.log_softmax(-1)
    p = logp.exp()
    logprobs = logp.gather(-1, picked)[:, 0]
    with torch.no_grad():
        fields = {"lse": z.gather(-1, picked)[:, 0] - logprobs, "entropy": -(p * logp).sum(-1)}
    fields["logprobs"] = logprobs
    if ref_logits is not None:
        with torch.no_grad():
            ref_logp = ref_logits.to(dtype).log_softmax(-1)
        fields["ref_logprobs"] = ref_logp.gather(-1, picked)[:, 0]
        fields["kl"] = (p * (logp - ref_logp)).sum(-1)
    return fields


def _cross_entropy(logits, actions, ref_logits):
    return {"logprobs": -torch.nn.functional.cross_entropy(logits.float(), actions, reduction="none")}


def _trl(x: SimpleNamespace) -> Phases:
    def function(logits, actions, ref_logits):
        return dict(zip(("logprobs", "entropy"), peers.trl_logprobs_entropy(logits, actions)))

    phases = _phases(function, x)
    if x.logits.is_cuda or x.logits.dtype == torch.float32 or size() == "full":
        return phases
    return phases._replace(backward=None)  # many seconds a call: there it takes the 16-bit rows one by one


def _liger(x: SimpleNamespace) -> Phases:
    """On logits of its own, which every forward with a gradient overwrites."""
    logits = x.logits.detach().clone()

    def forward():
        logits.requires_grad_(torch.is_grad_enabled())
        return {"logprobs": peers.liger_logprobs(logits, x.actions)}

    def backward(outputs):
        (grad,) = torch.autograd.grad(
            outputs["logprobs"], logits, x.cotangents["logprobs"].to(outputs["logprobs"].dtype)
        )
        return {"grad_logits": grad}

    return Phases(forward, backward)


def _preallocated(x: SimpleNamespace) -> Phases:
    """Our launchers without autograd, the gradient into a buffer written to before: the kernels without page faults."""
    from dqo_kernels import token_stats_cpp

    logits, options = x.logits.detach(), (None, None, 1.0, 0.0)  # no mask, no temperatures, temperature, softcap
    grad = torch.zeros_like(logits)
    arriving = [x.cotangents.get(name) for name in Coefficients._fields]

    def forward():
        return token_stats_cpp.fwd(logits, x.actions, x.ref_logits, *options)._asdict()

    def backward(outputs):
        saved = RowStats(**outputs).saved()
        token_stats_cpp.bwd(logits, x.actions, x.ref_logits, *options, *saved, *arriving, out=grad)
        return {"grad_logits": grad}

    return Phases(forward, backward)


def _read_loop(x: SimpleNamespace) -> Phases:
    """The same bytes with the threads and the loads of our kernels, and nothing computed but sums of 65,536 floats."""
    tensors = [t.detach() for t in (x.logits, x.ref_logits) if t is not None]
    sums = torch.zeros(tensors[0].nbytes // 4 // 65536 + 1, dtype=torch.float64)

    def forward():
        for t in tensors:
            dispatch._cpu.read_sum(t.data_ptr(), t.nbytes // 4, torch.get_num_threads(), sums.data_ptr())
        return {}

    return Phases(forward)


def _bytes(reads_and_writes: int):
    return lambda case: reads_and_writes * case.dims[0] * case.dims[1] * case.dtype.itemsize


def _policy(case: Case) -> bool:
    return case.variant == "policy"


CANDIDATES = [
    *peers.ours(_ours, DISPATCHED),
    Candidate("cpp preallocated", "everything; no autograd", _preallocated, peers.needs_cpp, devices=("cpu",)),
    Candidate("read loop", "reads the logits only", _read_loop, peers.needs_cpp, devices=("cpu",)),
    Candidate("eager", "everything, in float32", lambda x: _phases(eager, x)),
    Candidate(
        "torch.compile",
        "everything, in float32",
        lambda x: _phases(peers.compiled(eager), x),
        peers.compile_reason(in_smoke=True),
    ),
    Candidate(
        "eager 16-bit",
        "everything, in the logits' dtype",
        lambda x: _phases(lambda *tensors: eager(*tensors, dtype=x.logits.dtype), x),
        suits=lambda case: _policy(case) and case.dtype.itemsize == 2,  # its KL of close models is noise
    ),
    Candidate("cross_entropy", "log-probability only", lambda x: _phases(_cross_entropy, x), suits=_policy),
    Candidate("trl", "log-probability, entropy", _trl, peers.needs("trl"), suits=_policy),
    Candidate(
        "liger",
        "log-probability only; the gradient in place",
        _liger,
        peers.needs("liger_kernel"),
        captured=False,  # it counts its rows on the host
        devices=("cuda",),
        suits=_policy,
    ),
]

OPERATION = Operation(
    "token_stats",
    cases,
    inputs,
    CANDIDATES,
    {
        "forward policy": ("N*V*E: read z", _bytes(1)),
        "forward kl": ("2*N*V*E: read z, z_ref", _bytes(2)),
        "backward policy": ("2*N*V*E: read z, write dz", _bytes(2)),
        "backward kl": ("3*N*V*E: read z, z_ref, write dz", _bytes(3)),
        "both policy": ("3*N*V*E: forward and backward", _bytes(3)),
        "both kl": ("5*N*V*E: forward and backward", _bytes(5)),
    },
    DISPATCHED,
    tolerance=lambda case: 1e-4 if case.dtype == torch.float32 else 1e-2,
    rough={"eager 16-bit": 5e-2, "trl": 5e-2},
)


@parametrize(OPERATION)
def bench_token_stats(run, case, mode, implementation):
    run(OPERATION, case, mode, implementation)
