"""Every Triton kernel compiles for every target, within its shared memory and its registers. Needs no GPU.

By default the usual specialisations for sm_90; `-m aot` compiles all of them for all targets (minutes per target).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
KERNELS = {
    "token_stats_forward", "token_stats_merge", "token_stats_backward",
    "lambda_return_forward", "lambda_return_backward",
    "soft_bellman_forward", "soft_bellman_residual",
}  # fmt: skip


def compiled(target, everything, request, tmp_path):
    """What each specialisation needs; from a process without TRITON_INTERPRET, through a cache keyed by the source."""
    cache = getattr(request.config, "cache", None)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache.mkdir("triton") if cache else tmp_path)
    command = [sys.executable, "-m", "tests.kernels.aot", target, *["everything"] * everything]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(results, target):
    from tests.kernels.aot import LIMITS

    shared, registers = LIMITS[target]
    assert {result["kernel"] for result in results} == KERNELS
    for result in results:
        assert result["spilled"] == 0, result
        assert result["shared"] <= shared, result
        assert result["registers"] <= registers, result


@pytest.mark.slow
def test_usual_specialisations_compile_for_hopper(request, tmp_path):
    check(compiled("sm_90", False, request, tmp_path), "sm_90")


@pytest.mark.aot
@pytest.mark.parametrize("target", TARGETS)
def test_all_specialisations_compile_for_every_target(target, request, tmp_path):
    check(compiled(target, True, request, tmp_path), target)
