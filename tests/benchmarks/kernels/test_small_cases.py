"""benchmarks/kernels/small_cases.py: every backend here agrees, and a wrong one, a missing case or a refusal is told."""

import pytest

from benchmarks.gpu import tools
from benchmarks.harness import peers
from benchmarks.kernels import small_cases
from dqo_kernels.core import dispatch, library


def test_small_cases_agree(capsys):
    if reason := dispatch.unavailable("cpp"):
        pytest.skip(reason)
    assert small_cases.main(["--device", "cpu", "--backend", "cpp"]) == 0
    text = capsys.readouterr().out
    assert tools.read_small_cases(0, text)["outcome"] == "passed"
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
        record = tools.read_small_cases(1, capsys.readouterr().out)
        assert record["detail"] == "2 agree, 3 fail, 0 refused"  # bfloat16 hides it
        assert any(line.startswith("new: no small case") for line in record["failures"])
    monkeypatch.setattr(dispatch, "TABLE", {"lambda_return": row})
    assert small_cases.main(["--device", "cpu", "--backend", "reference"]) == 1
    assert "no native backend can run here" in capsys.readouterr().out
    broken = tools.read_small_cases(1, "Traceback:\nRuntimeError: CUDA error: unspecified launch failure\n")
    assert broken["outcome"] == "failed" and "unspecified launch failure" in broken["detail"]


def test_a_backend_that_the_table_gets_is_picked_up(monkeypatch):
    rows = {op: {"cpu": devices["cpu"], "cuda": ("fast", *devices["cuda"])} for op, devices in dispatch.TABLE.items()}
    monkeypatch.setattr(dispatch, "TABLE", rows)
    monkeypatch.setattr(dispatch, "BACKENDS", (*dispatch.BACKENDS, "fast"))
    monkeypatch.setattr(dispatch, "unavailable", lambda backend, *_: "no" if backend == "triton" else None)
    assert small_cases.backends("token_stats", "cuda") == ["fast", "cuda"]
    assert small_cases.backends("soft_bellman_loss", "cuda") == ["fast", "cuda", dispatch.ONE_PASS]
    candidates = peers.ours(lambda inputs, backend: None, ("token_stats", "soft_bellman"))
    assert [c.name for c in candidates if "cuda" in c.devices] == ["reference", "triton", "cuda", "fast"]


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
