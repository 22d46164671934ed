"""dqo sample in several processes of one launch (gloo)."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from dqo.errors import UserError
from dqo.processes import Processes
from dqo.sampling.backends import launched_for
from dqo.sampling.run import _part, sample_rows
from tests.dqo.sampling.runs import options, same_rows

ROOT = Path(__file__).parents[3]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
LAUNCH += ["--multi_gpu", "-m", "dqo", "sample"]


def launched(config):
    flags = [f"--{name}={value}" for name, value in asdict(config).items() if value not in (None, False)]
    environment = {"OMP_NUM_THREADS": "1", "PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*LAUNCH, *flags], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def alive(pid):
    """Whether a thread of it runs: a killed process is a zombie before its last thread has closed its files."""
    try:
        stats = [task.joinpath("stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):  # it ended, or one of its threads did while it was looked at
        return Path(f"/proc/{pid}").exists()
    return any(stat.rpartition(")")[2].split()[0] not in "ZX" for stat in stats)


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_and_one_where_two_were_killed(model, tmp_path):
    path, many = tmp_path / "rollouts.jsonl", {"num_generations": 60, "batch_size": 10}
    unbroken = tmp_path / "unbroken.jsonl"
    sample_rows(options(model, tmp_path, output_file=str(unbroken), **many), quiet=True)
    lines = unbroken.read_bytes().splitlines(keepends=True)

    def begun(rows):
        path.write_bytes(b"".join(lines[:rows]) + b'{"prompt": "1+')
        told = "rollouts.jsonl.options.json"
        (tmp_path / told).write_bytes((tmp_path / "unbroken.jsonl.options.json").read_bytes())

    begun(70)
    process = launched(options(model, tmp_path, **many))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    assert output.count("360 (290 of them new) of 6 prompts") == 1
    same_rows(path, unbroken)

    begun(0)
    process = launched(options(model, tmp_path, **many))
    while process.poll() is None and path.read_bytes().count(b"\n") < 30:
        time.sleep(0.01)
    one, other = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    os.kill(other, signal.SIGSTOP)
    for pid in (process.pid, one):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(UserError, match="another process is writing to it"):  # a part of the launch lives on
        sample_rows(options(model, tmp_path, **many), quiet=True)
    os.kill(other, signal.SIGKILL)
    while alive(one) or alive(other):
        time.sleep(0.01)
    found = sample_rows(options(model, tmp_path, **many), quiet=True)
    assert found.rows == 360 and 0 < found.new < 360
    same_rows(path, unbroken)


def test_parts_are_all_that_is_missing_once_and_a_prompt_is_in_one_of_them():
    class Task:
        def __init__(self, key):
            self.key = key

    missing = [(Task(f"prompt {i}"), (i, k)) for i in range(7) for k in range(1 + i)]
    for world in (1, 2, 3, 9):
        parts = [_part(missing, Processes(rank, world)) for rank in range(world)]
        assert sorted(key for part in parts for _, key in part) == [key for _, key in missing]
        prompts = [{task.key for task, _ in part} for part in parts]
        assert sum(map(len, prompts)) == 7 and max(map(len, prompts)) - min(map(len, prompts)) <= 1


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("ACCELERATE_USE_FSDP", "true", "dqo sample has the whole model in each process; launch it without --use_fsdp"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "dqo sample has no autocast; give it --dtype bfloat16"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed is not supported"),
    ],
)
def test_settings_of_the_launcher_that_sampling_does_not_have_are_refused(monkeypatch, setting, value, message):
    monkeypatch.setenv(setting, value)
    with pytest.raises(UserError, match=f"{setting}={value} \\(a setting of accelerate\\): {message}"):
        launched_for("dqo sample", "transformers")


def test_vllm_is_started_as_one_process(monkeypatch):
    monkeypatch.setattr("dqo.sampling.backends.launched", lambda use_cpu: Processes(0, 2))
    with pytest.raises(UserError, match="2 processes were launched, and vllm spreads a model over GPUs by itself"):
        launched_for("dqo sample", "vllm")
