"""A run that is killed, at any moment and as often as may be, ends as an unbroken one: bit for bit, on the CPU."""

import functools
import json
import random
import signal
import time
from pathlib import Path

import pytest
from transformers import modeling_utils

from dqo import files
from dqo.config.options import load_options
from dqo.models.new import save
from dqo.reference import cache as reference_cache
from dqo.train import checkpoint
from dqo.train.checkpoint import checkpoints
from dqo.train.loop import Trainer
from dqo.train.metrics import MetricsFile
from dqo.train.run import train
from tests.dqo import forked
from tests.dqo.forked import KILLED_HERE, die, train_with
from tests.dqo.helpers import policy, rollout_rows, tokenizer

pytestmark = pytest.mark.slow

KILLS = 10
SEED = random.SystemRandom().randrange(2**32)  # set it to the printed one to see a failure again


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.getbasetemp() / "kill"  # one for all files of tests that import this fixture
    if not directory.exists():
        save(policy(), tokenizer(), directory / "model")
        (directory / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rollout_rows(prompts=16, samples=4))))
    return directory


def arguments(data, output_dir):
    settings = {
        "dataset_name": data / "rollouts.jsonl",
        "model_name_or_path": data / "model",
        "output_dir": output_dir,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_batch_tokens": 300,  # several batches a reference pass
        "max_steps": 21,
        "logging_steps": 4,  # windows end neither with checkpoints nor with epochs
        "save_steps": 3,
        "eval_steps": 10,
        "eval_fraction": 0.2,
        "learning_rate": 1e-3,
        "value_model": "separate",  # a second model among the files
        "critic_learning_rate": 1e-2,
        "value_warmup_steps": 4,
        "warmup_steps": 2,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def unbroken(data):
    return made_unbroken(data)


@functools.cache
def made_unbroken(data):
    """An unbroken run, and how many seconds it and a start after its end take."""
    forked.start(int).join()  # the imports are not part of it
    marks = [time.monotonic()]
    for _ in range(2):
        assert finish(data, data / "unbroken") == 0
        marks.append(time.monotonic())
    return data / "unbroken", marks[1] - marks[0], marks[2] - marks[1]


def finish(data, output_dir, place=None):
    return forked.ended(forked.start(train_with, arguments(data, output_dir), place))


def metrics_without_speed(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in rows]


def assert_same_run(killed, unbroken):
    for name in ("model.safetensors", "critic/model.safetensors", "config.json"):
        assert (killed / name).read_bytes() == (unbroken / name).read_bytes(), name
    assert metrics_without_speed(killed) == metrics_without_speed(unbroken)
    assert (
        [p.name for p in checkpoints(killed)]
        == [p.name for p in checkpoints(unbroken)]
        == ["checkpoint-18", "checkpoint-21"]
    )
    for step in checkpoints(killed):
        for name in ("optimizer.safetensors", "model.safetensors", "critic/model.safetensors"):
            assert (step / name).read_bytes() == (unbroken / step.name / name).read_bytes(), f"{step.name}/{name}"
        state, expected = (checkpoint.read_state(directory / step.name) for directory in (killed, unbroken))
        position = state["counters"]["metrics_position"]
        assert (killed / "metrics.jsonl").read_bytes()[:position].endswith(b"\n")
        times = ("train_seconds", "train_cpu_seconds")
        for name in (*times, "metrics_position", "metrics_crc32"):  # times, and what digits of times change
            del state["counters"][name], expected["counters"][name]
        assert {name: state[name] for name in ("counters", "window")} == {
            name: expected[name] for name in ("counters", "window")
        }
    # in the cache, which other runs may share, a half-written segment lies for an hour
    assert not [p for p in killed.rglob(".*.partial") if p.parent.parent.name != "ref_cache"]


def seen(output_dir):
    """How far a run came, as its files show it."""
    segments = len(list(output_dir.glob("ref_cache/*/segment-*")))
    partial = [p.name.split(".")[1][:12] for p in output_dir.rglob(".*.partial")]
    steps = [int(p.name.partition("-")[2]) for p in checkpoints(output_dir)]
    return f"{segments} segments, checkpoints {steps}, half-written {partial}, final {(output_dir / 'config.json').exists()}"


def test_a_run_killed_at_ten_random_moments_ends_as_an_unbroken_one(data, unbroken):
    whole, life, again = unbroken
    rng = random.Random(SEED)
    early = [rng.uniform(0.0, again) for _ in range(2)]  # mostly before the first step
    moments = sorted(
        early + [rng.uniform(again, life) for _ in range(KILLS - 2)]
    )  # as if each start went on where it was
    output_dir, story, kills, lived = data / f"killed-{SEED}", [], 0, 0.0
    for moment in [*moments, *(rng.uniform(0.0, again) for _ in range(3 * KILLS))]:  # more, where a start was faster
        process = forked.start(train_with, arguments(data, output_dir))
        delay = moment - lived + min(lived, 0.7 * again) if kills < KILLS and moment > lived else moment
        process.join(delay)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), f"seed {SEED}: exit {process.exitcode} after {story}"
        kills, lived = kills + (process.exitcode != 0), max(lived, moment)
        story.append(f"{delay:.2f} s: {'killed' if process.exitcode else 'finished'}, {seen(output_dir)}")
        if kills == KILLS:
            break
    print(f"seed {SEED}, an unbroken run takes {life:.2f} s, a finished one {again:.2f} s", *story, sep="\n")
    assert kills == KILLS
    assert finish(data, output_dir) == 0
    assert_same_run(output_dir, whole)


