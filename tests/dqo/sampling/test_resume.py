"""A run of dqo sample that ends early, by a signal, a full disk or a fault, and goes on."""

import errno
import os
import signal
import time

import pytest

from dqo.data import appending
from dqo.errors import UserError
from dqo.models.new import save
from dqo.sampling import backends
from dqo.sampling.run import sample_rows
from tests.dqo import forked
from tests.dqo.helpers import policy, tokenizer
from tests.dqo.sampling.runs import PROMPTS, options, rows_of, same_rows, stopping, whole_lines


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def sampled(arguments, after=None):
    """`dqo sample` in a process of its own, which is killed after a number of responses."""
    if after is not None:
        backends.generate = stopping(backends.generate, after, die)
    sample_rows(arguments, quiet=True)


def goes_on_after(stop, broken, path, unbroken):
    """`stop(number)` ends a run of `broken` after so many responses; then it goes on, and its rows are those of `unbroken`."""
    for number in (0, 1, 5, 6):
        before = whole_lines(path)
        stop(number)
        assert whole_lines(path) == before + number
        path.write_bytes(path.read_bytes() + b'{"prompt": "1+')  # as if it had died inside of a line
    found = sample_rows(broken, quiet=True)
    assert (found.rows, found.new) == (18, 6)
    same_rows(path, unbroken)
    before = path.read_bytes()
    assert sample_rows(broken, quiet=True).new == 0 and path.read_bytes() == before


def test_a_run_that_is_stopped_again_and_again_ends_with_the_rows_of_an_unbroken_one(model, tmp_path, monkeypatch):
    sample_rows(options(model, tmp_path, output_file=str(tmp_path / "unbroken.jsonl")), quiet=True)
    broken = options(model, tmp_path)

    def interrupted():
        raise KeyboardInterrupt

    def stop(number):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(backends, "generate", stopping(backends.generate, number, interrupted))
            sample_rows(broken, quiet=True)

    goes_on_after(stop, broken, tmp_path / "rollouts.jsonl", tmp_path / "unbroken.jsonl")


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_rows_of_an_unbroken_one(model, tmp_path):
    sample_rows(options(model, tmp_path, output_file=str(tmp_path / "unbroken.jsonl")), quiet=True)
    broken = options(model, tmp_path)

    def stop(number):
        assert forked.ended(forked.start(sampled, broken, number)) == -signal.SIGKILL

    goes_on_after(stop, broken, tmp_path / "rollouts.jsonl", tmp_path / "unbroken.jsonl")


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_and_doubles_nothing(model, tmp_path):
    many = {"num_generations": 40, "batch_size": 8}
    sample_rows(options(model, tmp_path, output_file=str(tmp_path / "unbroken.jsonl"), **many), quiet=True)
    broken = options(model, tmp_path, **many)
    for delay in (0.05, 0.2, 0.4, 0.6, 0.8):
        process = forked.start(sampled, broken)
        time.sleep(delay)
        process.kill()
        process.join()
    sample_rows(broken, quiet=True)
    same_rows(tmp_path / "rollouts.jsonl", tmp_path / "unbroken.jsonl")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": 0.5}, "temperature 1.0 then, 0.5 now"),
        ({"top_p": 0.9}, "top_p 1.0 then, 0.9 now"),
        ({"seed": 1}, "seed 0 then, 1 now"),
        ({"num_generations": 4}, "num_generations 3 then, 4 now"),
        ({"max_completion_length": 9}, "max_completion_length 8 then, 9 now"),
        ({"dtype": "bfloat16"}, 'dtype "float32" then, "bfloat16" now'),
        ({"rows": PROMPTS[:5]}, "prompts .* then, .* now"),
    ],
)
def test_other_options_are_refused_when_a_file_goes_on(model, tmp_path, change, message):
    sample_rows(options(model, tmp_path), quiet=True)
    before = (tmp_path / "rollouts.jsonl").read_bytes()
    with pytest.raises(UserError, match=f"was begun under other options: {message}"):
        sample_rows(options(model, tmp_path, **change), quiet=True)
    assert (tmp_path / "rollouts.jsonl").read_bytes() == before


def test_a_model_that_has_changed_under_its_name_is_refused_when_a_file_goes_on(tmp_path):
    save(policy(), tokenizer(), tmp_path / "model")
    sample_rows(options(tmp_path / "model", tmp_path), quiet=True)
    policy(seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="was begun under other options: model_hash"):
        sample_rows(options(tmp_path / "model", tmp_path), quiet=True)


def test_a_full_disk_is_one_line_and_the_rows_before_are_whole(model, tmp_path, monkeypatch):
    path, write, written = tmp_path / "rollouts.jsonl", os.write, []
    sample_rows(options(model, tmp_path, output_file=str(tmp_path / "unbroken.jsonl")), quiet=True)

    def fills(descriptor, content):
        room = 3000 - sum(written)
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(write(descriptor, content[:room]))
        return written[-1]

    with monkeypatch.context() as patch:
        patch.setattr(appending.os, "write", fills)
        with pytest.raises(UserError) as found:
            sample_rows(options(model, tmp_path), quiet=True)
    assert str(found.value) == f"{path}: cannot be written: No space left on device. What was there before is whole"
    assert 0 < len(rows_of(path)) < 18 and path.read_bytes().endswith(b"\n")
    sample_rows(options(model, tmp_path), quiet=True)
    same_rows(path, tmp_path / "unbroken.jsonl")
