"""soft_bellman_loss, from two models' logits to the loss and its gradient, beside eager torch, torch.compile and Liger.

    pytest benchmarks/kernels/bench_soft_bellman_loss.py --benchmark-only

Variants: "policy" is the paper's loss, "given" has the reference's log-probabilities in place of its logits, "kl" adds the exact
KL. With "suffix" the importance weights are those of the rest of the response, which one pass over the logits can take. Ours also
returns log-probabilities, logsumexp, entropy and KL of every row; the torch compositions compute the loss and nothing else.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from benchmarks.harness import peers
from benchmarks.harness.records import parametrize
from benchmarks.harness.timing import Candidate, Case, Operation, Phases, differentiated
from dqo_kernels import soft_bellman_loss, token_stats
from dqo_kernels.core import dispatch

DISPATCHED = ("token_stats", "soft_bellman")
BETA, CAP, KL_COEF = 0.1, 1.0, 0.05
GIVEN, KL = "given, suffix", "kl, suffix"  # the variants of the one-pass kernel
SMOKE = ((4, 64, 4096, torch.float32, ("policy", GIVEN)),)
DEFAULT = ((4, 64, 4096, torch.float32, ("policy",)), (4, 64, 32000, torch.float32, ("policy", "kl")))
FULL = (
    *DEFAULT,
    (8, 128, 32000, torch.float32, ("policy", "kl")),
    (4, 64, 151936, torch.bfloat16, ("policy", "kl")),
)
GPU = ((32, 256, 151936, torch.bfloat16, ("policy", "kl", GIVEN, KL)), (8, 128, 128256, torch.bfloat16, ("policy",)))


def cases(device_type: str, size: str) -> list[Case]:
    shapes = {"smoke": SMOKE, "default": DEFAULT, "full": FULL}[size]
    shapes = GPU if device_type == "cuda" and size != "smoke" else shapes
    return [
        Case(f"{b}x{t}x{vocab}", (b, t, vocab), dtype, variant)
        for b, t, vocab, dtype, variants in shapes
        for variant in variants
    ]


def inputs(case: Case, device: torch.device) -> SimpleNamespace:
    b, t, vocab = case.dims
    logits = torch.randn(b * t, vocab, device=device, dtype=case.dtype)
    actions = torch.randint(0, vocab, (b * t,), device=device)
    reference = {"ref_logits": logits + 0.1 * torch.randn_like(logits)}
    if case.variant == GIVEN:
        stats = token_stats(reference["ref_logits"], actions, backend="reference")
        reference = {"ref_logprobs": stats.logprobs}
    return SimpleNamespace(
        shape=(b, t),
        reference=reference,
        logits=logits.requires_grad_(),
        actions=actions,
        rewards=torch.randn(b * t, device=device),
        values=torch.randn(b * t, device=device, requires_grad=True),
        cu_seqlens=torch.arange(0, b * t + 1, t, device=device),
        kl_coef=KL_COEF if case.variant.startswith("kl") else 0.0,
        is_level="suffix" if case.variant.endswith("suffix") else "trajectory",
        cotangents={"loss": torch.ones((), device=device)},
    )


def _phases(forward, x: SimpleNamespace) -> Phases:
    return differentiated(forward, {"logits": x.logits, "values": x.values}, x.cotangents)


def _ours(x: SimpleNamespace, backend: str) -> Phases:
    options = {**x.reference, "cu_seqlens": x.cu_seqlens, "beta": BETA, "is_cap": CAP, "is_level": x.is_level}

    def forward():
        output = soft_bellman_loss(
            x.logits, x.actions, x.rewards, x.values, kl_coef=x.kl_coef, backend=backend, **options
        )
        return {name: field for name, field in output._asdict().items() if field is not None}

    return _phases(forward, x)


def bellman_loss(delta, rewards, values, is_level: str = "trajectory"):
    """(B, T) each, delta = log(pi / pi_ref); gamma = lambda = 1, so that the return is a sum."""
    returns = (rewards - BETA * delta.detach()).flip(1).cumsum(1).flip(1)
    advantages = rewards + torch.nn.functional.pad(returns[:, 1:], (0, 1)) - values.detach()
    ratio = delta.detach()
    summed = ratio.sum(1, keepdim=True) if is_level == "trajectory" else ratio.flip(1).cumsum(1).flip(1)
    weights = summed.clamp(max=CAP).exp()
    rows = 0.5 * weights * ((BETA * delta - advantages).square() + (returns - values).square())
    return rows.mean()


def eager(
    logits, ref_logits, actions, rewards, values, kl_coef: float, shape: tuple[int, int], is_level: str = "trajectory"
):
    logp, picked = logits.float().log_softmax(-1), actions[:, None]
    with torch.no_grad():
        ref_logp = ref_logits.float().log_softmax(-1)
    delta = (logp.gather(-1, picked) - ref_logp.gather(-1, picked)).view(shape)
    loss = bellman_loss(delta, rewards.view(shape), values.view(shape), is_level)
    if kl_coef:
        loss = loss + kl_coef * (logp.exp() * (logp - ref_logp)).sum(-1).mean()
    return loss


def eager_given(
    logits, ref_logprobs, actions, rewards, values, kl_coef: float, shape: tuple[int, int], is_level: str = "trajectory"
):
    logprobs = logits.float().log_softmax(-1).gather(-1, actions[:, None])[:, 0]
    return bellman_loss((logprobs - ref_logprobs).view(shape), rewards.view(shape), values.view(shape), is_level)


def _torch(x: SimpleNamespace, of=lambda function: function) -> Phases:
    function = of(eager_given if "ref_logprobs" in x.reference else eager)
    tensors = (x.logits, *x.reference.values(), x.actions, x.rewards, x.values)
    return _phases(lambda: {"loss": function(*tensors, x.kl_coef, x.shape, x.is_level)}, x)


def _liger_grpo(x: SimpleNamespace) -> Phases:
    """Another loss: no reference logits are read. It wants T + 1 logits a sequence and overwrites them in its gradient."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    b, t = x.shape
    logits = torch.nn.functional.pad(x.logits.detach().view(b, t, -1), (0, 0, 0, 1)).requires_grad_()
    actions, advantages = x.actions.view(b, t), x.rewards.view(b, t).mean(1)
    reference = torch.zeros(b, t, device=logits.device)

    def forward():
        loss, *_ = triton_grpo_loss(
            logits, None, reference, actions, advantages, temperature=1.0, loss_type="grpo", reduce=True
        )
        return {"grpo_loss": loss}

    def backward(outputs):
        return {"grad_padded": torch.autograd.grad(outputs["grpo_loss"], logits)[0]}

    return Phases(forward, backward)


