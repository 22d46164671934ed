"""One forward and backward of one of our backends, for a profiler that is told where to look.

    ncu --profile-from-start off python -m benchmarks.gpu_profile token_stats triton

`python -m benchmarks.gpu --profile` runs it for each operation. Everything before the call that counts (inputs, compilation) is
outside of what is profiled.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import environment
from benchmarks.gpu import OPERATIONS
from benchmarks.harness import Case, Operation


def case_of(operation: Operation, device_type: str, size: str) -> Case:
    """The first with two models, else the first."""
    cases = operation.cases(device_type, size)
    return next((case for case in cases if case.variant == "kl"), cases[0])


def main() -> None:
    operations = {operation.name: operation for operation in OPERATIONS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operation", choices=operations)
    parser.add_argument("backend")
    arguments = parser.parse_args()
    operation = operations[arguments.operation]
    build = next(c.build for c in operation.candidates if c.backend == arguments.backend)
    phases = build(operation.inputs(case_of(operation, "cuda", environment.size()), torch.device("cuda")))
    for _ in range(2):  # the first compiles
        phases.backward(phases.forward())
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    phases.backward(phases.forward())
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
