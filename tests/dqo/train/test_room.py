import shutil

import pytest

from dqo.config.options import load_options
from dqo.train import room
from dqo.train.run import train
from tests.dqo.helpers import arguments


def written(directory):
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dqo"},
        {"method": "dqo", "target_ema": 0.9},
        {"method": "dpo"},
        {"value_model": "separate"},
        {"use_peft": ""},
    ],
    ids=str,
)
def test_the_size_of_a_checkpoint_is_known_before_the_first(files, options):
    lora = "use_peft" in options
    named = {} if lora else options
    more = ["--use_peft", "--lora_r", "8"] if lora else []
    run = train(load_options([*arguments(files, max_steps=1, **named), *more]))
    headers = 1500 * len(list((files / "out" / "checkpoint-1").rglob("*.safetensors")))
    size = written(files / "out" / "checkpoint-1")
    assert size - 3 * headers < room.checkpoint_size(run.prepared.learner) <= size


@pytest.mark.parametrize("free, warned", [(100_000, True), (10**9, False)])
def test_too_little_room_for_checkpoints_is_warned_of_and_no_refusal(files, monkeypatch, caplog, free, warned):
    usage = shutil.disk_usage(files)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    run = train(load_options(arguments(files, max_steps=1, save_total_limit=3)))
    each = room.in_units(room.checkpoint_size(run.prepared.learner))
    assert (
        f"(4 of {each}, until the oldest is deleted), and the disk of {files / 'out'} has 100 KB left" in caplog.text
    ) == warned
    assert ("lower --save_total_limit" in caplog.text) == warned


def test_the_references_of_later_phases_need_room_too(files, monkeypatch, caplog):
    options = {"method": "curry_dpo", "stages": 3, "max_steps": 6, "save_total_limit": 1}
    run = train(load_options(arguments(files, **options)))
    kept = sorted((files / "out").glob("reference-*"))
    size = room.reference_size(run.prepared.learner)
    assert len(kept) == 2 and all(size <= written(path) < size + 3000 for path in kept)
    checkpoints = 2 * room.checkpoint_size(run.prepared.learner)
    warn = lambda output, free: _warned(monkeypatch, caplog, output, run.prepared.learner, free)  # noqa: E731
    (files / "new").mkdir()
    assert f"until the oldest is deleted and 2 references of {room.in_units(size)})" in warn(files / "new", checkpoints)
    assert warn(files / "new", checkpoints + 2 * size) == ""
    for path in kept:  # they are there already
        (files / "new" / path.name).mkdir()
    assert warn(files / "new", checkpoints) == ""


def _warned(monkeypatch, caplog, output_dir, learner, free):
    usage = shutil.disk_usage(output_dir)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    caplog.clear()
    room.warn_of_little_room(output_dir, learner, keep=1, references=2)
    return caplog.text
