"""`python -m benchmarks.gpu` without a GPU and its tools: its order, how it goes on after an interruption, its report."""

import json
import re
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import report
from benchmarks.gpu import profile_one, section, tools
from benchmarks.gpu import run as gpu
from benchmarks.harness import gpu_clock
from benchmarks.harness import timing as harness
from benchmarks.harness.timing import Case, Operation
from benchmarks.kernels.bench_token_stats import OPERATION
from tests.benchmarks.gpu.recorded_output import CLEAN, FAILED, NCU, NO_RACE, OUT_OF_BOUNDS, PASSED, RACE, UNSUPPORTED

CPU = torch.device("cpu")
RECORD = {"mode": "both", "computes": "all", "backend": "cpp", "note": None, "seconds": [2e-3, 1e-3, 3e-3], "bytes": 1}
RECORD |= {"bytes_formula": "N*V", "gb_per_s": 1.0, "share_of_copy": 0.5, "peak_extra_bytes": None}


class Killed(BaseException):
    """As if the process were gone."""


class Machine:
    """Answers for the tools. `script` has, by a word of the command, an exit status and an output, or an exception."""

    def __init__(self):
        self.ran, self.commands, self.limits, self.now = [], [], [], 0.0
        self.script = dict.fromkeys(("memcheck", "initcheck", "synccheck"), (0, CLEAN))
        self.script |= {"pytest": (0, PASSED), "racecheck": (0, NO_RACE), "small_cases": (0, CLEAN), "ncu": (0, NCU)}

    def execute(self, command, seconds, environment=None):
        words = ("memcheck", "racecheck", "initcheck", "synccheck", "pytest", "ncu", "small_cases")
        word = next(word for word in words if any(word in re.split(r"[/.]", part) for part in command))
        self.ran.append(word)
        self.commands.append(" ".join(command))
        self.limits.append(seconds)
        self.now += 60.0
        if isinstance(self.script[word], BaseException):
            raise self.script[word]
        return tools.Ended(*self.script[word])


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    cases = [Case(f"{n}x32", (n, 32), torch.float32, "policy") for n in (3, 4)]
    candidates = [c for c in OPERATION.candidates if c.name in ("reference", "cpp", "eager")]
    operation = Operation(**vars(OPERATION) | {"cases": lambda device, size: cases, "candidates": candidates})

    def measured(operation, case, *arguments):
        made.ran.append(case.shape)
        made.now += 60.0
        if isinstance(made.script.get(case.shape), BaseException):
            raise made.script[case.shape]
        return {"cpp": {"both": RECORD}, "trl": "trl is not installed"}

    monkeypatch.setattr(gpu, "measure", measured)
    monkeypatch.setattr(gpu, "OPERATIONS", [operation])
    monkeypatch.setattr(gpu, "the_device", lambda: CPU)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: made.now, perf_counter=time.perf_counter))
    monkeypatch.setattr(tools, "execute", made.execute)
    monkeypatch.setattr(tools.shutil, "which", lambda name: f"/usr/bin/{name}")
    return made


ORDER = ["pytest", "small_cases", "3x32", "4x32", "memcheck", "racecheck", "initcheck", "synccheck"]


def call(directory, *more: str) -> dict:
    """Runs main to its end and gives the file that it left."""
    gpu.main(["--directory", str(directory), *more])
    return written(directory)


def written(directory) -> dict:
    (path,) = directory.glob("*.json")
    return json.loads(path.read_text())


def test_everything_runs_once_in_its_order(machine, tmp_path):
    results = call(tmp_path)
    assert machine.ran == ORDER
    assert results["checks"][gpu.TESTS]["passed"] == 106 and results["not_finished"] == {}
    assert {record["outcome"] for record in results["checks"].values()} == {"passed"}
    assert {e["extra_info"]["shape"] for e in results["benchmarks"]} == {"3x32", "4x32"}
    assert machine.limits == [540.0 - 60 * i for i in (0, 1, 4, 5, 6, 7)]  # each gets what is left of nine minutes
    assert call(tmp_path) == results and machine.ran == ORDER  # nothing is repeated
    assert "tests -m gpu and not aot " in machine.commands[0]
    assert "--tool memcheck " in machine.commands[2] and machine.commands[2].endswith(
        "benchmarks.kernels.small_cases --device cuda"
    )
    results = call(tmp_path, "--profile")
    assert machine.ran == [*ORDER, "ncu"] and "--clock-control none " in machine.commands[-1]
    assert results["profile"]["token_stats cpp"]["kernels"][0]["registers"] == 64
    call(tmp_path, "--profile")
    assert machine.ran == [*ORDER, "ncu"]


