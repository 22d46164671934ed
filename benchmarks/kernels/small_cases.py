"""Every operation on small awkward inputs, forward and backward, on every native backend that can run: a smoke test by itself.

    python -m benchmarks.kernels.small_cases        (--device cpu, --backend triton)

Results and gradients are held to backend "reference" in float64 on the same numbers. `python -m benchmarks.gpu` runs it once
plainly and once under each tool of compute-sanitizer: numbers are made and compared on the CPU, so that the device runs little
beside our kernels. The backends are those that dispatch.TABLE lists.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from benchmarks.kernels.small_inputs import CASES, Made, SmallCase
from dqo_kernels.core import dispatch

COMPOSED = {"soft_bellman_loss": ("token_stats", "soft_bellman")}  # what is made of the table's operations
ASKED_FOR = {"soft_bellman_loss": (dispatch.ONE_PASS,)}  # what runs only when a call asks for it, and takes some cases
DTYPES = (torch.float32, torch.bfloat16)
GRADIENT_BOUNDS = {
    torch.float32: 2e-5,
    torch.bfloat16: 2**-7,
}  # of the largest entry; a gradient has its tensor's dtype
REFUSED = (
    "cannot run",
    "with backend=",
)  # in the error of a backend that does not take a case: that is no wrong result


def backends(operation: str, device_type: str) -> list[str]:
    """The native backends that the table lists for an operation on a device, and that can run."""
    listed = list(dispatch.TABLE.get(operation, {}).get(device_type, ()))
    if parts := COMPOSED.get(operation):
        of_parts = [dispatch.TABLE[part].get(device_type, ()) for part in parts]
        listed += [name for name in of_parts[0] if all(name in others for others in of_parts)]
    if "cuda" in listed:
        listed += ASKED_FOR.get(operation, ())
    names = [name for name in dict.fromkeys(listed) if name != "reference"]
    return [name for name in names if dispatch.unavailable(name, device_type) is None]


def _results(case: SmallCase, made: Made, backend: str) -> tuple[list[Tensor], list[Tensor]]:
    made = {name: x.detach().clone().requires_grad_(name in case.live) for name, x in made.items()}
    values, loss = case.run(made, backend)
    gradients = torch.autograd.grad(loss, [made[name] for name in case.live])
    return [x.detach().cpu().double() for x in values], [x.cpu().double() for x in gradients]


def _largest(errors: list[Tensor]) -> float:
    """NaN where there is one."""
    together = torch.cat([x.flatten() for x in errors])
    return together.max().item() if together.numel() else 0.0


def shares(case: SmallCase, dtype: torch.dtype, backend: str, device: torch.device) -> tuple[float, float]:
    """The largest errors of the results and of the gradients, as shares of their bounds."""
    exact = {name: x.double() if x.is_floating_point() else x for name, x in case.made.items()}
    want_values, want_gradients = _results(case, exact, "reference")
    values, gradients = _results(case, {name: x.to(device) for name, x in case.made.items()}, backend)
    off = [(v - w).abs() / (1 + w.abs()) for v, w in zip(values, want_values, strict=True)]
    steep = [(g - w).abs() / max(_largest([w.abs()]), 1e-30) for g, w in zip(gradients, want_gradients, strict=True)]
    return _largest(off) / case.value_bound, _largest(steep) / GRADIENT_BOUNDS[dtype]


def verdict(case: SmallCase, dtype: torch.dtype, backend: str, device: torch.device) -> tuple[str, str]:
    """ "ok", "FAILED" or "refused", and what was found."""
    try:
        found = shares(case, dtype, backend, device)
    except Exception as error:  # a kernel that breaks is a finding; the other cases go on
        refused = isinstance(error, NotImplementedError) or any(text in str(error) for text in REFUSED)
        return "refused" if refused else "FAILED", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    good = all(share <= 1 for share in found)  # NaN is not
    return "ok" if good else "FAILED", " / ".join(f"{share:.2f}" for share in found)


def check(device: torch.device, asked: str | None = None) -> dict[str, int]:
    """Runs and prints every case; the number of each verdict. An operation without cases, or without one that ran, FAILED."""
    counts = {"ok": 0, "FAILED": 0, "refused": 0}
    for operation in dict.fromkeys([*dispatch.TABLE, *COMPOSED]):
        if operation not in CASES:
            counts["FAILED"] += 1
            print(f"{operation}: no small case; add one to benchmarks/kernels/small_cases.py  FAILED")
            continue
        for backend in backends(operation, device.type):
            if asked not in (None, backend):
                continue
            ran = False
            for dtype in DTYPES:
                for case in CASES[operation](dtype):
                    word, found = verdict(case, dtype, backend, device)
                    counts[word] += 1
                    ran |= word != "refused"
                    name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
                    print(f"{operation:18s} {backend:13s} {name:42s} {found}  {word}", flush=True)
            if not ran:
                counts["FAILED"] += 1
                print(f"{operation:18s} {backend:13s} refused every case  FAILED")
    return counts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=dispatch.BACKENDS, help="only this one")
    asked = parser.parse_args(arguments)
    print("largest errors of results / gradients, as shares of their bounds")
    counts = check(torch.device(asked.device), asked.backend)
    print(f"small cases: {counts['ok']} agree, {counts['FAILED']} fail, {counts['refused']} refused")
    if not counts["ok"]:
        print("no native backend can run here")
    return 1 if counts["FAILED"] or not counts["ok"] else 0


if __name__ == "__main__":
    sys.exit(main())
