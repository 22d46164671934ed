"""The benchmarks' own arithmetic: memory, the report, and that a wrong result is not timed."""

import json

import pytest
import torch

from benchmarks import harness, memory, report
from benchmarks.bench_token_stats import OPERATION
from benchmarks.harness import Budget, Candidate, Case, Phases

CPU = torch.device("cpu")
CASE = Case("4x32", (4, 32), torch.float32, "policy")


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setitem(harness.COPY_BYTES, "cpu", 2**12)


def test_memory_of_known_allocations():
    x = torch.randn(1000)
    extra, result = memory.extra_memory(lambda: (x + x).mul(x) + x, CPU)
    assert extra == (8000, 4000) and result.shape == (1000,)


def test_measures_every_mode():
    found = harness.measure(OPERATION, CASE, CPU, {"reference", "eager"}, Budget(3, 0.0))
    assert set(found) == {"copy", "reference", "eager"}
    record = found["eager"]["both"]
    assert len(record["seconds"]) == 3 and record["bytes"] == 3 * 4 * 32 * 4
    assert record["gb_per_s"] > 0 and record["peak_extra_bytes"] >= 4 * 32 * 4


def test_a_wrong_result_is_not_timed():
    wrong = Candidate("wrong", "", lambda x: Phases(lambda: {"logprobs": torch.zeros(4)}))
    missing = Candidate("missing", "", lambda x: None, lambda case, device_type: "not installed")
    operation = harness.Operation(**vars(OPERATION) | {"candidates": [*OPERATION.candidates, wrong, missing]})
    found = harness.measure(operation, CASE, CPU, {"wrong", "missing"}, Budget(3, 0.0))
    assert found["wrong"].startswith(harness.FAILED) and "logprobs" in found["wrong"]
    assert found["missing"] == "not installed"


def test_report(tmp_path):
    info = {
        "operation": "token_stats",
        "shape": "4x32",
        "dtype": "float32",
        "variant": "kl",
        "mode": "both",
        "note": None,
    }
    info |= {
        "computes": "all",
        "bytes_formula": "N*V",
        "gb_per_s": 1.0,
        "share_of_copy": 0.5,
        "peak_extra_bytes": 2_000_000,
    }
    rows = [
        {"extra_info": info | {"implementation": name, "default": name == "cpp"}, "stats": {"median": seconds}}
        for name, seconds in (("cpp", 0.002), ("eager", 0.005))
    ]
    head = {"device": "X", "device_type": "cpu", "date": "d", "commit": "c", "cores": 2, "threads": 2, "python": "3"}
    head |= {"versions": {"torch": "2"}, "size": "default", "left_out": {}, "benchmarks": rows}
    (tmp_path / "cpu.json").write_text(json.dumps(head))
    (tmp_path / "other.json").write_text("{}")
    text = report.render(report.load(tmp_path))
    assert "| 4x32 | float32 | kl | both | **cpp** | 2 | 1 | 50 % | 2 | 1 |" in text
    assert "| eager | 5 |" in text and "| 2.5 |" in text
    assert "## GPU\n\nNot measured" in text