def test_other_sources_start_afresh_and_other_tests_run_again(machine, tmp_path, monkeypatch):
    call(tmp_path)
    sources = gpu.environment.sources
    changed = gpu.environment.TESTS
    monkeypatch.setattr(gpu.environment, "sources", lambda of=None: "new" if of == changed else sources())
    call(tmp_path)
    assert machine.ran == [*ORDER, "pytest"]
    monkeypatch.setattr(gpu.environment, "sources", lambda of=None: "new")
    results = call(tmp_path)
    assert machine.ran == [*ORDER, "pytest", *ORDER] and len(results["parts"]) == 2


def test_a_failing_test_stops_everything(machine, tmp_path):
    machine.script["pytest"] = (1, FAILED)
    for _ in range(2):  # also when it is run again: the verdict stands until the sources change
        with pytest.raises(SystemExit, match=r"test_c\[a b\]"):
            call(tmp_path)
    assert machine.ran == ["pytest"]
    record = written(tmp_path)["checks"][gpu.TESTS]
    assert record["failed"] == 3 and "tests/test_x.py::test_e" in record["failures"]


@pytest.mark.parametrize(
    "ended",
    [(2, "ERROR tests/a.py\n1 error in 0.4s"), (5, "9 deselected in 0.1s"), (0, "5 skipped in 2.0s"), (-11, "")],
)
def test_tests_that_did_not_run_are_no_verdict(machine, tmp_path, ended):
    machine.script["pytest"] = ended
    with pytest.raises(SystemExit, match="run it again"):
        call(tmp_path)
    assert machine.ran == ["pytest"] and gpu.TESTS in written(tmp_path)["not_finished"]
    machine.script["pytest"] = (0, PASSED)
    assert call(tmp_path)["not_finished"] == {}


def test_a_part_that_ran_out_of_time_is_tried_again(machine, tmp_path):
    machine.script["racecheck"] = tools.Unfinished("not over after 360 s")
    with pytest.raises(SystemExit, match="sanitizer racecheck: not over"):
        call(tmp_path)
    results = written(tmp_path)
    assert results["not_finished"] == {"sanitizer racecheck": "not over after 360 s"}
    assert "sanitizer racecheck" not in results["checks"]
    machine.script["racecheck"] = (0, NO_RACE)
    results = call(tmp_path)
    tried = ORDER.index("racecheck")
    assert machine.ran == [*ORDER[: tried + 1], *ORDER[tried:]] and results["not_finished"] == {}


def test_a_graph_that_cannot_be_captured_ends_the_process_and_the_next_goes_on(machine, tmp_path, monkeypatch):
    record = dict(RECORD)
    monkeypatch.setattr(gpu, "measure", lambda *_: machine.ran.append("case") or {"cpp": {"both": dict(record)}})
    record["note"] = f"{gpu_clock.NO_GRAPH}: it waits for the host"
    with pytest.raises(SystemExit, match="3x32.*: no graph: it waits for the host\n.*run it again to go on"):
        call(tmp_path)
    record["note"] = None
    results = call(tmp_path)
    assert machine.ran.count("case") == 2 and len(results["parts"]) == len(results["benchmarks"]) == 2


def test_no_part_is_started_when_the_time_is_over(machine, tmp_path):
    with pytest.raises(SystemExit, match="3 minutes are over before token_stats 4x32"):
        call(tmp_path, "--minutes", "3")
    assert machine.ran == ORDER[:3]
    with pytest.raises(SystemExit, match="4 minutes are over before sanitizer synccheck"):
        call(tmp_path, "--minutes", "4")
    assert call(tmp_path, "--minutes", "4")["parts"].keys() == {
        "token_stats 3x32-float32-policy",
        "token_stats 4x32-float32-policy",
    }
    assert machine.ran == ORDER


@pytest.mark.parametrize("part", ["memcheck", "4x32"])
def test_results_survive_a_kill(machine, tmp_path, part):
    machine.script[part], good = Killed(), machine.script.get(part)
    with pytest.raises(Killed):
        call(tmp_path)
    next(tmp_path.glob("*.json")).with_suffix(".partial").write_text("{cut")  # as a kill while writing leaves it
    before = ORDER[: ORDER.index(part) + 1]
    assert machine.ran == before
    machine.script[part] = good
    results = call(tmp_path)
    assert machine.ran == [*before, *ORDER[ORDER.index(part) :]]
    assert len(results["checks"]) == 6 and len(results["parts"]) == 2


def test_errors_of_a_sanitizer_do_not_stop_but_fail(machine, tmp_path):
    machine.script["memcheck"] = (66, OUT_OF_BOUNDS)
    for _ in range(2):
        with pytest.raises(SystemExit, match="sanitizer memcheck: 14 errors"):
            call(tmp_path)
    assert machine.ran == ORDER and len(written(tmp_path)["parts"]) == 2


