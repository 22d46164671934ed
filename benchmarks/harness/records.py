"""What a test and a row of a results file are named by, and what a row keeps of a measurement."""

from __future__ import annotations

import statistics

import pytest
import torch

from benchmarks.harness import environment
from benchmarks.harness.peers import default_backend
from benchmarks.harness.timing import Case, Operation, modes
from benchmarks.harness.units import COPY


def names(operation: Operation, case: Case, device_type: str) -> list[str]:
    """The copy, where it is the ceiling, and the operation's candidates that this case is for."""
    copy = [COPY] if operation.unit.ceiling == COPY else []
    return copy + [c.name for c in operation.candidates if device_type in c.devices and c.suits(case)]


def parametrize(operation: Operation):
    """Every (case, mode, implementation) on this machine's device; the tests of a case are neighbours."""
    device_type, size = environment.device().type, environment.size()
    parameters = [
        pytest.param(case, mode, name, id=f"{case}-{mode}-{name}".replace(", ", "_").replace(" ", "_"))
        for case in operation.cases(device_type, size)
        for mode in modes(operation, case, device_type)
        for name in names(operation, case, device_type)
        if not (name == COPY and mode != "forward")
    ]
    return pytest.mark.parametrize("case, mode, implementation", parameters)


def entry(operation: Operation, case: Case, implementation: str, device: torch.device, record: dict) -> dict:
    """A row of a results file. `record` is one of harness.measure's."""
    seconds = record["seconds"]
    stats = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "rounds": len(seconds)}
    return {"extra_info": extra_info(operation, case, implementation, device, record), "stats": stats}


def extra_info(operation: Operation, case: Case, implementation: str, device: torch.device, record: dict) -> dict:
    identity = {
        "operation": operation.name,
        "shape": case.shape,
        "dtype": case.dtype_name,
        "variant": case.variant,
        "implementation": implementation,
        "default": implementation == default_backend(operation.dispatched, device.type),
        "device": environment.device_name(device),
        "torch": environment.version("torch"),
        "triton": environment.version("triton"),
    }
    return identity | {key: value for key, value in record.items() if key != "seconds"}
