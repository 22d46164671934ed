"""Memory of one process and of two under FSDP2, measured by the storages of their tensors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_no_process_holds_more_than_its_share_and_the_largest_part(tmp_path):
    """A small model with a large vocabulary: two tables and a head of 4.2 MB each, and layers of 1 MB, in 29 MB of weights."""
    sizes = ["--layers", "8", "--width", "128", "--vocabulary", "8192", "--untied", "--processes", "2", "1"]
    command = [sys.executable, "-m", "benchmarks.trainer.sharded_memory", str(tmp_path / "found.json"), *sizes]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=900)
    found = json.loads((tmp_path / "found.json").read_text())["now"]
    two, one, table = found["2 processes"], found["1 process"], found["table_mb"]
    share, weights = two["share_mb"], two["share_of_weights_mb"]
    assert share == pytest.approx(4 * weights, rel=0.01) and table > 4 * found["layer_mb"]
    rest = 1.0  # activations and workspace
    for phases in two["tensors_mb"].values():
        assert phases["loading and reference pass"] < weights + 2 * table + rest  # FSDP2 copies what it gathered
        assert phases["two steps"] < share + table / 2 + rest  # the gradient of a table is never whole
        for saving in ("checkpoint", "final models"):  # gradients are gone, and rows are sent in pieces
            assert 3 * weights < phases[saving] < share
    for sizes_of in two["made_of_mb"].values():
        assert sizes_of["averages of AdamW"] == pytest.approx(2 * weights, rel=0.01)
    assert one["share_mb"] == pytest.approx(2 * share, rel=0.01)
    assert one["tensors_mb"]["process 0"]["two steps"] > 0.99 * one["share_mb"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5) and len(one["losses"]) == 2
    assert 0 < found["weights_differ"] < 1e-5