def _bytes(reads_and_writes: int):
    return lambda case: reads_and_writes * case.dims[0] * case.dims[1] * case.dims[2] * case.dtype.itemsize


CANDIDATES = [
    *peers.ours(_ours, DISPATCHED),
    Candidate(
        dispatch.ONE_PASS,
        "everything, reading the logits once",
        lambda x: _ours(x, dispatch.ONE_PASS),
        lambda case, device_type: dispatch.unavailable(dispatch.ONE_PASS, device_type),
        dispatch.ONE_PASS,
        ("cuda",),
        suits=lambda case: case.variant in (GIVEN, KL),
    ),
    Candidate("eager", "the loss only", _torch),
    Candidate("torch.compile", "the loss only", lambda x: _torch(x, peers.compiled), peers.compile_reason()),
    Candidate(
        "liger grpo",
        "GRPO's loss of one model",
        _liger_grpo,
        peers.needs("liger_kernel"),
        devices=("cuda",),
        suits=lambda case: case.variant in ("policy", GIVEN),
    ),
]

OPERATION = Operation(
    "soft_bellman_loss",
    cases,
    inputs,
    CANDIDATES,
    {
        "forward": ("2*N*V*E: read z, z_ref", _bytes(2)),
        f"forward {GIVEN}": ("N*V*E: read z", _bytes(1)),
        "backward": ("2*N*V*E: read z, write dz", _bytes(2)),
        "backward kl": ("3*N*V*E: read z, z_ref, write dz", _bytes(3)),
        f"backward {KL}": ("3*N*V*E: read z, z_ref, write dz", _bytes(3)),
        "both": ("3*N*V*E: read z, z_ref once, write dz", _bytes(3)),
        f"both {GIVEN}": ("2*N*V*E: read z once, write dz", _bytes(2)),
    },
    DISPATCHED,
    tolerance=lambda case: 1e-4 if case.dtype == torch.float32 else 1e-2,
)


@parametrize(OPERATION)
def bench_soft_bellman_loss(run, case, mode, implementation):
    run(OPERATION, case, mode, implementation)