def test_tools_that_cannot_be_used_are_no_failure(machine, tmp_path, monkeypatch):
    for tool in ("memcheck", "racecheck"):
        machine.script[tool] = (1, UNSUPPORTED)
    monkeypatch.setattr(tools.shutil, "which", lambda name: None if "racecheck" in machine.ran else f"/usr/bin/{name}")
    results = call(tmp_path)
    outcomes = [results["checks"][f"sanitizer {tool}"]["outcome"] for tool in tools.SANITIZERS]
    assert outcomes == ["refused", "refused", "missing", "missing"]
    monkeypatch.setattr(tools.shutil, "which", lambda name: f"/usr/bin/{name}")  # installed since
    results = call(tmp_path)
    outcomes = [results["checks"][f"sanitizer {tool}"]["outcome"] for tool in tools.SANITIZERS]
    assert outcomes == ["refused", "refused", "passed", "passed"]


def test_a_case_that_breaks_is_recorded_and_passed_over(machine, tmp_path):
    machine.script["3x32"] = RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
    with pytest.raises(SystemExit, match="run it again to go on after it"):
        call(tmp_path)
    for _ in range(2):
        with pytest.raises(SystemExit, match="3x32-float32-policy: all: failed: CUDA error: an illegal"):
            call(tmp_path)
    assert machine.ran == ORDER
    assert {e["extra_info"]["shape"] for e in written(tmp_path)["benchmarks"]} == {"4x32"}


def test_the_report_begins_with_the_checks(machine, tmp_path):
    machine.script["memcheck"], machine.script["racecheck"] = (1, UNSUPPORTED), (66, RACE)
    machine.script["ncu"] = (0, NCU)
    with pytest.raises(SystemExit, match="racecheck"):
        call(tmp_path, "--profile")
    results = written(tmp_path) | {"device_type": "cuda", "device": "NVIDIA X"}
    text = report.render([results])
    assert "tests marked gpu: 106 passed, 3 skipped, 0 failed. Skipped: needs two GPUs (1); torch without gloo" in text
    assert "- sanitizer memcheck: refused: Error: Device not supported" in text
    assert "- sanitizer racecheck: failed: 1 errors, 0 warnings, in sumKernel(int *, int *)" in text
    assert "- sanitizer initcheck: 0 errors\n" in text
    assert "- trl: trl is not installed (2 cases)" in text
    assert "| token_stats cpp | `_forward` | 1 | 1200 | 91.5 % | 64 |  |" in text
    assert text.count("| not measured |") == len(section.TARGETS)
    assert text.index("### Checks") < text.index("### Targets") < text.index("### token_stats")


def target_row(target, backend, share, seconds):
    info = dict(zip(("operation", "shape", "dtype", "variant", "mode"), target.where))
    info |= {"backend": backend, "share_of_copy": share, "share_of_gemms": share}
    return {"extra_info": info, "stats": {"median": seconds}}


def test_targets_are_compared_with_the_fastest_of_ours():
    met = [target_row(target, "cuda", 0.91, 12e-6) for target in section.TARGETS]
    missed = [target_row(target, "triton", 0.5, 16e-6) for target in section.TARGETS]
    peers_rows = [target_row(target, None, 0.99, 1e-6) for target in section.TARGETS]
    lines = section.targets(met + missed + peers_rows)
    assert sum(line.endswith("| cuda | yes |") for line in lines) == len(section.TARGETS)
    assert "| 91 % of copy |" in lines[4] and "| 1.1 of the floor |" in lines[6] and "| 12 us |" in lines[9]
    assert sum(line.endswith("| triton | no |") for line in section.targets(missed)) == len(section.TARGETS)


def test_every_target_is_a_case_that_a_gpu_measures():
    cases = {operation.name: operation for operation in gpu.OPERATIONS}
    for target in section.TARGETS:
        operation, shape, dtype, variant, mode = target.where
        operation = cases[operation]
        found = [
            c
            for c in operation.cases("cuda", "default")
            if (c.shape, c.dtype_name, c.variant) == (shape, dtype, variant)
        ]
        assert len(found) == 1 and mode in harness.modes(operation, found[0], "cuda"), target.text
    assert [f"{o}: {b}" for name, _ in gpu.profiles("cuda") for o, b in [name.split()]] == [
        f"{operation}: {backend}"
        for operation in cases
        if operation != "train_step"
        for backend in ("triton", "cuda", *(["cuda_one_pass"] if operation == "soft_bellman_loss" else []))
    ]
    assert (
        profile_one.case_of(cases["token_stats"], cases["token_stats"].candidates[0], "cuda", "default").shape
        == "8192x151936"
    )
