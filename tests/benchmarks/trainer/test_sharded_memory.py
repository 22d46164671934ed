"""Memory of two processes under FSDP2, measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_checkpoints_and_final_models_need_no_more_than_a_process_keeps_in_a_step(tmp_path):
    command = [sys.executable, "-m", "benchmarks.trainer.sharded_memory", str(tmp_path / "found.json"), "--layers", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=900)
    found = json.loads((tmp_path / "found.json").read_text())["now"]
    for phases in found["peak_mb"].values():
        assert phases["checkpoint"] < found["share_mb"] and phases["final models"] < found["share_mb"]
