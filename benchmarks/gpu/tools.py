"""What checks and profiles the kernels, each in a process of its own: pytest, small_cases, compute-sanitizer, ncu.

`run_*` gives a record for the results file, made by `read_*` from what was printed. A record's "outcome" is
    passed     the tests pass, the cases agree, the tool found no error, the kernels were profiled
    failed     they do not, it found some, or the program broke under it
    refused    the tool is there and does not work on this device or in this runtime; "detail" says why
    missing    the tool is not installed
A process that ran into its time limit, or ended before it could say anything, is no record: Unfinished.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[2]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
MAX_FAILURES = 25  # after an error of the device every later test fails too
MOST_WORKERS = 12
WORKER_BYTES = 6 * 2**30  # of the device; one test takes 4.3 GB
LAST_WORDS = 10  # seconds for what is interrupted
KEPT_LINES = 250  # of the output of what failed
REFUSALS = re.compile(  # in a line of compute-sanitizer or ncu, or in one of torch under them
    r"^=.*(Device not supported|\(error 999\)|Failed to initialize|ERR_NVGPUCTRPERM|No supported GPU|not supported on)"
    r"|CUDA unknown error|CUDA error: unknown error"
)
METRICS = {  # ncu's name: ours
    "gpu__time_duration.sum": "microseconds",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
}
MICROSECONDS = {
    "ns": 1e-3,
    "nsecond": 1e-3,
    "us": 1.0,
    "usecond": 1.0,
    "ms": 1e3,
    "msecond": 1e3,
    "s": 1e6,
    "second": 1e6,
}
MAX_LAUNCHES = 200


class Unfinished(Exception):
    """There is no result yet; the reason."""


class Ended(NamedTuple):
    code: int
    text: str  # stdout and stderr together


def execute(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> Ended:
    """Runs `command` at the root of the repository; Unfinished after `seconds`, with all processes that it started ended.

    compute-sanitizer and ncu start the program they look at, so a group of processes is ended; it keeps this program's terminal,
    so that what closes that reaches it too. The output goes into a file: a pipe would stay open as long as any of them lives.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,  # Popen's process_group needs Python 3.11
        )

        def text() -> str:
            output.seek(0)
            return output.read().decode(errors="replace")

        try:
            code = process.wait(timeout=seconds)
        except BaseException as error:
            if isinstance(error, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGINT)  # pytest then counts what has passed and failed
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=LAST_WORDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise Unfinished(f"not over after {seconds:.0f} s; its last line: {last_line(text())!r}") from None
            raise
        return Ended(code, text())


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _tail(text: str) -> list[str]:
    return text.splitlines()[-KEPT_LINES:]


def read_pytest(text: str) -> dict:
    """{"passed", "skipped", "failed": counts, "reasons": {of a skip: count}, "failures": names}; {} without a last line."""
    last = next((line for line in reversed(text.splitlines()) if re.search(r"\d+ \w+ in [\d.]+s\b", line)), None)
    if last is None:
        return {}
    counts = {
        word.rstrip("s"): int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", last.rpartition(" in ")[0])
    }
    summary = text.rpartition("short test summary info")[2]  # what comes before may hold a test's own output
    reasons: dict[str, int] = {}
    for count, reason in re.findall(r"^SKIPPED \[(\d+)\] \S+: (.*)$", summary, re.M):
        reasons[reason] = reasons.get(reason, 0) + int(count)
    found = {name: counts.get(name, 0) for name in ("passed", "skipped")}
    found["failed"] = counts.get("failed", 0) + counts.get("error", 0)
    failures = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", summary, re.M)
    return found | {"reasons": reasons, "failures": failures}


