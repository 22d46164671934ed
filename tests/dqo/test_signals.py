"""SIGTERM and SIGINT, at every moment: a line, the right status, no traceback, and a run that goes on as an unbroken one."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from dqo import signals
from dqo.api import DQOConfig, DQOTrainer
from dqo.commands.train import main
from dqo.reference import columns as reference
from dqo.train import held_out, loop
from dqo.train.checkpoint import checkpoints, read_state
from tests.dqo import forked
from tests.dqo.train.test_kill import arguments, assert_same_run, data, finish, unbroken  # noqa: F401

pytestmark = pytest.mark.slow

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


def command(options, output, place, number):
    """`dqo-train` with `options`, in this process, its output in a file; `place(send)` arranges when the signal comes."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    place(lambda: os.kill(os.getpid(), number))
    sys.argv = ["dqo-train", *options]
    main()


def at_call(count, owner, name, send):
    function, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        calls.append(name)
        if len(calls) == count:
            send()
        return function(*arguments, **options)

    setattr(owner, name, counted)


def while_rows_are_read(send):
    from dqo.train import inputs

    at_call(1, inputs, "open_data", send)


def in_the_pass_of_the_reference(send):
    reference.FLUSH_TOKENS = 10**9  # what was computed is written by nothing but the signal
    at_call(3, reference, "_compute", send)


def in_the_first_evaluation(send):
    at_call(1, held_out, "value_auc", send)


def in_a_step(send):
    at_call(5, loop, "accumulate", send)


def in_the_evaluation_between_steps(send):
    at_call(2, held_out, "value_auc", send)


def while_a_checkpoint_is_written(send):
    at_call(2, loop.checkpoint, "save_checkpoint", send)


def in_the_last_step(send):
    at_call(21, loop, "accumulate", send)


def while_the_final_models_are_written(send):
    at_call(1, loop.checkpoint, "publish_models", send)


def twice_in_a_step(send):
    def both():
        send()
        send()

    at_call(5, loop, "accumulate", both)


ENDS = "SIG[A-Z]+: stopped; the same command goes on from what is whole"
STEP = "SIG[A-Z]+: the step ends and a checkpoint is written; another signal ends at once"
PLACES = {  # -> the line, and the checkpoint that it leaves
    while_rows_are_read: (ENDS, None),
    in_the_pass_of_the_reference: (ENDS, None),
    in_the_first_evaluation: (ENDS, None),
    in_a_step: (STEP, 5),
    in_the_evaluation_between_steps: (STEP, 10),
    while_a_checkpoint_is_written: (STEP, 7),
    in_the_last_step: (STEP, 21),
    while_the_final_models_are_written: (ENDS, 21),
    twice_in_a_step: ("SIG[A-Z]+: ended at once", 3),
}


CASES = [(place, list(STATUS)[i % 2]) for i, place in enumerate(PLACES)] + [(in_a_step, signal.SIGTERM)]


@pytest.mark.parametrize("place, number", CASES, ids=lambda x: getattr(x, "__name__", None) or x.name)
def test_a_run_that_is_told_to_end_ends_in_order_and_goes_on(data, unbroken, place, number):  # noqa: F811
    output_dir = data / f"{place.__name__}-{number.name}"
    output = output_dir.with_suffix(".txt")
    process = forked.start(command, arguments(data, output_dir), output, place, number)
    status, text = forked.ended(process), output.read_text()
    line, step = PLACES[place]
    assert status == STATUS[number], text
    assert "Traceback" not in text and re.search(line, text), text
    found = [int(path.name.partition("-")[2]) for path in checkpoints(output_dir)]
    assert found[-1:] == ([] if step is None else [step])
    if line is STEP:
        assert f"{number.name}: stopped after step {step} of 21" in text or place is in_the_last_step, text
    if place is in_the_pass_of_the_reference:
        assert list(output_dir.glob("ref_cache/*/segment-*"))
    assert finish(data, output_dir) == 0
    assert_same_run(output_dir, unbroken[0])


@pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)
@pytest.mark.parametrize("entry", ["from dqo.commands.train import main", "from dqo.commands.base import main"])
def test_during_imports_there_is_a_line_and_no_traceback(number, entry, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "1", "completion": "2", "reward": 1.0}\n{"prompt": "1", "completion": "3", "reward": 0}'
    )
    program = f"""
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Finder())
{entry}
main()
"""
    options = ["--dataset_name", "rows.jsonl", "--model_name_or_path", "model", "--eval_fraction", "0"]
    options = options if "commands.train" in entry else ["train", *options]
    done = subprocess.run([sys.executable, "-c", program, *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == STATUS[number], done.stderr
    assert done.stderr.splitlines()[-1] == f"{number.name}: stopped; the same command goes on from what is whole"
    assert "Traceback" not in done.stderr


def test_a_launcher_that_hands_a_signal_on_twice_does_not_end_the_step(data, monkeypatch):  # noqa: F811
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as ended, signals.waiting():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.noted() == signal.SIGTERM
    assert ended.value.code == 143


def trainer(data, output_dir):  # noqa: F811
    config = DQOConfig(
        output_dir=output_dir, max_steps=6, save_steps=2, per_device_train_batch_size=2, eval_fraction=0.2
    )
    return DQOTrainer(str(data / "model"), config, str(data / "rollouts.jsonl"))


@pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)
def test_python_gets_its_handlers_back_and_an_exception(data, monkeypatch, tmp_path, number):  # noqa: F811
    before = [signal.getsignal(n) for n in STATUS]
    at_call_of = loop.accumulate
    calls = []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return at_call_of(*arguments)

    monkeypatch.setattr(loop, "accumulate", counted)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        trainer(data, tmp_path / "out").train()
    assert [signal.getsignal(n) for n in STATUS] == before
    assert read_state(checkpoints(tmp_path / "out")[-1])["counters"]["step"] == 3
    monkeypatch.undo()
    assert trainer(data, tmp_path / "out").train().global_step == 6
    assert [signal.getsignal(n) for n in STATUS] == before


def test_in_another_thread_training_leaves_the_signals_alone(data, tmp_path):  # noqa: F811
    before, found = [signal.getsignal(n) for n in STATUS], []
    thread = threading.Thread(target=lambda: found.append(trainer(data, tmp_path / "out").train().global_step))
    thread.start()
    thread.join()
    assert found == [6] and [signal.getsignal(n) for n in STATUS] == before


def test_one_of_two_processes_is_signalled_and_both_stop_at_one_step(data, tmp_path):  # noqa: F811
    options = arguments(data, tmp_path / "out")
    both = forked.launch(*options, entry="tests.dqo.run_signalled:main")
    assert [done.returncode for done in both] == [143, 143], both
    assert "SIGTERM: stopped after step 5 of 21" in both[0].stdout and "stopped after" not in both[1].stdout
    assert not any("Traceback" in done.stderr for done in both)
    state = json.loads((tmp_path / "out" / "checkpoint-5" / "dqo_state.json").read_text())
    assert state["counters"]["step"] == 5
    (tmp_path / "out" / "checkpoint-5" / "optimizer.safetensors").write_bytes(b"")
    both = forked.launch(*options, entry="dqo.commands.train:main")
    assert [done.returncode for done in both] == [0, 0], both
    said = "".join(done.stderr for done in both)
    assert said.count("checkpoint-5 is damaged: optimizer.safetensors was altered or cut") == 1
    assert f"going on from {tmp_path}/out/checkpoint-3, step 3 of 21" in both[0].stdout
