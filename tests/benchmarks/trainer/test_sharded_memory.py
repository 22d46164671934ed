"""Under FSDP2 no process holds a whole model, in no phase: measured on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_a_process_holds_its_share_and_a_few_layers(tmp_path):
    """`slack` is what gloo and the allocator keep, and the rows."""
    command = [sys.executable, "-m", "benchmarks.trainer.sharded_memory", str(tmp_path / "found.json"), "--layers", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=900)
    found = json.loads((tmp_path / "found.json").read_text())["now"]
    layers, slack = 3 * found["layer_mb"], 60
    for phases in found["peak_mb"].values():
        assert (
            phases["loading and reference pass"]
            < found["share_of_weights_mb"] + layers + slack
            < found["weights_mb"] + 60
        )
        assert phases["checkpoint"] < found["share_mb"] + 2 * layers + slack
