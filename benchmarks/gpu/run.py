"""The GPU part of the results: correctness first, then every operation; one results file named after the device.

    python -m benchmarks.gpu                (under ten minutes a call; --profile for ncu; DQO_BENCH=smoke for a quick look)

Its parts, in this order: the tests marked gpu; every operation on small inputs; the benchmarks, case by case; the small inputs
under the tools of compute-sanitizer; with --profile a look at each operation with ncu. What a part found is written as
soon as it is there. Run again on the same sources it goes on where it stopped: a part that has a result is not repeated, one that
ran out of time is. A test or a small case that fails stops it; an error that a sanitizer reports does not, but the exit status
tells. Tools that are missing or do not work on this device are recorded with the reason.

Then `python -m benchmarks.report` writes RESULTS.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.gpu import tools
from benchmarks.harness import environment, gpu_clock
from benchmarks.harness.records import entry, names
from benchmarks.harness.timing import FAILED, Budget, Case, Operation, measure
from benchmarks.kernels import (
    bench_lambda_return,
    bench_linear_soft_bellman_loss,
    bench_soft_bellman,
    bench_soft_bellman_loss,
    bench_token_stats,
)
from benchmarks.trainer import bench_train_step

ROOT = Path(__file__).parents[2]
OPERATIONS = [
    module.OPERATION
    for module in (
        bench_token_stats,
        bench_soft_bellman,
        bench_lambda_return,
        bench_soft_bellman_loss,
        bench_linear_soft_bellman_loss,
        bench_train_step,
    )
]
BUDGET = Budget(min_rounds=5, max_time=0.1)
TESTS, SMALL_CASES = "tests marked gpu", "small cases"
MUST_PASS = (TESTS, SMALL_CASES)  # else nothing is measured
NOT_PROFILED = ("train_step",)  # thousands of kernels, few of them ours


class Clock:
    """What is left of the time that a call may take."""

    def __init__(self, minutes: float):
        self.minutes, self.end = minutes, time.monotonic() + 60 * minutes

    def left(self, part: str) -> float:
        """Seconds for `part`; exits when there are none."""
        seconds = self.end - time.monotonic()
        if seconds <= 0:
            sys.exit(f"benchmarks.gpu: {self.minutes:g} minutes are over before {part}; run it again to go on")
        return seconds


class Results:
    """The results file: a dict that is written after every part."""

    def __init__(self, path: Path, device: torch.device):
        """Goes on with the file if it is of these sources, versions and size."""
        head = environment.describe(device) | {"sources": environment.sources(), "command": "python -m benchmarks.gpu"}
        fresh = {"checks": {}, "profile": {}, "not_finished": {}, "parts": {}, "left_out": {}, "benchmarks": []}
        self.path, self.all = path, head | fresh
        if not path.exists():
            return
        found = json.loads(path.read_text())
        if any(found.get(key) != head[key] for key in ("device", "sources", "versions", "size")):
            return
        self.all = found
        for group in ("checks", "profile"):  # a tool may have been installed since
            found[group] = {name: r for name, r in found[group].items() if r["outcome"] != "missing"}
        if found["checks"].get(TESTS, {}).get("sources") != environment.sources(environment.TESTS):
            found["checks"].pop(TESTS, None)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.all, indent=1) + "\n")
        partial.replace(self.path)


def checks() -> dict[str, Callable[[float], dict]]:
    """What is run of seconds and gives a record, in its order."""

    def tests(seconds: float) -> dict:
        return tools.run_tests(seconds) | {"sources": environment.sources(environment.TESTS)}

    sanitizers = {f"sanitizer {tool}": functools.partial(tools.run_sanitizer, tool) for tool in tools.SANITIZERS}
    return {TESTS: tests, SMALL_CASES: tools.run_small_cases} | sanitizers


def profiles(device_type: str) -> Iterator[tuple[str, Callable[[float], dict]]]:
    """The same for each operation and native backend."""
    for operation in OPERATIONS:
        for candidate in operation.candidates if operation.name not in NOT_PROFILED else ():
            if candidate.backend in (None, "reference") or device_type not in candidate.devices:
                continue
            yield (
                f"{operation.name} {candidate.backend}",
                functools.partial(tools.run_ncu, operation.name, candidate.backend),
            )


def run_check(group: str, name: str, check: Callable[[float], dict], results: Results, clock: Clock) -> None:
    """One of `checks` or `profiles`; exits when it does not finish."""
    if name in results.all[group]:
        return
    seconds, start = clock.left(name), time.perf_counter()
    print(name, flush=True)
    try:
        record = check(seconds)
    except tools.Unfinished as reason:
        results.all["not_finished"][name] = str(reason).splitlines()[0]
        results.save()
        sys.exit(f"benchmarks.gpu: {name}: {reason}\nWhat was found before is kept; run it again to go on.")
    results.all["not_finished"].pop(name, None)
    results.all[group][name] = record | {"run_seconds": round(time.perf_counter() - start, 1)}
    results.save()
    print("\n".join([f"  {record['outcome']} {record.get('detail', '')}", *record.get("output", ())]), flush=True)


def stop_if_failed(name: str, results: Results) -> None:
    record = results.all["checks"][name]
    if name in MUST_PASS and record["outcome"] == "failed":
        failures = record.get("failures") or [record["detail"]]
        sys.exit("\n  ".join([f"benchmarks.gpu: {name} failed, so nothing is measured ({results.path}):", *failures]))


def run_case(operation: Operation, case: Case, device: torch.device, results: dict, budget: Budget) -> None:
    """Measures one case and adds it to `results`."""
    part, start = f"{operation.name} {case}", time.perf_counter()
    measured = measure(operation, case, device, names(operation, case, device.type), budget)
    for name, found in measured.items():
        if isinstance(found, str):
            results["left_out"].setdefault(part, {})[name] = found
            continue
        for record in found.values():
            results["benchmarks"].append(entry(operation, case, name, device, record))
            if record["mode"] == "both":
                print(f"  {name:20s} {1e3 * results['benchmarks'][-1]['stats']['median']:10.3f} ms", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()  # an error that came late belongs to this part
        torch.cuda.empty_cache()
    results["parts"][part] = round(time.perf_counter() - start, 1)


def run_benchmarks(device: torch.device, results: Results, clock: Clock, only: str | None = None) -> None:
    for operation in OPERATIONS:
        if only not in (None, operation.name):
            continue
        for case in operation.cases(device.type, environment.size()):
            part = f"{operation.name} {case}"
            if part in results.all["parts"]:
                continue
            clock.left(part)
            print(part, flush=True)
            before = len(results.all["benchmarks"])
            try:
                run_case(operation, case, device, results.all, BUDGET)
            except RuntimeError as error:  # after a CUDA error nothing else runs in this process
                del results.all["benchmarks"][before:]
                results.all["left_out"][part] = {"all": f"{FAILED}: {(str(error).splitlines() or [''])[0]}"}
                results.all["parts"][part] = None
                results.save()
                sys.exit(f"benchmarks.gpu: {part}: {error}\nThe other parts are kept; run it again to go on after it.")
            results.save()
            if found := next(
                (b["extra_info"]["note"] for b in results.all["benchmarks"][before:] if no_graph(b)), None
            ):
                sys.exit(
                    f"benchmarks.gpu: {part}: {found}\nNothing random can be made here after that; run it again to go on."
                )


def no_graph(benchmark: dict) -> bool:
    return (benchmark["extra_info"]["note"] or "").startswith(gpu_clock.NO_GRAPH)


def broken(results: dict) -> list[str]:
    """What a reader of the exit status must hear of."""
    found = [f"{name}: {r.get('detail', '')}" for name, r in results["checks"].items() if r["outcome"] == "failed"]
    for part, left in results["left_out"].items():
        found += [f"{part}: {who}: {why}" for who, why in left.items() if why.startswith(FAILED)]
    return found


def the_device() -> torch.device:
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: torch.cuda.is_available() is False: no GPU, no driver, or a torch without CUDA")
    return torch.device("cuda")


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no further part after this long")
    parser.add_argument("--only", choices=[operation.name for operation in OPERATIONS], help="of the benchmarks")
    parser.add_argument("--profile", action="store_true", help="look at each operation with ncu, after the benchmarks")
    arguments = parser.parse_args(given)
    device, clock = the_device(), Clock(arguments.minutes)
    name = re.sub(r"[^a-z0-9]+", "-", environment.device_name(device).lower()).strip("-")
    results = Results(arguments.directory / f"{name}.json", device)
    for name in MUST_PASS:
        run_check("checks", name, checks()[name], results, clock)
        stop_if_failed(name, results)
    run_benchmarks(device, results, clock, arguments.only)
    for name, check in checks().items():  # those that are left take minutes, and no figure depends on them
        run_check("checks", name, check, results, clock)
    for name, profile in profiles(device.type) if arguments.profile else ():
        run_check("profile", name, profile, results, clock)
    print(f"{results.path}: {len(results.all['benchmarks'])} figures; now `python -m benchmarks.report`")
    if found := broken(results.all):
        sys.exit("\n".join(found))
