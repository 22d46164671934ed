"""python -m dqo_kernels: what it prints, and that its self-check can fail."""

import os
import subprocess
import sys

import pytest
import torch

from dqo_kernels import __main__ as main_module
from dqo_kernels import soft_bellman_loss
from dqo_kernels.core import dispatch, library

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.slow
def test_it_prints_backends_reasons_and_a_self_check():
    # As users run it: Triton's interpreter is asked for by the tests alone, and checked below.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dqo_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for op in dispatch.TABLE:
        assert f"  {op} " in done.stdout
    for name in main_module.CHECKS:
        assert f"  {name:<20} cpu   reference" in done.stdout or name == "one pass"
    assert "FAILED" not in done.stdout
    if not torch.cuda.is_available():
        assert "cuda: torch finds no device; of dqo_kernels._cuda: " in done.stdout
    assert "without cuda: it does not run on cpu" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", main_module.CHECKS)
def test_every_backend_passes_its_self_check(name, device):
    for backend in main_module.backends(name, device):
        if dispatch.unavailable(backend, device) is None:
            good, found = main_module.verdict(name, backend, device)
            assert good, f"{backend}: {found}"


@pytest.mark.slow
def test_a_wrong_kernel_and_one_that_breaks_are_reported(monkeypatch, capsys):
    run, backends = library.run, main_module.backends
    without_triton = lambda *of: [name for name in backends(*of) if name != "triton"]  # noqa: E731  (its interpreter is slow)
    monkeypatch.setattr(main_module, "backends", without_triton)

    def off_by_little(op, direction, *arguments):
        result = run(op, direction, *arguments)
        return (result[0] * 1.0001, *result[1:]) if (op, direction) == ("token_stats", "fwd") else result

    monkeypatch.setattr(library, "run", off_by_little)
    assert main_module.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("token_stats" in line and "cpp" in line and line.endswith("FAILED") for line in lines)
    assert any("reference" in line and line.endswith("ok") for line in lines)

    def broken(*arguments):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(library, "run", broken)
    assert main_module.main() == 1
    assert "RuntimeError: illegal instruction  FAILED" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda", "cuda_one_pass"])
def test_forward_and_backward_are_captured_in_a_cuda_graph(backend):
    if reason := dispatch.unavailable(backend, "cuda"):
        pytest.skip(reason)
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 40000, device="cuda", requires_grad=True)
    ref_logits, rewards = torch.randn(2, 6, 40000, device="cuda"), torch.randn(2, 6, device="cuda")
    values = torch.randn(2, 6, device="cuda", requires_grad=True)
    actions, mask = torch.randint(40000, (2, 6), device="cuda"), torch.rand(2, 6, device="cuda") < 0.8

    def step():
        options = {"kl_coef": 0.1, "is_level": "suffix", "backend": backend}
        out = soft_bellman_loss(logits, actions, rewards, values, ref_logits=ref_logits, mask=mask, **options)
        return out.loss, *torch.autograd.grad(out.loss, [logits, values])

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles the kernels before the capture
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        logits.mul_(1.5), rewards.add_(1.0)
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)


def test_it_describes_packages_that_are_imported_from_a_directory(monkeypatch):
    def not_installed(name):
        raise main_module.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(main_module.importlib.metadata, "version", not_installed)
    assert "dqo (not installed)" in next(main_module.describe())
