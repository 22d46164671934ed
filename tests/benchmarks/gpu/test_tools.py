"""What `python -m benchmarks.gpu` reads from pytest, compute-sanitizer and ncu, and that they end in time."""

import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import tools
from tests.benchmarks.gpu.recorded_output import (
    CLEAN,
    CRASHED,
    FAILED,
    NCU,
    NO_RACE,
    OUT_OF_BOUNDS,
    PASSED,
    RACE,
    UNSUPPORTED,
    WARNED,
)


def test_pytest_is_read_from_its_last_line_and_its_summary():
    found = tools.read_pytest(PASSED)
    assert found == {
        "passed": 106, "skipped": 3, "failed": 0, "failures": [],
        "reasons": {"needs two GPUs": 1, "torch without gloo: nothing to do": 2},
    }  # fmt: skip
    found = tools.read_pytest(FAILED)
    assert (found["passed"], found["skipped"], found["failed"]) == (1, 1, 3)
    names = ["test_c[1]", "test_c[a b]", "test_e"]
    assert found["failures"] == [f"tests/test_x.py::{name}" for name in names]
    decorated = "===== 2 passed, 1 skipped in 0.10s ====="
    assert tools.read_pytest(decorated)["passed"] == 2
    assert tools.read_pytest("Traceback (most recent call last):\nSegmentation fault") == {}


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
    record = tools.read_sanitizer(tool, code, text)
    assert record["outcome"] == outcome and record["detail"].startswith(detail)


def test_a_sanitizer_names_the_kernels():
    kernels = tools.read_sanitizer("memcheck", 66, OUT_OF_BOUNDS)["kernels"]
    assert kernels == {"_backward_kernel": 1, "void dqo::fold<float, (int)8>(const float *, float *)": 1}
    assert tools.read_sanitizer("racecheck", 66, RACE)["kernels"] == {"sumKernel(int *, int *)": 2}


def test_ncu_is_read_by_kernel():
    forward, backward = tools.read_ncu(NCU)
    numbers = {"microseconds": 1200.0, "dram_percent": 91.5, "registers": 64, "occupancy_percent": None}
    assert forward == {"kernel": "_forward", "launches": 1} | numbers
    numbers = {"microseconds": 4.0, "dram_percent": 80.0, "registers": 48, "occupancy_percent": 30.5}
    assert backward == {"kernel": "_backward(float *, float)", "launches": 2} | numbers
    assert tools.read_ncu("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission") == []


@pytest.mark.parametrize(
    "text, detail",
    [
        ("==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - no permission\nbye\n", "ERR_NVGPUCTRPERM - no permission"),
        ("==ERROR== Failed to initialize the profiler: LibraryNotLoaded\n", "Failed to initialize the profiler"),
        ("==WARNING== No kernels were profiled.\n", "==WARNING== No kernels were profiled."),
    ],
)
def test_an_ncu_that_does_not_work_is_refused(monkeypatch, text, detail):
    monkeypatch.setattr(tools.shutil, "which", lambda name: None)
    assert tools.run_ncu("token_stats", "triton", 9.0) == {"outcome": "missing", "detail": "ncu is not on PATH"}
    monkeypatch.setattr(tools.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(tools, "execute", lambda *arguments: tools.Ended(1, text))
    record = tools.run_ncu("token_stats", "triton", 9.0)
    assert record["outcome"] == "refused" and record["detail"].startswith(detail)


@pytest.mark.slow
def test_tests_past_their_time_say_how_many_have_passed(tmp_path):
    begun = tmp_path / "begun"
    slow = f"import time\n\ndef test_a(): pass\n\ndef test_b(): open({str(begun)!r}, 'w'); time.sleep(60)\n"
    (tmp_path / "test_slow.py").write_text(slow)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", "/dev/null", str(tmp_path)]
    with pytest.raises(tools.Unfinished, match="not over after 8 s; its last line: '.*1 passed in"):
        tools.execute(command, 8.0)
    assert begun.exists()


def test_a_process_past_its_time_ends_with_what_it_started(tmp_path):
    assert tools.execute(["sh", "-c", "echo $A; echo b >&2; exit 3"], 9.0, {"A": "a"}) == (3, "a\nb\n")
    child = tmp_path / "child"
    with pytest.raises(tools.Unfinished, match="not over after 0 s; its last line: 'begun'"):
        tools.execute(["sh", "-c", f"echo begun; sleep 60 & echo $! > {child}; wait"], 0.3)
    state = Path("/proc") / child.read_text().strip() / "stat"
    for _ in range(100):
        if (
            not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
        ):  # ended, if perhaps not collected
            return
        time.sleep(0.01)
    pytest.fail("what the process had started still runs")
