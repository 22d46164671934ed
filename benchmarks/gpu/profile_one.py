"""One forward and backward of one of our backends, for a profiler that is told where to look.

    ncu --profile-from-start off python -m benchmarks.gpu.profile_one token_stats triton

`python -m benchmarks.gpu --profile` runs it for each operation. Everything before the call that counts (inputs, compilation) is
outside of what is profiled.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.gpu.run import OPERATIONS
from benchmarks.harness import environment
from benchmarks.harness.timing import Candidate, Case, Operation


def case_of(operation: Operation, candidate: Candidate, device_type: str, size: str) -> Case:
    """The first with the KL of two models that the candidate is for, else the first."""
    cases = [case for case in operation.cases(device_type, size) if candidate.suits(case)]
    return next((case for case in cases if case.variant.startswith("kl")), cases[0])


def main() -> None:
    operations = {operation.name: operation for operation in OPERATIONS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operation", choices=operations)
    parser.add_argument("backend")
    arguments = parser.parse_args()
    operation = operations[arguments.operation]
    candidate = next(c for c in operation.candidates if c.backend == arguments.backend)
    case = case_of(operation, candidate, "cuda", environment.size())
    phases = candidate.build(operation.inputs(case, torch.device("cuda")))
    for _ in range(2):  # the first compiles
        phases.backward(phases.forward())
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    phases.backward(phases.forward())
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
