"""linear_soft_bellman_loss, from hidden states (N, D) and the head (V, D) to the loss and the gradients of both.

    pytest benchmarks/kernels/bench_linear_soft_bellman_loss.py --benchmark-only

Variants: "policy" is the paper's loss, the reference's log-probabilities given: three matrix products; "kl" adds the exact KL
to a second model's hidden states and head: four. The ceiling is those products alone, in the inputs' dtype, into buffers that
are kept.

Mode "forward" is the loss without a gradient. There is no "backward": ours and most peers make the gradient in the forward.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.harness import peers
from benchmarks.harness.records import parametrize
from benchmarks.harness.timing import Candidate, Case, Operation, Phases, differentiated
from benchmarks.harness.units import FLOPS, GEMMS
from benchmarks.kernels.bench_soft_bellman_loss import BETA, CAP, KL_COEF, bellman_loss
from benchmarks.kernels.bench_soft_bellman_loss import eager as eager_of_logits
from dqo_kernels import linear_soft_bellman_loss, linear_token_stats
from dqo_kernels.linear.inputs import WORKSPACE_BYTES

DISPATCHED = ("linear_row_loss", "soft_bellman")
FLOAT32, BFLOAT16 = (torch.float32,), (torch.bfloat16,)
POLICY, BOTH = ("policy",), ("policy", "kl")
SMALL = (896, 32000)  # (D, V)
QWEN = (896, 151936)  # of Qwen2.5-0.5B
LLAMA3 = (2048, 128256)  # of Llama-3.2-1B
LLAMA2 = (4096, 32000)  # of Llama-2-7B and Mistral-7B
SMOKE = ((2, 16, (64, 1024), FLOAT32, BOTH),)
DEFAULT = (
    (4, 64, SMALL, FLOAT32, BOTH),
    (4, 64, SMALL, BFLOAT16, POLICY),
)
FULL = (
    *DEFAULT,
    (4, 64, SMALL, BFLOAT16, ("kl",)),
    (4, 64, QWEN, FLOAT32, BOTH),
    (4, 64, QWEN, BFLOAT16, POLICY),
    (4, 64, LLAMA3, BFLOAT16, POLICY),
    (4, 64, LLAMA2, FLOAT32, POLICY),
)
GPU = (
    (32, 256, (4096, 151936), BFLOAT16, BOTH),
    (32, 256, LLAMA3, BFLOAT16, BOTH),
    (16, 256, QWEN, BFLOAT16, BOTH),
)


def cases(device_type: str, size: str) -> list[Case]:
    shapes = {"smoke": SMOKE, "default": DEFAULT, "full": FULL}[size]
    shapes = GPU if device_type == "cuda" and size != "smoke" else shapes
    return [
        Case(f"{b * t}x{width}x{vocab}", (b, t, width, vocab), dtype, variant)
        for b, t, (width, vocab), dtypes, variants in shapes
        for dtype in dtypes
        for variant in variants
    ]


def inputs(case: Case, device: torch.device) -> SimpleNamespace:
    """Logits of variance 1, and a reference not far from the policy. Sequences are of one length."""
    b, t, width, vocab = case.dims

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=case.dtype).mul_(scale)

    hidden, weight = normal(b * t, width), normal(vocab, width, scale=width**-0.5)
    ref_hidden, ref_weight = 0.1 * normal(b * t, width) + hidden, normal(vocab, width, scale=0.1 * width**-0.5) + weight
    actions = torch.randint(0, vocab, (b * t,), device=device)
    exact_kl = case.variant == "kl"
    reference = {"ref_hidden": ref_hidden, "ref_weight": ref_weight}
    if not exact_kl:
        reference = {"ref_logprobs": linear_token_stats(ref_hidden, ref_weight, actions, backend="reference").logprobs}
    return SimpleNamespace(
        shape=(b, t),
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        actions=actions,
        rewards=torch.randn(b * t, device=device),
        values=torch.randn(b * t, device=device, requires_grad=True),
        cu_seqlens=torch.arange(0, b * t + 1, t, device=device),
        kl_coef=KL_COEF if exact_kl else 0.0,
        reference=reference,
    )


def _one(x: SimpleNamespace) -> torch.Tensor:
    return torch.ones((), device=x.hidden.device)


def _phases(forward, x: SimpleNamespace) -> Phases:
    return differentiated(forward, {"hidden": x.hidden, "weight": x.weight, "values": x.values}, {"loss": _one(x)})


def _other_loss(name: str, loss, x: SimpleNamespace) -> Phases:
    """A loss of the same hidden states and head that is not ours; its gradients are called by its name, so not compared."""
    wrt = {f"{name}_hidden": x.hidden, f"{name}_weight": x.weight}
    return differentiated(lambda: {name: loss()}, wrt, {name: _one(x)})


def _ours(x: SimpleNamespace, backend: str) -> Phases:
    options = {"cu_seqlens": x.cu_seqlens, "beta": BETA, "is_cap": CAP, "kl_coef": x.kl_coef, "backend": backend}

    def forward():
        output = linear_soft_bellman_loss(x.hidden, x.weight, x.actions, x.rewards, x.values, **x.reference, **options)
        fields = {name: field for name, field in output._asdict().items() if field is not None}
        return fields | {"cross_entropy": -output.logprobs.mean()}  # what those peers are checked with that give it

    return _phases(forward, x)


def eager(hidden, weight, ref_logprobs, actions, rewards, values, shape: tuple[int, int]):
    logprobs = F.linear(hidden, weight).float().log_softmax(-1).gather(-1, actions[:, None])[:, 0]
    return bellman_loss((logprobs - ref_logprobs).view(shape), rewards.view(shape), values.view(shape))


def eager_kl(hidden, weight, ref_hidden, ref_weight, actions, rewards, values, shape: tuple[int, int]):
    with torch.no_grad():
        ref_logits = F.linear(ref_hidden, ref_weight)
    return eager_of_logits(F.linear(hidden, weight), ref_logits, actions, rewards, values, KL_COEF, shape)


def _torch(x: SimpleNamespace, of=lambda function: function) -> Phases:
    function = of(eager_kl if x.kl_coef else eager)
    tensors = (x.hidden, x.weight, *x.reference.values(), x.actions, x.rewards, x.values)
    return _phases(lambda: {"loss": function(*tensors, x.shape)}, x)


def _trl_chunked(x: SimpleNamespace) -> Phases:
    def forward():
        delta = peers.trl_chunked_logprobs(x.hidden, x.weight, x.actions) - x.reference["ref_logprobs"]
        loss = bellman_loss(delta.view(x.shape), x.rewards.view(x.shape), x.values.view(x.shape))
        return {"loss": loss}

    return _phases(forward, x)


def _torch_cross_entropy(x: SimpleNamespace) -> Phases:
    rows = max(1, WORKSPACE_BYTES[x.hidden.device.type] // (4 * x.weight.shape[0]))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return _other_loss(
        "cross_entropy", lambda: F.linear_cross_entropy(x.hidden, x.weight, x.actions, options=options), x
    )


def _cross_entropy(function):
    return lambda x: _other_loss("cross_entropy", lambda: function(x.hidden, x.weight, x.actions), x)


def _liger_grpo(x: SimpleNamespace) -> Phases:
    loss, advantages = peers.liger_chunked_grpo(x.hidden.device.type, x.shape[0]), x.rewards.view(x.shape).mean(1)
    mask, actions = torch.ones(x.shape, device=x.hidden.device), x.actions.view(x.shape)
    return _other_loss("grpo", lambda: loss(x.hidden.view(*x.shape, -1), x.weight, actions, mask, advantages)[0], x)


def _gemms(x: SimpleNamespace, fresh: bool = False) -> Phases:
    """The matrix products that any of these must do. Their results are left in the buffers: there is nothing to check. `fresh`
    gradients cost page faults on a CPU, as everybody's do who returns them."""
    hidden, weight = x.hidden.detach(), x.weight.detach()
    second = x.reference if x.kl_coef else None
    z, grad_hidden, grad_weight = hidden @ weight.t(), torch.empty_like(hidden), torch.empty_like(weight)
    ref_z = torch.empty_like(z) if second else None

    def forward():
        torch.mm(hidden, weight.t(), out=z)
        if second:
            torch.mm(second["ref_hidden"], second["ref_weight"].t(), out=ref_z)
        return {}

    def backward(_):
        if fresh:
            return {"product_hidden": z @ weight, "product_weight": z.t() @ hidden}
        torch.mm(z, weight, out=grad_hidden)
        torch.mm(z.t(), hidden, out=grad_weight)
        return {}

    return Phases(forward, backward)