def at_call(count, function, before=None):
    """`function`, which ends the process at its `count`-th call, after `before(*arguments)`."""
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == count:
            if before is not None:
                before(*arguments, **options)
            die()
        return function(*arguments, **options)

    return counted


def while_the_configuration_is_written(output_dir):
    files.os.fsync = at_call(1, files.os.fsync)


def in_the_middle_of_a_segment_of_the_reference(output_dir):
    def half(path, content):
        files.aside(path).write_bytes(content[: len(content) // 2])

    reference_cache.write_whole = at_call(3, reference_cache.write_whole, before=half)


def between_the_metrics_line_and_the_checkpoint(output_dir):
    Trainer.save = at_call(3, Trainer.save)


def in_the_middle_of_a_metrics_line(output_dir):
    def half(log, row):
        log.file.write(json.dumps(row)[:40].encode())

    MetricsFile.write = at_call(5, MetricsFile.write, before=half)


def in_the_middle_of_the_optimizer_of_a_checkpoint(output_dir):
    write = checkpoint.write_tensors

    def half(path, tensors, processes):
        write(path, tensors, processes)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    checkpoint.write_tensors = at_call(3, write, before=half)


def in_the_middle_of_the_policy_of_a_checkpoint(output_dir):
    write = modeling_utils.safe_save_file

    def half(tensors, path, **options):
        write(tensors, path, **options)
        with open(path, "r+b") as file:
            file.truncate(100)

    modeling_utils.safe_save_file = at_call(5, write, before=half)  # policy and value model, twice, then the policy


def before_a_checkpoint_has_its_name(output_dir):
    _at_rename_to("checkpoint-9", before=True)


def between_the_name_of_a_checkpoint_and_the_deletion_of_old_ones(output_dir):
    _at_rename_to("checkpoint-9", before=False)


def _at_rename_to(name, before):
    rename = Path.rename

    def watched(path, target):
        if target.name == name and before:
            die()
        rename(path, target)
        if target.name == name:
            die()

    Path.rename = watched


def in_the_middle_of_the_deletion_of_an_old_checkpoint(output_dir):
    def some(directory):
        (directory / "model.safetensors").unlink()

    files.shutil.rmtree = at_call(1, files.shutil.rmtree, before=some)


def before_the_final_models(output_dir):
    checkpoint.publish_models = at_call(1, checkpoint.publish_models)


def in_the_middle_of_the_final_models(output_dir):
    replace = Path.replace

    def watched(path, target):
        replace(path, target)
        if target == output_dir / "model.safetensors":
            die()

    Path.replace = watched


PLACES = [
    while_the_configuration_is_written,
    in_the_middle_of_a_segment_of_the_reference,
    between_the_metrics_line_and_the_checkpoint,
    in_the_middle_of_a_metrics_line,
    in_the_middle_of_the_optimizer_of_a_checkpoint,
    in_the_middle_of_the_policy_of_a_checkpoint,
    before_a_checkpoint_has_its_name,
    between_the_name_of_a_checkpoint_and_the_deletion_of_old_ones,
    in_the_middle_of_the_deletion_of_an_old_checkpoint,
    before_the_final_models,
    in_the_middle_of_the_final_models,
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_run_killed_at_a_nasty_place_ends_as_an_unbroken_one(data, unbroken, place):
    output_dir = data / place.__name__
    assert finish(data, output_dir, place) == KILLED_HERE
    print(seen(output_dir))
    for found in checkpoints(output_dir):  # what has the name of a checkpoint is one
        assert {"model.safetensors", "optimizer.safetensors", "dqo_state.json"} <= {p.name for p in found.iterdir()}
    assert finish(data, output_dir) == 0
    assert_same_run(output_dir, unbroken[0])


def where_a_step_begins(output_dir):
    Trainer.train_step = at_call(1, Trainer.train_step)


def test_a_finished_run_says_so_and_does_not_train(data, unbroken, capsys):
    directory = unbroken[0]
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    assert finish(data, directory, where_a_step_begins) == 0
    assert {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()} == before
    finished = train(load_options(arguments(data, directory)))
    assert f"{directory} is finished, 21 steps: nothing is trained" in capsys.readouterr().out
    assert finished.held_out == pytest.approx(
        {k: v for k, v in metrics_without_speed(directory)[-1].items() if k != "step"}
    )
