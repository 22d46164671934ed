"""dqo sample in several processes of one launch (gloo)."""

import time
from dataclasses import asdict

import pytest

from dqo.errors import UserError
from dqo.processes import Processes
from dqo.sampling.backends import launched_for
from dqo.sampling.run import _part, sample_rows
from tests.dqo import forked
from tests.dqo.sampling.runs import STOPPED_AFTER, options, same_rows, whole_lines


def command(config):
    return ["sample", *(f"--{name}={value}" for name, value in asdict(config).items() if value not in (None, False))]


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_and_one_where_two_were_killed(model, tmp_path):
    path, many = tmp_path / "rollouts.jsonl", {"num_generations": 12, "batch_size": 10}
    unbroken = tmp_path / "unbroken.jsonl"
    sample_rows(options(model, tmp_path, output_file=str(unbroken), **many), quiet=True)
    lines = unbroken.read_bytes().splitlines(keepends=True)

    def begun(rows):
        path.write_bytes(b"".join(lines[:rows]) + b'{"prompt": "1+')
        told = "rollouts.jsonl.options.json"
        (tmp_path / told).write_bytes((tmp_path / "unbroken.jsonl.options.json").read_bytes())

    begun(14)
    done = forked.launch(*command(options(model, tmp_path, **many)), entry=forked.DQO)
    assert [process.returncode for process in done] == [0, 0], done
    assert [process.stdout.count("72 (58 of them new) of 6 prompts") for process in done] == [1, 0]  # one speaks
    same_rows(path, unbroken)

    begun(0)
    words, said = command(options(model, tmp_path, **many)), [tmp_path / "said"] * 2
    one, other = (
        forked.start(forked.run_in_place, "tests.dqo.sampling.runs:sample_and_stop", words, said, ".", variables, [])
        for variables in forked.ranks(2)
    )
    while whole_lines(path) < 2 * STOPPED_AFTER:
        assert one.is_alive() and other.is_alive(), (tmp_path / "said").read_text()
        time.sleep(0.01)
    one.kill()
    one.join()
    with pytest.raises(UserError, match="another process is writing to it"):  # a part of the launch lives on
        sample_rows(options(model, tmp_path, **many), quiet=True)
    other.kill()
    other.join()
    found = sample_rows(options(model, tmp_path, **many), quiet=True)
    assert (found.rows, found.new) == (72, 72 - 2 * STOPPED_AFTER)
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
