"""Runs the cases under pytest-benchmark: the candidates of a case are measured together, each test reports its own part."""

from __future__ import annotations

import pytest

from benchmarks.harness import environment
from benchmarks.harness.records import extra_info
from benchmarks.harness.timing import FAILED, Budget, Case, Operation, measure


class Replay:
    """A timer that reads out measured durations, so that pytest-benchmark's table shows the interleaved rounds."""

    def __init__(self):
        self.readings: list[float] = []

    def load(self, seconds: list[float]) -> None:
        self.readings = [reading for duration in reversed(seconds) for reading in (duration, 0.0)]

    def __call__(self) -> float:
        return self.readings.pop() if self.readings else 0.0


replay = Replay()
measured: dict[tuple[str, Case], dict] = {}  # of the latest case
left_out: dict[str, dict[str, str]] = {}  # {case: {implementation: reason}}


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if "implementation" in _parameters(item):
            item.add_marker(pytest.mark.benchmark(timer=replay))


def _parameters(item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _wanted(request, case: Case) -> set[str]:
    """The candidates of this case that the command line selects."""
    of_module = [_parameters(item) for item in request.session.items if item.module is request.module]
    return {parameters["implementation"] for parameters in of_module if parameters.get("case") == case}


def _budget(config) -> Budget:
    """pytest-benchmark's own flags; a smoke run asks whether it runs, not how fast."""
    rounds, seconds = int(config.getoption("benchmark_min_rounds")), float(config.getoption("benchmark_max_time"))
    return Budget(rounds, min(seconds, 0.1) if environment.size() == "smoke" else seconds)


@pytest.fixture
def run(benchmark, request):
    """run(operation, case, mode, implementation): reports a measurement, skips with the reason, or fails."""

    def report(operation: Operation, case: Case, mode: str, implementation: str) -> None:
        device, key = environment.device(), (operation.name, case)
        if key not in measured:
            measured.clear()
            try:
                measured[key] = measure(operation, case, device, _wanted(request, case), _budget(request.config))
            except Exception as error:  # of all candidates: the case's other tests need not try again
                measured[key] = dict.fromkeys(_wanted(request, case), f"{FAILED}: {type(error).__name__}: {error}")
                raise
        found = measured[key][implementation]
        if isinstance(found, str):
            left_out.setdefault(f"{operation.name} {case}", {})[implementation] = found
            (pytest.fail if found.startswith(FAILED) else pytest.skip)(found)
        if mode not in found:
            pytest.skip(f"it has no {mode}; {found['forward']['note'] or ''}")
        benchmark.group = f"{operation.name} {case} {mode}"
        benchmark.extra_info = extra_info(operation, case, implementation, device, found[mode])
        benchmark.extra_info |= {"commit": environment.commit(), "date": environment.today()}
        seconds = found[mode]["seconds"]
        replay.load(seconds)
        benchmark.pedantic(lambda: None, rounds=len(seconds))

    return report


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, output_json) -> None:
    """A results file holds what the report reads, and of the machine only what the report says."""
    entries = [
        {"extra_info": b["extra_info"], "stats": {k: b["stats"][k] for k in ("median", "min", "max", "rounds")}}
        for b in output_json["benchmarks"]
    ]
    output_json.clear()
    output_json.update(environment.describe(environment.device()))
    output_json.update(command=" ".join(["pytest", *config.invocation_params.args]))
    output_json.update(left_out=left_out, benchmarks=entries)
