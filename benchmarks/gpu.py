"""The GPU part of the results: correctness first, then every operation; one results file named after the device.

    python -m benchmarks.gpu                (under ten minutes; DQO_BENCH=smoke for a quick look)

It stops when a test marked `gpu` fails. It writes after every case, and run again on the same sources it goes on where it
stopped. Then `python -m benchmarks.report` writes RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import (
    bench_lambda_return,
    bench_linear_soft_bellman_loss,
    bench_soft_bellman,
    bench_soft_bellman_loss,
    bench_token_stats,
    bench_train_step,
    environment,
)
from benchmarks.harness import FAILED, Budget, Case, Operation, measure
from benchmarks.records import entry, names

ROOT = Path(__file__).parent.parent
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
BUDGET = Budget(min_rounds=5, max_time=0.25)
NO_TESTS_COLLECTED = 5


def load(path: Path, device: torch.device) -> dict:
    """The results so far if they are of these sources, versions and size; else none."""
    head = environment.describe(device) | {"sources": environment.sources(), "command": "python -m benchmarks.gpu"}
    fresh = head | {"tests": None, "parts": {}, "left_out": {}, "benchmarks": []}
    if not path.exists():
        return fresh
    found = json.loads(path.read_text())
    same = all(found.get(key) == head[key] for key in ("device", "sources", "versions", "size"))
    return found if same else fresh


def save(path: Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def run_tests() -> str:
    """Runs the tests that need a GPU; exits when one fails."""
    print("tests marked gpu", flush=True)
    code = subprocess.run([sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-x", "-q"], cwd=ROOT).returncode
    if code == NO_TESTS_COLLECTED:
        return "none collected"
    if code != 0:
        sys.exit("benchmarks.gpu: the tests marked gpu fail, so nothing is measured")
    return "passed"


def run_part(operation: Operation, case: Case, device: torch.device, results: dict, budget: Budget = BUDGET) -> None:
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


def run(path: Path, device: torch.device, results: dict, minutes: float, only: str | None = None) -> None:
    start = time.perf_counter()
    for operation in OPERATIONS:
        if only not in (None, operation.name):
            continue
        for case in operation.cases(device.type, environment.size()):
            part = f"{operation.name} {case}"
            if part in results["parts"]:
                continue
            if time.perf_counter() - start > 60 * minutes:
                sys.exit(f"benchmarks.gpu: {minutes} minutes are over before {part}; run it again to go on")
            print(part, flush=True)
            try:
                run_part(operation, case, device, results)
            except RuntimeError as error:  # after a CUDA error nothing else runs in this process
                sys.exit(f"benchmarks.gpu: {part}: {error}\nThe parts before it are kept; run it again to go on.")
            save(path, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no further case after this long")
    parser.add_argument("--only", choices=[operation.name for operation in OPERATIONS])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: torch.cuda.is_available() is False: no GPU, no driver, or a torch without CUDA")
    device = torch.device("cuda")
    name = re.sub(r"[^a-z0-9]+", "-", environment.device_name(device).lower()).strip("-")
    path = arguments.directory / f"{name}.json"
    results = load(path, device)
    start = time.perf_counter()
    if results["tests"] is None:
        results["tests"] = run_tests()
        save(path, results)
    run(path, device, results, arguments.minutes - (time.perf_counter() - start) / 60, arguments.only)
    broken = [(part, *item) for part, left in results["left_out"].items() for item in left.items()]
    broken = [": ".join(item) for item in broken if item[2].startswith(FAILED)]
    print(f"{path}: {len(results['benchmarks'])} figures; now `python -m benchmarks.report`")
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
