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
        {"value_model": "head"},
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
