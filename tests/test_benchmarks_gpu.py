"""`python -m benchmarks.gpu` without a GPU: what it reads from its tools, its order, and how it goes on after an interruption."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_profile, gpu_tools, harness, peers, report, report_gpu, small_cases
from benchmarks.bench_token_stats import OPERATION
from benchmarks.harness import Case, Operation
from dqo_kernels import dispatch, library

CPU = torch.device("cpu")

PASSED = """\
........................................................................ [ 66%]
......s...s.........................                                     [100%]
=========================== short test summary info ============================
SKIPPED [1] tests/kernels/test_gemm.py:70: needs two GPUs
SKIPPED [2] tests/kernels/test_library.py: torch without gloo: nothing to do
106 passed, 3 skipped, 3329 deselected, 2 warnings in 71.30s (0:01:11)
"""
FAILED = """\
.sFFxE                                                                   [100%]
=================================== FAILURES ===================================
E   assert 1 == 2
ERROR    root:test_x.py:9 a line of a captured log
=========================== short test summary info ============================
FAILED tests/test_x.py::test_c[1] - assert 1 == 2
FAILED tests/test_x.py::test_c[a b] - AssertionError: assert 'a b' == 2
ERROR tests/test_x.py::test_e - ValueError: boom
SKIPPED [1] tests/test_x.py:3: no such
!!!!!!!!!!!!!!!!!!!!!!!!!! stopping after 10 failures !!!!!!!!!!!!!!!!!!!!!!!!!!
2 failed, 1 passed, 1 skipped, 1 xfailed, 1 error in 0.63s
"""


def test_pytest_is_read_from_its_last_line_and_its_summary():
    found = gpu_tools.read_pytest(PASSED)
    assert found == {
        "passed": 106, "skipped": 3, "failed": 0, "failures": [],
        "reasons": {"needs two GPUs": 1, "torch without gloo: nothing to do": 2},
    }  # fmt: skip
    found = gpu_tools.read_pytest(FAILED)
    assert (found["passed"], found["skipped"], found["failed"]) == (1, 1, 3)
    names = ["test_c[1]", "test_c[a b]", "test_e"]
    assert found["failures"] == [f"tests/test_x.py::{name}" for name in names]
    decorated = "===== 2 passed, 1 skipped in 0.10s ====="
    assert gpu_tools.read_pytest(decorated)["passed"] == 2
    assert gpu_tools.read_pytest("Traceback (most recent call last):\nSegmentation fault") == {}


CLEAN = """\
========= COMPUTE-SANITIZER
token_stats        triton   one model, float32                         0.01 / 0.00  ok
small cases: 44 agree, 0 fail, 0 refused
========= ERROR SUMMARY: 0 errors
"""
OUT_OF_BOUNDS = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at _backward_kernel+0x160 in token_stats_triton_kernels.py:61
=========     by thread (0,0,0) in block (0,0,0)
=========     Access at 0x7f6510a00001 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernelEx [0x3a1e2c] in libcuda.so.1
=========
========= Invalid __global__ write of size 4 bytes
=========     at void dqo::fold<float, (int)8>(const float *, float *)+0x70 in token_stats.cu:12
=========
========= ERROR SUMMARY: 14 errors
========= ERROR SUMMARY: 4 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""
NO_RACE = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at sumKernel(int *, int *)+0x6a0 in racecheck_demo.cu:17
=========     and Read access at sumKernel(int *, int *)+0x7d0 in racecheck_demo.cu:22 [508 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
WARNED = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n"
UNSUPPORTED = """\
========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation
========= Program hit cudaErrorUnknown (error 999) due to "unknown error" on CUDA API call to cudaMalloc.
========= ERROR SUMMARY: 2 errors
"""
CRASHED = "========= COMPUTE-SANITIZER\n========= Error: process didn't terminate successfully\n"
NUMPY = "UserWarning: Failed to initialize NumPy: No module named 'numpy'\n"  # torch's, and no refusal


@pytest.mark.parametrize(
    "tool, code, text, outcome, detail",
    [
        ("memcheck", 0, CLEAN, "passed", "0 errors"),
        ("initcheck", 0, NUMPY + CLEAN, "passed", "0 errors"),
        ("memcheck", 66, OUT_OF_BOUNDS, "failed", "14 errors"),
        ("racecheck", 0, NO_RACE, "passed", "0 errors, 0 warnings"),
        ("racecheck", 66, RACE, "failed", "1 errors, 0 warnings"),
        ("racecheck", 0, WARNED, "passed", "0 errors, 2 warnings"),
        ("racecheck", 0, CLEAN, "failed", "no summary: ========= ERROR SUMMARY: 0 errors"),
        ("memcheck", 1, UNSUPPORTED, "refused", "Error: Device not supported. Please refer to the"),
        ("synccheck", 1, CRASHED, "failed", "no summary: ========= Error: process didn't terminate"),
        ("memcheck", 1, CLEAN, "failed", "0 errors, but the program failed"),
    ],
)
def test_what_a_sanitizer_says(tool, code, text, outcome, detail):
    record = gpu_tools.read_sanitizer(tool, code, text)
    assert record["outcome"] == outcome and record["detail"].startswith(detail)


def test_a_sanitizer_names_the_kernels():
    kernels = gpu_tools.read_sanitizer("memcheck", 66, OUT_OF_BOUNDS)["kernels"]
    assert kernels == {"_backward_kernel": 1, "void dqo::fold<float, (int)8>(const float *, float *)": 1}
    assert gpu_tools.read_sanitizer("racecheck", 66, RACE)["kernels"] == {"sumKernel(int *, int *)": 2}


COLUMNS = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",'
    '"Section Name","Metric Name","Metric Unit","Metric Value"'
)


def ncu_rows(launch: int, kernel: str, values: tuple[str, ...]) -> str:
    units = ("ns", "%", "register/thread", "%")
    start = f'"{launch}","912","python3.12","127.0.0.1","{kernel}","1","7","(256, 1, 1)","(8192, 1, 1)","0","9.0","Command line"'
    return "".join(f'{start},"{m}","{u}","{v}"\n' for m, u, v in zip(gpu_tools.METRICS, units, values, strict=True))


NCU = f"""\
==PROF== Connected to process 912 (/opt/torch/bin/python3.12)
==PROF== Profiling "_forward" - 0: 0%....50%....100% - 1 pass
==PROF== Disconnected from process 912
{COLUMNS}
{ncu_rows(0, "_forward", ("1,200,000", "91.5", "64", "n/a"))}\
{ncu_rows(1, "_backward(float *, float)", ("1000", "50", "40", "30.5"))}\
{ncu_rows(2, "_backward(float *, float)", ("3000", "90", "48", "30.5"))}"""


def test_ncu_is_read_by_kernel():
    forward, backward = gpu_tools.read_ncu(NCU)
    numbers = {"microseconds": 1200.0, "dram_percent": 91.5, "registers": 64, "occupancy_percent": None}
    assert forward == {"kernel": "_forward", "launches": 1} | numbers
    numbers = {"microseconds": 4.0, "dram_percent": 80.0, "registers": 48, "occupancy_percent": 30.5}
    assert backward == {"kernel": "_backward(float *, float)", "launches": 2} | numbers
    assert gpu_tools.read_ncu("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission") == []


@pytest.mark.parametrize(
    "text, detail",
    [
        ("==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - no permission\nbye\n", "ERR_NVGPUCTRPERM - no permission"),
        ("==ERROR== Failed to initialize the profiler: LibraryNotLoaded\n", "Failed to initialize the profiler"),
        ("==WARNING== No kernels were profiled.\n", "==WARNING== No kernels were profiled."),
    ],
)
def test_an_ncu_that_does_not_work_is_refused(monkeypatch, text, detail):
    monkeypatch.setattr(gpu_tools.shutil, "which", lambda name: None)
    assert gpu_tools.run_ncu("token_stats", "triton", 9.0) == {"outcome": "missing", "detail": "ncu is not on PATH"}
    monkeypatch.setattr(gpu_tools.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu_tools, "execute", lambda *arguments: gpu_tools.Ended(1, text))
    record = gpu_tools.run_ncu("token_stats", "triton", 9.0)
    assert record["outcome"] == "refused" and record["detail"].startswith(detail)


def test_a_process_past_its_time_ends_with_what_it_started(tmp_path):
    assert gpu_tools.execute(["sh", "-c", "echo $A; echo b >&2; exit 3"], 9.0, {"A": "a"}) == (3, "a\nb\n")
    child = tmp_path / "child"
    with pytest.raises(gpu_tools.Unfinished, match="not over after 0 s; its last line: 'begun'"):
        gpu_tools.execute(["sh", "-c", f"echo begun; sleep 60 & echo $! > {child}; wait"], 0.3)
    state = Path("/proc") / child.read_text().strip() / "stat"
    for _ in range(100):
        if (
            not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
        ):  # ended, if perhaps not collected
            return
        time.sleep(0.01)
    pytest.fail("what the process had started still runs")


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
        return gpu_tools.Ended(*self.script[word])


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
    monkeypatch.setattr(gpu_tools, "execute", made.execute)
    monkeypatch.setattr(gpu_tools.shutil, "which", lambda name: f"/usr/bin/{name}")
    return made


ORDER = ["pytest", "small_cases", "memcheck", "racecheck", "initcheck", "synccheck", "3x32", "4x32"]


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
    assert machine.limits == [540.0 - 60 * i for i in range(6)]  # each gets what is left of nine minutes
    assert call(tmp_path) == results and machine.ran == ORDER  # nothing is repeated
    assert "tests -m gpu and not aot " in machine.commands[0]
    assert "--tool memcheck " in machine.commands[2] and machine.commands[2].endswith(
        "benchmarks.small_cases --device cuda"
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
    machine.script["racecheck"] = gpu_tools.Unfinished("not over after 360 s")
    with pytest.raises(SystemExit, match="sanitizer racecheck: not over"):
        call(tmp_path)
    results = written(tmp_path)
    assert results["not_finished"] == {"sanitizer racecheck": "not over after 360 s"}
    assert "sanitizer racecheck" not in results["checks"]
    machine.script["racecheck"] = (0, NO_RACE)
    results = call(tmp_path)
    assert machine.ran == [*ORDER[:4], *ORDER[3:]] and results["not_finished"] == {}


def test_no_part_is_started_when_the_time_is_over(machine, tmp_path):
    with pytest.raises(SystemExit, match="3 minutes are over before sanitizer racecheck"):
        call(tmp_path, "--minutes", "3")
    assert machine.ran == ORDER[:3]
    with pytest.raises(SystemExit, match="4 minutes are over before token_stats 4x32"):
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
    monkeypatch.setattr(
        gpu_tools.shutil, "which", lambda name: None if "racecheck" in machine.ran else f"/usr/bin/{name}"
    )
    results = call(tmp_path)
    outcomes = [results["checks"][f"sanitizer {tool}"]["outcome"] for tool in gpu_tools.SANITIZERS]
    assert outcomes == ["refused", "refused", "missing", "missing"]
    monkeypatch.setattr(gpu_tools.shutil, "which", lambda name: f"/usr/bin/{name}")  # installed since
    results = call(tmp_path)
    outcomes = [results["checks"][f"sanitizer {tool}"]["outcome"] for tool in gpu_tools.SANITIZERS]
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
    assert text.count("| not measured |") == len(report_gpu.TARGETS)
    assert text.index("### Checks") < text.index("### Targets") < text.index("### token_stats")


def target_row(target, backend, share, seconds):
    info = dict(zip(("operation", "shape", "dtype", "variant", "mode"), target.where))
    info |= {"backend": backend, "share_of_copy": share, "share_of_gemms": share}
    return {"extra_info": info, "stats": {"median": seconds}}


def test_targets_are_compared_with_the_fastest_of_ours():
    met = [target_row(target, "cuda", 0.91, 12e-6) for target in report_gpu.TARGETS]
    missed = [target_row(target, "triton", 0.5, 16e-6) for target in report_gpu.TARGETS]
    peers_rows = [target_row(target, None, 0.99, 1e-6) for target in report_gpu.TARGETS]
    lines = report_gpu.targets(met + missed + peers_rows)
    assert sum(line.endswith("| cuda | yes |") for line in lines) == len(report_gpu.TARGETS)
    assert "| 91 % of copy |" in lines[4] and "| 1.1 of the floor |" in lines[6] and "| 12 us |" in lines[9]
    assert sum(line.endswith("| triton | no |") for line in report_gpu.targets(missed)) == len(report_gpu.TARGETS)


def test_every_target_is_a_case_that_a_gpu_measures():
    cases = {operation.name: operation for operation in gpu.OPERATIONS}
    for target in report_gpu.TARGETS:
        operation, shape, dtype, variant, mode = target.where
        operation = cases[operation]
        found = [
            c
            for c in operation.cases("cuda", "default")
            if (c.shape, c.dtype_name, c.variant) == (shape, dtype, variant)
        ]
        assert len(found) == 1 and mode in harness.modes(operation, found[0], "cuda"), target.text
    assert [f"{o}: {b}" for name, _ in gpu.profiles("cuda") for o, b in [name.split()]] == [
        f"{operation}: triton" for operation in cases if operation != "train_step"
    ]
    assert gpu_profile.case_of(cases["token_stats"], "cuda", "default").shape == "8192x151936"


def test_small_cases_agree(capsys):
    if reason := dispatch.unavailable("cpp"):
        pytest.skip(reason)
    assert small_cases.main(["--device", "cpu", "--backend", "cpp"]) == 0
    text = capsys.readouterr().out
    assert gpu_tools.read_small_cases(0, text)["outcome"] == "passed"
    for operation in [*dispatch.TABLE, "soft_bellman_loss"]:
        assert any(line.startswith(f"{operation} ") and line.endswith(" ok") for line in text.splitlines()), operation


def test_small_cases_can_fail_and_name_what_failed(monkeypatch, capsys):
    run = library.run

    def off_by_little(op, direction, *arguments):
        result = run(op, direction, *arguments)
        return (result[0] * 1.0001, *result[1:]) if direction == "bwd" else result

    row = dispatch.TABLE["lambda_return"]
    monkeypatch.setattr(dispatch, "TABLE", {"lambda_return": row, "new": {"cpu": ("cpp",)}})
    monkeypatch.setattr(small_cases, "COMPOSED", {})
    if dispatch.unavailable("cpp") is None:
        monkeypatch.setattr(library, "run", off_by_little)
        assert small_cases.main(["--device", "cpu", "--backend", "cpp"]) == 1
        record = gpu_tools.read_small_cases(1, capsys.readouterr().out)
        assert record["detail"] == "2 agree, 3 fail, 0 refused"  # bfloat16 hides it
        assert any(line.startswith("new: no small case") for line in record["failures"])
    monkeypatch.setattr(dispatch, "TABLE", {"lambda_return": row})
    assert small_cases.main(["--device", "cpu", "--backend", "reference"]) == 1
    assert "no native backend can run here" in capsys.readouterr().out
    broken = gpu_tools.read_small_cases(1, "Traceback:\nRuntimeError: CUDA error: unspecified launch failure\n")
    assert broken["outcome"] == "failed" and "unspecified launch failure" in broken["detail"]


def test_a_backend_that_the_table_gets_is_picked_up(monkeypatch):
    rows = {op: {"cpu": devices["cpu"], "cuda": ("fast", *devices["cuda"])} for op, devices in dispatch.TABLE.items()}
    rows["soft_bellman_loss"] = {"cuda": ("one_pass",)}
    monkeypatch.setattr(dispatch, "TABLE", rows)
    monkeypatch.setattr(dispatch, "BACKENDS", (*dispatch.BACKENDS, "fast", "one_pass"))
    monkeypatch.setattr(dispatch, "unavailable", lambda backend, *_: "no" if backend == "triton" else None)
    assert small_cases.backends("token_stats", "cuda") == ["fast"]
    assert small_cases.backends("soft_bellman_loss", "cuda") == ["one_pass", "fast"]
    candidates = peers.ours(lambda inputs, backend: None, ("token_stats", "soft_bellman"))
    assert [c.name for c in candidates if "cuda" in c.devices] == ["reference", "triton", "fast"]


def test_a_backend_may_refuse_a_case_but_not_all(monkeypatch, capsys):
    def refuses(operation, direction, *arguments):
        raise RuntimeError("backend 'cpp' cannot run lambda_return: too small for it")

    monkeypatch.setattr(dispatch, "TABLE", {"lambda_return": dispatch.TABLE["lambda_return"]})
    monkeypatch.setattr(small_cases, "COMPOSED", {})
    monkeypatch.setattr(dispatch, "unavailable", lambda backend, *_: None if backend == "cpp" else "no")
    monkeypatch.setattr(library, "run", refuses)
    assert small_cases.main(["--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "small cases: 0 agree, 1 fail, 4 refused" in text and "refused every case  FAILED" in text
