"""python -m dqo_kernels: which backends can run here, why the others cannot, and a self-check of each against float64."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from dqo_kernels import lambda_return, linear_row_loss, soft_bellman, soft_bellman_loss, token_stats
from dqo_kernels.core import dispatch

VALUE_BOUND = 2e-6  # |error| <= VALUE_BOUND * (1 + |value|); docs/verification.md
GRADIENT_BOUND = 2e-5  # of the largest entry of the gradient


def devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # imported from a directory
        return "(not installed)"


def describe() -> Iterator[str]:
    packages = ("dqo", "torch", "triton")
    yield ", ".join(f"{name} {_version(name)}" for name in packages if importlib.util.find_spec(name))
    if dispatch._cpu is not None:
        from dqo_kernels.core.cpu_threads import POOL

        others = [name for name in dispatch._cpu.instruction_sets() if name != dispatch._cpu.instruction_set()]
        threads = f"torch's own ({POOL.name})" if POOL else "started for each call"
        yield f"cpp: {dispatch._cpu.instruction_set()} (can also: {', '.join(others) or 'none'}); threads: {threads}"
    for device in devices():
        name = f" ({torch.cuda.get_device_name()})" if device == "cuda" else f" ({torch.get_num_threads()} threads)"
        yield f"\n{device}{name}: the backend that runs by itself comes first"
        for op, table in dispatch.TABLE.items():
            runs = [backend for backend in table[device] if dispatch.unavailable(backend, device) is None]
            yield f"  {op:<20} {', '.join(runs)}"
        for backend in dispatch.BACKENDS:
            if not any(
                backend in ops for ops in (ONE_PASS[device], *(table[device] for table in dispatch.TABLE.values()))
            ):
                yield f"  without {backend}: it does not run on {device}"
            elif reason := dispatch.unavailable(backend, device):
                yield f"  without {backend}: {reason}"
    if "cuda" not in devices():
        yield f"\ncuda: torch finds no device; of dqo_kernels._cuda: {dispatch.unavailable('cuda', 'cuda') or 'it does'}"


def _inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    n, vocab = 37, 5003
    made = {
        "logits": 4 * torch.randn(n, vocab, generator=rng),
        "ref_logits": 4 * torch.randn(n, vocab, generator=rng),
        "hidden": torch.randn(n, 8, generator=rng),
        "weight": torch.randn(vocab, 8, generator=rng),
        "logprobs": -torch.rand(n, generator=rng),
        "ref_logprobs": -torch.rand(n, generator=rng),
        "rewards": torch.randn(n, generator=rng),
        "values": torch.randn(n, generator=rng),
    }
    made = {name: x.to(device, dtype).requires_grad_(not name.startswith("ref")) for name, x in made.items()}
    made["actions"] = torch.randint(vocab, (n,), generator=rng).to(device)
    made["cu_seqlens"] = torch.tensor([0, 5, 5, 30, n], device=device)
    return made


def _token_stats(x, backend):
    stats = token_stats(x["logits"], x["actions"], x["ref_logits"], temperature=0.8, backend=backend)
    assert stats.kl is not None  # there is a reference
    loss = (stats.logprobs + 0.3 * stats.lse - 0.2 * stats.entropy + 0.1 * stats.kl).sum()
    return list(stats), loss, [x["logits"]]


def _lambda_return(x, backend):
    returns = lambda_return(x["rewards"], x["values"], x["cu_seqlens"], gamma=0.99, lam=0.9, backend=backend)
    return [returns], returns.square().sum(), [x["rewards"], x["values"]]


def _soft_bellman(x, backend):
    inputs = (x["logprobs"], x["ref_logprobs"], x["rewards"], x["values"], x["cu_seqlens"])
    terms = soft_bellman(*inputs, lam=0.9, target="residual", is_level="suffix", backend=backend)
    return list(terms), terms.policy_loss, [x["logprobs"], x["values"]]


def _soft_bellman_loss(x, backend):
    inputs = (x["logits"], x["actions"], x["rewards"], x["values"])
    options = {"cu_seqlens": x["cu_seqlens"], "kl_coef": 0.1, "lam": 0.9, "backend": backend}
    out = soft_bellman_loss(*inputs, ref_logits=x["ref_logits"], **options)
    return [y for y in out if y is not None], out.loss, [x["logits"], x["values"]]


def _linear_row_loss(x, backend):
    def row_loss(stats, rows, cu_seqlens):
        loss = (stats.logprobs * rows["rewards"]).sum() + 0.3 * stats.lse.sum() - 0.2 * stats.entropy.sum()
        return loss, {name: getattr(stats, name).mean() for name in ("logprobs", "lse", "entropy")}

    inputs, rows = (x["hidden"], x["weight"], x["actions"]), {"rewards": x["rewards"]}
    options = {"workspace_bytes": 2**19, "backend": backend}  # a few sequences at a time
    loss, sums = linear_row_loss(*inputs, row_loss, x["cu_seqlens"], rows=rows, **options)
    return list(sums.values()), loss, [x["hidden"], x["weight"]]


def _one_pass(x, backend):
    inputs = (x["logits"], x["actions"], x["rewards"], x["values"])
    options = {"cu_seqlens": x["cu_seqlens"], "kl_coef": 0.1, "lam": 0.9, "is_level": "suffix", "backend": backend}
    out = soft_bellman_loss(*inputs, ref_logits=x["ref_logits"], **options)
    return [y for y in out if y is not None], out.loss, [x["logits"], x["values"]]


ONE_PASS = {"cpu": (), "cuda": (dispatch.ONE_PASS,)}  # where it can run, when it is asked for
CHECKS = {
    "token_stats": _token_stats,
    "lambda_return": _lambda_return,
    "soft_bellman": _soft_bellman,
    "soft_bellman_loss": _soft_bellman_loss,
    "linear_row_loss": _linear_row_loss,
    "one pass": _one_pass,
}


def backends(name: str, device: str) -> list[str]:
    """Those that a check runs on a device, whether they can there or not."""
    if name == "one pass":
        return list(ONE_PASS[device])
    return list(dispatch.TABLE[name if name in dispatch.TABLE else "token_stats"][device])


def self_check(name: str, backend: str, device: str) -> tuple[float, float]:
    """Largest errors of values and gradients against the reference in float64 on the same numbers, as shares of their bounds."""
    inputs = _inputs(torch.float32, torch.device(device))
    exact = {
        key: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for key, x in inputs.items()
    }
    results = []
    for x, chosen in ((inputs, backend), (exact, "reference")):
        values, loss, live = CHECKS[name](x, chosen)
        results.append(([v.detach().double() for v in values], [g.double() for g in torch.autograd.grad(loss, live)]))
    (values, gradients), (want_values, want_gradients) = results
    value_error = max(((v - w).abs() / (1 + w.abs())).max().item() for v, w in zip(values, want_values))
    gradient_error = max(((g - w).abs().max() / w.abs().max()).item() for g, w in zip(gradients, want_gradients))
    return value_error / VALUE_BOUND, gradient_error / GRADIENT_BOUND


def verdict(name: str, backend: str, device: str) -> tuple[bool, str]:
    try:
        errors = self_check(name, backend, device)
    except Exception as error:  # a kernel that cannot even run is a finding; the other checks go on
        return False, f"{type(error).__name__}: {error}"
    return all(error <= 1 for error in errors), " / ".join(f"{error:.2f}" for error in errors)  # NaN is not <= 1


def main() -> int:
    for line in describe():
        print(line)
    print("\nself-check against float64: largest error as a share of its bound, values / gradients")
    failed = 0
    for device in devices():
        for name in CHECKS:
            for backend in backends(name, device):
                if dispatch.unavailable(backend, device) is None:
                    good, found = verdict(name, backend, device)
                    failed += not good
                    print(f"  {name:<20} {device:<5} {backend:<13} {found}  {'ok' if good else 'FAILED'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
