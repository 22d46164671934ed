"""Memory of two processes under FSDP2, measured by the storages of their tensors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_no_process_holds_more_than_its_share_and_the_largest_part_three_times(tmp_path):
    """A small model with a large vocabulary: two tables and a head of 4.2 MB each in 16.8 MB of weights."""
    sizes = ["--layers", "2", "--width", "128", "--vocabulary", "8192", "--untied"]
    command = [sys.executable, "-m", "benchmarks.trainer.sharded_memory", str(tmp_path / "found.json"), *sizes]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=900)
    found = json.loads((tmp_path / "found.json").read_text())["now"]
    share, weights, table = (found[name] for name in ("share_mb", "share_of_weights_mb", "table_mb"))
    assert share == pytest.approx(4 * weights, rel=0.01) and table > 0.2 * found["weights_mb"]
    for phases in found["tensors_mb"].values():
        rest = 1.0  # activations and workspace
        assert phases["loading and reference pass"] < weights + 3 * table + rest
        assert phases["two steps"] < share + 3 * table + rest
        for saving in ("checkpoint", "final models"):  # gradients are gone, and rows are sent in pieces
            assert 3 * weights < phases[saving] < share