def run_tests(seconds: float) -> dict:
    """The tests marked gpu, but for those that compile for targets that are not here: these need minutes and no GPU. Compilers
    take most of their time, so there are several workers where pytest-xdist is installed."""
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu and not aot", f"--maxfail={MAX_FAILURES}", "-rfEs"]
    if importlib.util.find_spec("xdist"):
        room = torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else 0
        command += ["-n", str(max(1, min(MOST_WORKERS, os.cpu_count() or 1, room // WORKER_BYTES)))]
    code, text = execute([*command, "--tb=short", "--show-capture=no", "--color=no"], seconds)
    found = read_pytest(text)
    if code not in (0, 1) or not found or not found["passed"] + found["failed"]:
        # They could not be collected, or each was skipped: that is a matter of this installation, and no verdict on the kernels.
        raise Unfinished(
            f"pytest ended with {code} and ran none of the tests to a verdict: {last_line(text)!r}\n{text}"
        )
    if code == 0:
        return {"outcome": "passed"} | found
    return {"outcome": "failed"} | found | {"output": _tail(text)}


def _small_cases() -> list[str]:
    return [sys.executable, "-m", "benchmarks.kernels.small_cases", "--device", "cuda"]


def read_small_cases(code: int, text: str) -> dict:
    found = re.search(r"^small cases: (\d+) agree, (\d+) fail, (\d+) refused$", text, re.M)
    if found is None:
        return {"outcome": "failed", "detail": last_line(text), "output": _tail(text)}
    record = {"outcome": "failed" if code else "passed", "detail": found[0].partition(": ")[2]}
    if code:
        record["failures"] = [" ".join(line.split()) for line in text.splitlines() if line.endswith("FAILED")]
    return record


def run_small_cases(seconds: float) -> dict:
    """Every operation on small inputs, against float64. It also leaves Triton's kernels compiled for the runs that follow."""
    return read_small_cases(*execute(_small_cases(), seconds))


def read_sanitizer(tool: str, code: int, text: str) -> dict:
    """A run of one tool: the number of errors (and racecheck's warnings), and in which kernels they are."""
    if refusal := next((line for line in text.splitlines() if REFUSALS.search(line)), None):
        return {"outcome": "refused", "detail": refusal.strip("= ")}
    summaries = re.findall(r"^=+ ERROR SUMMARY: (\d+) errors?", text, re.M)
    warnings = []
    if tool == "racecheck":
        races = re.findall(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)", text)
        summaries, warnings = [pair[0] for pair in races], [pair[1] for pair in races]
    if not summaries:
        return {"outcome": "failed", "detail": f"no summary: {last_line(text)}", "output": _tail(text)}
    errors, warned = max(map(int, summaries)), max(map(int, warnings), default=0)
    kernels: dict[str, int] = {}
    for name in re.findall(r"^=+ .*?\bat (.+?)\+0x[0-9a-f]+", text, re.M):
        kernels[name[:120]] = kernels.get(name[:120], 0) + 1
    detail = f"{errors} errors" + (f", {warned} warnings" if tool == "racecheck" else "")
    record = {"errors": errors, "warnings": warned, "kernels": kernels}
    if errors:
        return {"outcome": "failed", "detail": detail} | record | {"output": _tail(text)}
    if code:
        return {"outcome": "failed", "detail": f"{detail}, but the program failed"} | record | {"output": _tail(text)}
    return {"outcome": "passed", "detail": detail} | record


def run_sanitizer(tool: str, seconds: float) -> dict:
    """Every allocation is one of its own, so that an access past an end is seen; errors of the API are torch's to report, which
    tries calls that may fail."""
    if (sanitizer := shutil.which("compute-sanitizer")) is None:
        return {"outcome": "missing", "detail": "compute-sanitizer is not on PATH"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "66", "--report-api-errors", "no", *_small_cases()]
    return read_sanitizer(tool, *execute(command, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:  # "n/a": this device has no such counter
        return None


def read_ncu(text: str) -> list[dict]:
    """The kernels that ncu --csv tells of, launches of one name together: times are sums, percentages weighted by time."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict] = {}
    for row in csv.DictReader(line for line in lines[first:] if line.startswith('"')):
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"][:120]})
        if name := METRICS.get(row["Metric Name"]):
            scale = MICROSECONDS[row["Metric Unit"]] if name == "microseconds" else 1
            launch[name] = None if (value := _number(row["Metric Value"])) is None else value * scale
    together: dict[str, list[dict]] = {}
    for launch in launches.values():
        together.setdefault(launch["kernel"], []).append(launch)
    return [_summed(kernel, group) for kernel, group in together.items()]


def _summed(kernel: str, group: list[dict]) -> dict:
    def known(name: str) -> list[tuple[float, float]]:
        """(value, weight) of the launches that have one."""
        return [(x[name], x.get("microseconds") or 1.0) for x in group if x.get(name) is not None]

    found = {"kernel": kernel, "launches": len(group)}
    for name in METRICS.values():
        values = known(name)
        if not values:
            found[name] = None
        elif name == "microseconds":
            found[name] = round(sum(value for value, _ in values), 3)
        elif name == "registers":
            found[name] = int(max(value for value, _ in values))
        else:
            found[name] = round(sum(v * weight for v, weight in values) / sum(weight for _, weight in values), 2)
    return found


def run_ncu(operation: str, backend: str, seconds: float) -> dict:
    """The kernels of one forward and backward (profile_one.py)."""
    if (ncu := shutil.which("ncu")) is None:
        return {"outcome": "missing", "detail": "ncu is not on PATH"}
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--launch-count", str(MAX_LAUNCHES)]
    command += ["--csv", "--print-units", "base", "--metrics", ",".join(METRICS)]
    command += [sys.executable, "-m", "benchmarks.gpu.profile_one", operation, backend]
    code, text = execute(command, seconds, {"LC_ALL": "C"})  # which has decimal points
    kernels = read_ncu(text)
    if kernels and code == 0:
        return {"outcome": "passed", "kernels": kernels}
    said = next((line for line in text.splitlines() if REFUSALS.search(line) or "==ERROR==" in line), last_line(text))
    return {"outcome": "refused", "detail": said.removeprefix("==ERROR== ").strip(), "output": _tail(text)}
