"""The benchmarks' own arithmetic: memory, the report, and that a wrong result is not timed."""

import json

import pytest
import torch

from benchmarks import report
from benchmarks.harness import memory
from benchmarks.harness import timing as harness
from benchmarks.harness.timing import Budget, Candidate, Case, Phases
from benchmarks.harness.units import BYTES, FLOPS, GEMMS, TOKENS
from benchmarks.kernels import bench_linear_soft_bellman_loss as linear
from benchmarks.kernels.bench_token_stats import OPERATION
from benchmarks.trainer import bench_train_step as train_step

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


@pytest.mark.parametrize("variant, forward, both", [("policy", 2, 6), ("kl", 4, 8)])
def test_flops_and_the_share_of_bare_products(variant, forward, both):
    case = Case("tiny", (2, 8, 16, 64), torch.float32, variant)
    found = harness.measure(linear.OPERATION, case, CPU, {"reference", "eager"}, Budget(3, 0.0))
    assert set(found) == {GEMMS, "reference", "eager"}  # no copy; the ceiling runs also when nobody asks for it
    product = 16 * 16 * 64
    for record in found.values():
        assert set(record) == {"forward", "both"}
        assert record["forward"]["flops"] == forward * product and record["both"]["flops"] == both * product
    for mode in ("forward", "both"):
        bare, eager = found[GEMMS][mode], found["eager"][mode]
        assert bare["share_of_gemms"] == 1.0
        assert eager["share_of_gemms"] == pytest.approx(eager["tflop_per_s"] / bare["tflop_per_s"])


def test_the_bare_products_are_those_of_the_gradient(monkeypatch):
    """z = X W^T, dX = dz W, dW = dz^T X, and z_ref; nothing else."""
    calls, mm = [], torch.mm
    x = linear.inputs(Case("tiny", (2, 8, 16, 64), torch.float32, "kl"), CPU)
    phases = linear._gemms(x)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: calls.append((*a.shape, b.shape[1])) or mm(a, b, out=out))
    phases.backward(phases.forward())
    assert calls == [(16, 16, 64), (16, 16, 64), (16, 64, 16), (64, 16, 16)]


def test_a_wrong_linear_loss_is_not_timed():
    def halved(x):
        phases = linear._torch(x)
        return Phases(phases.forward, lambda outputs: {n: g / 2 for n, g in phases.backward(outputs).items()})

    candidates = [*linear.CANDIDATES, Candidate("halved", "", halved)]
    operation = harness.Operation(**vars(linear.OPERATION) | {"candidates": candidates})
    case = Case("tiny", (2, 8, 16, 64), torch.float32, "policy")
    found = harness.measure(operation, case, CPU, {"halved", "eager"}, Budget(3, 0.0))
    assert found["halved"].startswith(harness.FAILED) and "grad_" in found["halved"]
    assert "both" in found["eager"]


@pytest.mark.parametrize("case", train_step.cases("cpu", "smoke"), ids=str)
def test_a_training_step_takes_every_gradient(case):
    def forgetful(x):
        phases = train_step._ours(x, "reference")

        def backward(outputs):
            gradients = phases.backward(outputs)
            return {name: torch.zeros_like(g) if "embed" in name else g for name, g in gradients.items()}

        return Phases(phases.forward, backward)

    x = train_step.inputs(case, CPU)
    gradients = train_step._ours(x, "reference")
    taken = gradients.backward(gradients.forward())
    models = list(x.learner.children())
    assert len(taken) == sum(len(list(model.parameters())) for model in models)
    assert all(p.grad is None for model in models for p in model.parameters())  # the next step starts from nothing

    candidates = [*train_step.CANDIDATES, Candidate("forgetful", "", forgetful)]
    operation = harness.Operation(**vars(train_step.OPERATION) | {"candidates": candidates})
    found = harness.measure(operation, case, CPU, {"reference", "forgetful"}, Budget(3, 0.0))
    assert found["forgetful"].startswith(harness.FAILED) and "embed" in found["forgetful"]
    assert set(found["reference"]) == {"forward", "both"}
    record = found["reference"]["both"]
    assert record["tokens"] == 4 * 16 and record["tokens_per_s"] > 0
    assert record["peak_extra_bytes"] >= sum(p.nbytes for p in x.learner.policy.parameters())


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_trl_takes_the_same_step(method):
    pytest.importorskip("trl", reason="a peer of the extra [bench]")
    case = next(case for case in train_step.cases("cpu", "smoke") if case.variant == method)
    if reason := train_step.peers.trl_chunked_reason(case, "cpu"):
        pytest.skip(reason)
    found = harness.measure(train_step.OPERATION, case, CPU, {f"trl {method}"}, Budget(3, 0.0))
    assert not isinstance(found[f"trl {method}"], str), found[f"trl {method}"]


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
    head |= {"versions": {"torch": "2"}, "size": "full", "left_out": {}, "benchmarks": rows, "command": "pytest b -x"}
    (tmp_path / "cpu.json").write_text(json.dumps(head))
    (tmp_path / "other.json").write_text("{}")
    text = report.render(report.load(tmp_path))
    assert "| 4x32 | float32 | kl | both | **cpp** | 2 | 1 | 50 % | 2 | 1 |" in text
    assert "| eager | 5 |" in text and "| 2.5 |" in text
    assert "## GPU\n\nNot measured" in text
    assert "DQO_BENCH=full pytest b -x\npython -m benchmarks.report" in text


@pytest.mark.parametrize("unit, shown", [(BYTES, "3 | 50 % |"), (FLOPS, "3 | 50 % |"), (TOKENS, "3 |")])
def test_the_report_says_what_was_counted(unit, shown):
    info = {"operation": "op", "shape": "4x32", "dtype": "float32", "variant": "kl", "mode": "both", "note": None}
    info |= {"implementation": "cpp", "default": True, "computes": "all", "peak_extra_bytes": None}
    info |= {unit.rate: 3.0, f"{unit.count}_formula": "N*V"} | ({unit.share: 0.5} if unit.ceiling else {})
    lines = report.operation_section("op", [{"extra_info": info, "stats": {"median": 0.002}}], {})
    heads = " | ".join(title for title in unit.columns if title)
    assert f"| ms | {heads} | time / ours |" in lines[2]
    assert f"| **cpp** | 2 | {shown} 1 |" in lines[4]
    assert f"{unit.title}:" in lines and "- both kl: N*V" in lines