def _policy(case: Case) -> bool:
    return case.variant == "policy"


def _liger_grpo_reason(case: Case, device_type: str) -> str | None:
    if device_type == "cpu" and case.dims[-1] > 100_000:
        return "a call takes half a minute on a CPU"
    return peers.needs("liger_kernel")(case, device_type)


WORKSPACES = ", ".join(f"{count >> 20} MiB ({device})" for device, count in WORKSPACE_BYTES.items())
CANDIDATES = [
    Candidate(GEMMS, "the matrix products alone", _gemms),
    Candidate(f"{GEMMS}, fresh", "the same, their gradients in fresh memory", lambda x: _gemms(x, fresh=True)),
    *peers.ours(_ours, DISPATCHED, f"everything; logits in a workspace of {WORKSPACES}"),
    Candidate("eager", "the loss only; all logits, rounded to the inputs' dtype", _torch),
    Candidate("torch.compile", "as eager", lambda x: _torch(x, peers.compiled), peers.compile_reason()),
    Candidate(
        "trl chunked",
        "the loss only, eagerly from its chunked log-probabilities, of logits rounded to the inputs' dtype",
        _trl_chunked,
        peers.trl_chunked_reason,
        suits=_policy,
    ),
    Candidate(
        "F.linear_cross_entropy",
        "cross-entropy alone: one coefficient for all rows, known beforehand; chunks as large as our workspace",
        _torch_cross_entropy,
        peers.linear_cross_entropy_reason,
        suits=_policy,
    ),
    Candidate(
        "cut cross-entropy",
        "cross-entropy alone; torch.compile of all logits on the CPU, Triton that drops tiny gradients on a GPU",
        _cross_entropy(peers.cut_cross_entropy),
        peers.cut_cross_entropy_reason,
        suits=_policy,
    ),
    Candidate(
        "liger cross-entropy",
        "cross-entropy alone; its gradient in the forward",
        _cross_entropy(peers.liger_linear_cross_entropy),
        peers.needs("liger_kernel"),
        devices=("cuda",),
        suits=_policy,
    ),
    Candidate(
        "liger grpo",
        "GRPO's loss of one model without a reference, all sequences in one chunk; its gradient in the forward, also unasked",
        _liger_grpo,
        _liger_grpo_reason,
        suits=_policy,
    ),
]


def _flops(factor: int):
    return f"{factor}*N*D*V", lambda case: factor * case.dims[0] * case.dims[1] * case.dims[2] * case.dims[3]


OPERATION = Operation(
    "linear_soft_bellman_loss",
    cases,
    inputs,
    CANDIDATES,
    {"forward policy": _flops(2), "forward kl": _flops(4), "both policy": _flops(6), "both kl": _flops(8)},
    DISPATCHED,
    tolerance=lambda case: 1e-4 if case.dtype == torch.float32 else 1e-2,
    rough={"eager": 0.1, "torch.compile": 0.1, "trl chunked": 0.1},  # importance weights amplify what rounds a logit
    unit=FLOPS,
    modes=("forward", "both"),
)


@parametrize(OPERATION)
def bench_linear_soft_bellman_loss(run, case, mode, implementation):
    run(OPERATION, case, mode, implementation)
