"""The choice of a backend: what cannot run is left out with its reason, or is refused with it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dqo_kernels
from dqo_kernels.core import dispatch
from tests.kernels.test_errors import CASES, SCAN, STATS

# An editable installation has a finder that would lend the copy its own extension.
USE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
import torch, dqo_kernels
print(dqo_kernels.lambda_return(*torch.ones(2, 2), torch.tensor([0, 2])).tolist())
"""


@pytest.mark.parametrize("name", list(CASES))
def test_a_backend_that_cannot_run_says_why(name, monkeypatch):
    monkeypatch.setattr(dispatch, "unavailable", lambda *_: "its engine is out")
    op = name if name in dispatch.TABLE else name.replace("soft_bellman_loss", "token_stats")
    backend = dispatch.TABLE[op]["cpu"][0]
    with pytest.raises(RuntimeError, match=f"{backend}.*its engine is out"):
        getattr(dqo_kernels, name)(**CASES[name][0], backend=backend)


def test_the_environment_insists_as_the_argument_does(monkeypatch):
    monkeypatch.setenv("DQO_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="backend.*reference.*nonsense"):
        dqo_kernels.token_stats(**STATS)
    monkeypatch.setenv("DQO_KERNELS_BACKEND", "reference")
    dqo_kernels.lambda_return(**SCAN)


def test_triton_says_what_it_cannot_do(monkeypatch):
    with pytest.raises(RuntimeError, match="triton.*token_stats.*float32.*float64.*reference"):
        dqo_kernels.token_stats(torch.zeros(1, 2).double(), torch.tensor([0]), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="triton.*token_stats.*GPU.*TRITON_INTERPRET=1"):
        dqo_kernels.token_stats(torch.zeros(1, 2), torch.tensor([0]), backend="triton")


def test_the_dtype_decides_when_nobody_insists():
    assert dispatch.choose("token_stats", "cpu", None, torch.float64) in ("cpp", "reference")
    if not dispatch.unavailable("triton", "cuda"):
        assert dispatch.choose("token_stats", "cuda", None, torch.bfloat16) == "triton"
        assert dispatch.choose("token_stats", "cuda", None, torch.float64) == "reference"
    assert dispatch.choose("token_stats", "mps") == "reference"


def test_a_backend_without_the_operation_says_so():
    for op, devices in dispatch.TABLE.items():
        for missing in set(dispatch.BACKENDS) - set(devices["cpu"]):
            with pytest.raises(RuntimeError, match=f"{missing}.*{op}.*cpu"):
                dispatch.choose(op, "cpu", missing)


def use_a_copy_of_the_package(folder, prepare, script=USE):
    package = folder / "dqo_kernels"
    shutil.copytree(Path(dqo_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    prepare(package)
    # `python -c` puts the working directory first, before any installed copy.
    return subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_without_the_compiled_extension_everything_still_runs(tmp_path):
    done = use_a_copy_of_the_package(tmp_path, lambda package: None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[2.0, 1.0]"


@pytest.mark.slow
def test_without_the_compiled_extension_insisting_on_it_tells_how_to_build_it(tmp_path):
    script = USE.replace("2]))", "2]), backend='cpp')")
    done = use_a_copy_of_the_package(tmp_path, lambda package: None, script)
    assert done.returncode != 0
    assert "RuntimeError" in done.stderr and "not built" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_broken_extension_is_heard(tmp_path):
    suffix = Path(dispatch._cpu.__file__).name if dispatch._cpu else "_cpu.so"
    done = use_a_copy_of_the_package(tmp_path, lambda package: (package / suffix).write_bytes(b"not an extension"))
    assert done.returncode != 0 and "ImportError" in done.stderr, done.stdout + done.stderr
